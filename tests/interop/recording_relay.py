"""A relay between a source and a destination that keeps what the source has sent."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from typing import Final

_PACKAGED: Final = b"\x08\x00\x07\x00\x04"
_LISTEN: Final = b"\x08\x00\x04\x00\x00"
_PING_3_AND_RUN: Final = b"\x08\x00\x02\x00\x04\x00\x00\x00\x03\x08\x00\x05\x00\x00"
"""Where a 7.2 source's package begins and ends (docs/qemu-wire.md, section 2)."""


class RecordingRelay:
    """Passes one connection on to `port` and records its forward direction."""

    def __init__(self, port: int, *, cut_package_after: int | None = None) -> None:
        """Pass on to `port` on this host.

        :param cut_package_after: bytes of a device package after which both connections are closed.
        """
        self._destination = port
        self._cut_after = cut_package_after
        self.port = 0
        self.recorded = bytearray()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[RecordingRelay]:
        """Take connections on `self.port`."""
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self

    def package(self) -> bytes:
        """The one device package in what was recorded, found without parsing the rest."""
        found = []
        place = self.recorded.find(_PACKAGED)
        while place >= 0:
            begin = place + len(_PACKAGED) + 4
            (length,) = struct.unpack(">I", self.recorded[begin - 4 : begin])
            package = bytes(self.recorded[begin : begin + length])
            if package.startswith(_LISTEN) and package.endswith(_PING_3_AND_RUN):
                found.append(package)
            place = self.recorded.find(_PACKAGED, place + 1)
        assert len(found) == 1
        return found[0]

    async def _pass_on(
        self, source_reader: asyncio.StreamReader, source_writer: asyncio.StreamWriter
    ) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._destination)
        await asyncio.gather(
            self._copy(source_reader, writer, self.recorded),
            self._copy(reader, source_writer, bytearray()),
        )

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                begin = len(record)
                record += data
                cut = self._cut(record)
                writer.write(record[begin:cut])
                await writer.drain()
                if cut is not None:
                    break
        writer.close()

    def _cut(self, record: bytearray) -> int | None:
        """Where what was recorded is to end; None if it is to go on."""
        if self._cut_after is None:
            return None
        place = record.find(_PACKAGED)
        while place >= 0:
            begin = place + len(_PACKAGED) + 4
            if record.startswith(_LISTEN, begin):
                return begin + self._cut_after if len(record) > begin + self._cut_after else None
            place = record.find(_PACKAGED, place + 1)
        return None


def device_state_of(package: bytes) -> bytes:
    """What a package carries between its LISTEN and its PING and RUN."""
    return package[len(_LISTEN) : -len(_PING_3_AND_RUN)]
