"""The device package: an embedded stream `LISTEN, device sections, PING x n, RUN` (2).

Device sections have no length and only a VMM can read them, so the package is cut from both ends.
"""

from __future__ import annotations

import msgspec

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.stream_format import Command, Section

_LISTEN = bytes((Section.COMMAND, 0, Command.POSTCOPY_LISTEN, 0, 0))
_RUN = bytes((Section.COMMAND, 0, Command.POSTCOPY_RUN, 0, 0))
_PING = bytes((Section.COMMAND, 0, Command.PING, 0, 4))
_PING_LENGTH = len(_PING) + 4
_FOOTER_LENGTH = 5
_COMMAND_NAMES = {command.value: command.name for command in Command}


class PackageContents(msgspec.Struct, frozen=True):
    """What is in a device package."""

    device_state: bytes
    """The device sections, one behind the other; may be empty."""
    pings: tuple[int, ...]
    """To be answered, in order, when the device state has been loaded."""


def parse_package(data: bytes) -> PackageContents:
    """Take a package apart.

    :raise ProtocolError: as `check_package`.
    """
    end, pings = check_package(data)
    return PackageContents(data[len(_LISTEN) : end], pings)


def check_package(data: bytes, position: int = 0) -> tuple[int, tuple[int, ...]]:
    """Check the ends of a package.

    :param position: number of the package's first byte in the stream, for the error.
    :return: where the device sections end, and the values of the PINGs behind them.
    :raise ProtocolError: if it does not begin with LISTEN or not end with RUN, or if something
        other than a section and PINGs is in between, as far as one can see.
    """
    if not data.startswith(_LISTEN):
        raise ProtocolError(
            f"the package begins with {data[:5].hex(' ') or 'nothing'}, not with POSTCOPY_LISTEN",
            position,
        )
    start = len(_LISTEN)
    end = len(data) - len(_RUN)
    if end < start or not data.endswith(_RUN):
        raise ProtocolError(
            f"the package ends with {data[-5:].hex(' ')}, not with POSTCOPY_RUN", position
        )
    pings: list[int] = []
    while end - _PING_LENGTH >= start and data.startswith(_PING, end - _PING_LENGTH):
        pings.append(int.from_bytes(data[end - 4 : end], "big"))
        end -= _PING_LENGTH
    if end > start:
        _check_device_state(data, start, end, position)
    return end, tuple(reversed(pings))


def _check_device_state(data: bytes, start: int, end: int, position: int) -> None:
    first = data[start]
    if first == Section.COMMAND:
        number = int.from_bytes(data[start + 1 : start + 3], "big")
        name = _COMMAND_NAMES.get(number, "unknown")
        raise ProtocolError(
            f"command {number} ({name}) in the package; there only LISTEN comes before the devices",
            position + start,
        )
    if first not in (Section.START, Section.PART, Section.END, Section.FULL):
        raise ProtocolError(
            f"section type {first:#04x} in the package where a device section begins",
            position + start,
        )
    if end - start < _FOOTER_LENGTH or data[end - _FOOTER_LENGTH] != Section.FOOTER:
        raise ProtocolError("the last device section of the package has no footer", position + end)
