"""Where log events go: the journal with fields of their own, a terminal, or JSON lines.

Events are made with structlog: a short sentence, and what belongs to it as fields. `migration` is
the field that says which one an event is about, `message_id` marks the events that a program may
look for (`event_log.py`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, Literal, TextIO

import msgspec

from postcopyd.daemon import journal
from postcopyd.daemon.printable import printable

# structlog takes rich along where there is one, for tracebacks that the daemon does not draw: 5 MiB
# for as long as it runs, and a good part of its start. What is None here cannot be imported.
_rich = sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
import structlog  # noqa: E402

if _rich is None:
    del sys.modules["rich"]

Format = Literal["auto", "console", "json", "journal"]

LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

# syslog(3); journald's PRIORITY.
_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_IDENTIFIER: Final = "postcopyd"
# What a console shows as fields nobody on it has a use for.
_ONLY_FOR_JOURNAL: Final = ("message_id", "code_file", "code_line", "code_func")


@contextmanager
def configured(
    level: str,
    format: Format,
    *,
    stream: TextIO | None = None,
    journal_path: str | None = None,
    worker: int | None = None,
) -> Iterator[None]:
    """Send log events where the configuration says, until the block is left.

    What libraries log through `logging` from warnings on takes the same way.

    :param level: one of `LEVELS`.
    :param stream: for console and JSON; None for standard error.
    :param journal_path: journald's socket; None for where it always is.
    :param worker: number that every event has as a field; None for none.
    :raise OSError: if the journal is asked for and there is no journald.
    """
    stream = stream or sys.stderr
    if format == "auto":
        to_journal = journal.is_journal(stream, os.environ.get("JOURNAL_STREAM", ""))
        format = "journal" if to_journal else "console"
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        _add_caller,
        structlog.processors.format_exc_info,
    ]
    if worker is not None:
        processors.append(partial(_add_worker, worker))
    factory: Callable[..., Any]
    with ExitStack() as resources:
        if format == "journal":
            connection = journal.Journal(journal_path or journal.DEFAULT_PATH)
            resources.callback(connection.close)
            processors.append(_render_for_journal)
            factory = partial(_JournalLogger, connection)
        else:
            time = structlog.processors.TimeStamper("iso", utc=True)
            renderer = _json() if format == "json" else _console(stream)
            processors += [_drop_journal_fields, time, *renderer]
            factory = structlog.WriteLoggerFactory(stream)
        structlog.configure(
            processors=processors,
            wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
            logger_factory=factory,
        )
        resources.callback(structlog.reset_defaults)
        root = logging.getLogger()
        handler = _FromLibraries(logging.WARNING)
        root.addHandler(handler)
        resources.callback(root.removeHandler, handler)
        yield


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """Return a logger that does as is configured when it is used."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


class _FromLibraries(logging.Handler):
    """Makes a log event of what a library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        log = get_logger().error if record.levelno >= logging.ERROR else get_logger().warning
        log(record.getMessage(), logger=record.name, exc_info=record.exc_info)


# -- processors ------------------------------------------------------------------------------


def _add_caller(
    logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Add which line of ours speaks: journald's CODE_FILE, CODE_LINE and CODE_FUNC."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__", "").partition(".")[0] in ("structlog", "logging")
        or frame.f_globals.get("__name__") == __name__
    ):
        frame = frame.f_back
    event["code_file"] = frame.f_code.co_filename
    event["code_line"] = frame.f_lineno
    event["code_func"] = frame.f_code.co_name
    return event


def _add_worker(
    worker: int, logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event.setdefault("worker", worker)
    return event


def _drop_journal_fields(
    logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name in _ONLY_FOR_JOURNAL:
        event.pop(name, None)
    return event


def _console(stream: TextIO) -> list[structlog.typing.Processor]:
    renderer = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    return [_make_printable, renderer]


def _make_printable(
    logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str) and name != "exception":
            event[name] = printable(value)
    return event


def _json() -> list[structlog.typing.Processor]:
    def encode(event: Mapping[str, Any], **_: object) -> str:
        return msgspec.json.encode(event, enc_hook=str).decode()

    return [structlog.processors.JSONRenderer(encode)]


# -- the journal -----------------------------------------------------------------------------


def _render_for_journal(
    logger: object, method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the one argument of the logger's method: the fields of the entry."""
    return (list(_journal_fields(event)),), {}


def _journal_fields(event: MutableMapping[str, Any]) -> Iterator[tuple[str, str]]:
    level = event.pop("level")
    message = str(event.pop("event"))
    exception = event.pop("exception", None)
    yield "PRIORITY", str(_PRIORITIES[level])
    yield "SYSLOG_IDENTIFIER", _IDENTIFIER
    for name in _ONLY_FOR_JOURNAL:
        if name in event:
            yield name.upper(), str(event.pop(name))
    details = []
    for name, value in event.items():
        yield journal.field_name(f"postcopyd_{name}"), str(value)
        details.append(f"{name}={value}")
    text = f"{message} ({', '.join(details)})" if details else message
    yield "MESSAGE", text if exception is None else f"{text}\n{exception}"


class _JournalLogger:
    """What structlog calls at the end: every level does the same."""

    def __init__(self, connection: journal.Journal, *_: object) -> None:
        self._journal = connection

    def msg(self, fields: list[tuple[str, str]]) -> None:
        self._journal.send(fields)

    debug = info = warning = error = critical = exception = msg
