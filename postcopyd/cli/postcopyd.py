"""postcopyd: the daemon."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from postcopyd import __version__
from postcopyd.cli.output import print_error
from postcopyd.daemon import paths
from postcopyd.daemon.config import Configuration, load
from postcopyd.daemon.config_problems import ConfigurationError

_PROGRAM: Final = "postcopyd"

FAILED: Final = 1
WRONG: Final = 2
TO_BE_STARTED_AGAIN: Final = 75
"""EX_TEMPFAIL of sysexits.h; RestartForceExitStatus= of the unit."""

_EPILOG: Final = (
    "exit status: 0 done, 1 failed, 2 wrong usage or a wrong configuration, 75 to be started "
    "again. See postcopyd(8)."
)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status.

    :param words: the command line behind the program's name; None for that of this process.
    """
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description="One post-copy destination for every VMM.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = subparsers.add_parser("serve", help="be the daemon", description="Be the daemon.")
    serve.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"the configuration (default: {paths.CONFIGURATION}; without it every default)",
    )
    serve.set_defaults(func=_serve)
    check = subparsers.add_parser(
        "check-config",
        help="tell what is wrong with a configuration",
        description="Tell every mistake in a configuration, with its line.",
    )
    check.add_argument("config", type=Path, metavar="FILE", help="the configuration")
    check.set_defaults(func=_check_config)
    arguments = parser.parse_args(words)
    status: int = arguments.func(arguments)
    return status


def _serve(arguments: argparse.Namespace) -> int:
    path: Path | None = arguments.config
    if path is None and Path(paths.CONFIGURATION).exists():
        path = Path(paths.CONFIGURATION)
    configuration = Configuration() if path is None else _load(path)
    if configuration is None:
        return WRONG
    # Imported only now: a mistake in the configuration is told at once.
    from postcopyd.daemon import logging, supervisor, worker

    with ExitStack() as resources:
        try:
            workers = worker.start_all(configuration.number_of_workers(), resources)
        except OSError as error:
            print_error(_PROGRAM, f"cannot start a worker: {error.strerror}")
            return FAILED
        try:
            resources.enter_context(
                logging.configured(configuration.log.level, configuration.log.format)
            )
        except OSError as error:
            print_error(_PROGRAM, str(error), 'set format under [log] to "auto"')
            return FAILED
        try:
            to_be_started_again = asyncio.run(
                supervisor.supervise(configuration, os.environ, workers)
            )
        except supervisor.CannotStart as error:
            logging.get_logger().error("cannot start", reason=str(error))
            return FAILED
    return TO_BE_STARTED_AGAIN if to_be_started_again else 0


def _check_config(arguments: argparse.Namespace) -> int:
    configuration = _load(arguments.config)
    if configuration is None:
        return WRONG
    from postcopyd.daemon.tls_files import check_files

    try:
        check_files(arguments.config, configuration.tls)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return WRONG
    print(f"{arguments.config} is right")
    return 0


def _load(path: Path) -> Configuration | None:
    """Return the configuration; None if it is wrong, which has been told."""
    try:
        return load(path)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print_error(_PROGRAM, f"cannot read {path}: {error.strerror}")
    return None


if __name__ == "__main__":
    sys.exit(main())
