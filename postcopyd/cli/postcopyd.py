"""postcopyd: the daemon."""

from __future__ import annotations

import argparse
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

_EPILOG: Final = (
    "exit status: 0 done, 1 failed, 2 wrong usage or a wrong configuration. See postcopyd(8)."
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
    # structlog takes rich along where there is one, for tracebacks that the daemon does not draw:
    # 5 MiB for as long as it runs. What is None here cannot be imported.
    sys.modules["rich"] = None  # type: ignore[assignment]
    # Imported only now: a mistake in the configuration is told at once.
    import uvloop

    from postcopyd.daemon import logging, service

    with ExitStack() as resources:
        try:
            resources.enter_context(
                logging.configured(configuration.log.level, configuration.log.format)
            )
        except OSError as error:
            print_error(_PROGRAM, str(error), 'set format under [log] to "auto"')
            return FAILED
        try:
            uvloop.run(service.serve(configuration, os.environ))
        except service.CannotStart as error:
            logging.get_logger().error("cannot start", reason=str(error))
            return FAILED
    return 0


def _check_config(arguments: argparse.Namespace) -> int:
    if _load(arguments.config) is None:
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
