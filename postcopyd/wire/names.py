"""Names on the wire: one length byte, then that many bytes, no NUL."""

from __future__ import annotations

from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.stream_format import NAME_LIMIT


def encode_name(name: str) -> bytes:
    """Return the name with its length byte in front.

    :raise ValueError: if it is empty or longer than a length byte can say.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= NAME_LIMIT:
        raise ValueError(f"the name {name!r} must have 1 to {NAME_LIMIT} bytes")
    return bytes((len(encoded),)) + encoded


def decode_name(encoded: bytes, of: str, position: int) -> str:
    """Return the name that `encoded` (without the length byte) is.

    :param of: what has the name, for the error: "block", "section", ...
    :raise ProtocolError: if it is empty, not UTF-8, or has a NUL.
    """
    try:
        name = encoded.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"a {of} name that is not UTF-8: {encoded!r}", position) from None
    if not name or "\0" in name:
        raise ProtocolError(f"a {of} name that is empty or has a NUL: {encoded!r}", position)
    return name
