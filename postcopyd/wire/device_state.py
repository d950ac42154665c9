"""Device state that is not QEMU's: any bytes, carried as one device section.

A stream carries device sections (qemu-wire, 2), and only their own VMM can read them. A VMM that
keeps its device state in a form of its own has it wrapped at the source and unwrapped at the
destination: what went in comes out, also when it looks like a section itself.
"""

from __future__ import annotations

from typing import Final

from postcopyd.wire import stream_writer
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.package import parse_package

_SECTION: Final = "postcopyd/device-state"
_WRAPPED_EMPTY: Final = stream_writer.device_section(0, _SECTION, b"")
_FOOTER_LENGTH: Final = 5
_HEAD: Final = _WRAPPED_EMPTY[:-_FOOTER_LENGTH]
_FOOTER: Final = _WRAPPED_EMPTY[-_FOOTER_LENGTH:]
_PACKAGED_LENGTH: Final = 9  # the command PACKAGED, in front of the package itself


def wrap_device_state(state: bytes) -> bytes:
    """Return device sections that carry `state`: as they are if it is made of QEMU's own."""
    if not state or (_is_made_of_sections(state) and not _is_wrapped(state)):
        return state
    return _HEAD + state + _FOOTER


def unwrap_device_state(sections: bytes) -> bytes:
    """Return what `wrap_device_state` was given; QEMU's own sections come back as they are."""
    if _is_wrapped(sections):
        return sections[len(_HEAD) : -_FOOTER_LENGTH]
    return sections


def _is_wrapped(sections: bytes) -> bool:
    return (
        len(sections) >= len(_WRAPPED_EMPTY)
        and sections.startswith(_HEAD)
        and sections.endswith(_FOOTER)
    )


def _is_made_of_sections(state: bytes) -> bool:
    package = stream_writer.package(state)
    try:
        return parse_package(package[_PACKAGED_LENGTH:]).device_state == state
    except ProtocolError:
        return False
