"""What must be known of a QEMU before it is adopted: that it waits, and what memory it has.

Only questions are asked: nothing is changed in QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from postcopyd.incoming.vmm import FedBlock
from postcopyd.kernel.procfs import threads_by_inner_id
from postcopyd.vmm.adoption import AdoptionRefused
from postcopyd.vmm.qemu_monitor import QemuMonitor
from postcopyd.vmm.qemu_texts import (
    ListedBlock,
    UnknownText,
    parse_blocks,
    parse_guest_memory,
    parse_host_address,
)

_DEFER: Final = "start it with -incoming defer"
_SPOILING: Final = {
    "x-ignore-shared": "it would wait for a stream without its memory's pages",
    "multifd": "it would wait for more connections",
    "postcopy-preempt": "it would wait for a second connection",
    "mapped-ram": "it would wait for a file",
    "x-colo": "it would stay a secondary for ever",
}
"""Capabilities that change what QEMU expects on its incoming channel, and how."""


class QemuFacts(msgspec.Struct, frozen=True):
    """A QEMU that waits for its migration."""

    version: tuple[int, int, int]
    machine: str
    """Its machine type, with version, such as ``pc-q35-7.2``."""
    process_id: int
    thread_names: Mapping[int, str]
    """Of its processors: thread id in the pid namespace of QEMU -> name."""
    backed: tuple[ListedBlock, ...]
    """The blocks of its memory backends, with their addresses."""
    fed: tuple[FedBlock, ...]
    """All others: ROMs, video memory."""


async def ask(monitor: QemuMonitor, within: float) -> QemuFacts:
    """Find out what is to be known.

    :param within: seconds for each answer.
    :raise AdoptionRefused: if it cannot be filled, saying what to change.
    :raise MonitorFailure: if the monitor fails.
    """
    query = _Query(monitor, within)
    version = (await query("query-version"))["qemu"]
    await _check_waits(query)
    machine = str(await query("qom-get", path="/machine", property="type"))
    processors = await query("query-cpus-fast")
    names = {entry["thread-id"]: f"vcpu{entry['cpu-index']}" for entry in processors}
    process_id = _process_of(monitor, names)
    await _check_capabilities(query)
    try:
        backed, fed = await _blocks(query)
    except UnknownText as error:
        raise AdoptionRefused(
            f"this QEMU tells of {error}; versions 7.2 and 10.0 are known"
        ) from error
    return QemuFacts(
        version=(version["major"], version["minor"], version["micro"]),
        machine=machine.removesuffix("-machine"),
        process_id=process_id,
        thread_names=names,
        backed=backed,
        fed=fed,
    )


class _Query:
    """Asks, with arguments whose names are QMP's."""

    def __init__(self, monitor: QemuMonitor, within: float) -> None:
        self._monitor = monitor
        self._within = within

    async def __call__(self, command: str, **arguments: object) -> Any:
        return await self._monitor.execute(command, arguments or None, within=self._within)

    async def human(self, line: str) -> str:
        return await self._monitor.human(line, within=self._within)


async def _check_waits(query: _Query) -> None:
    status = (await query("query-status"))["status"]
    if status != "inmigrate":
        raise AdoptionRefused(
            f"this QEMU does not wait for a migration, its status is {status!r}: {_DEFER}"
        )
    incoming = await query("query-migrate")
    # 7.2 tells only the address at which it waits, 10.0 a status as well.
    if "socket-address" in incoming or incoming.get("status", "none") != "none":
        raise AdoptionRefused(f"this QEMU has an incoming channel of its own already: {_DEFER}")


def _process_of(monitor: QemuMonitor, names: Mapping[int, str]) -> int:
    """Return the process behind the monitor, when it is QEMU itself."""
    process_id = monitor.peer_process
    if process_id == 0:
        raise AdoptionRefused(
            "this QEMU runs in a pid namespace that cannot be seen from here: run postcopyd in the "
            "same one or in one around it"
        )
    try:
        threads = threads_by_inner_id(process_id)
    except FileNotFoundError:
        threads = {}
    if not names.keys() <= threads.keys():
        raise AdoptionRefused(
            f"the monitor's socket was made by process {process_id}, which is not the QEMU behind "
            "it: give QEMU one that it makes itself (-qmp unix:PATH,server=on,wait=off)"
        )
    return process_id


async def _check_capabilities(query: _Query) -> None:
    on = {
        entry["capability"] for entry in await query("query-migrate-capabilities") if entry["state"]
    }
    for name, why in _SPOILING.items():
        if name in on:
            raise AdoptionRefused(
                f"this QEMU has the capability {name} on: {why}; switch it off at the destination "
                "(migrate-set-capabilities)"
            )
    credentials = (await query("query-migrate-parameters")).get("tls-creds")
    if credentials:
        raise AdoptionRefused(
            f"this QEMU has tls-creds {credentials!r} set for migration: unset it at the "
            "destination; its incoming channel is a socket pair"
        )
    for device in await query("query-memory-devices"):
        if device["type"] == "virtio-mem":
            raise AdoptionRefused(
                "this QEMU has a virtio-mem device: its source sends no page for what is unplugged "
                "and answers no request for it; use pc-dimm"
            )


async def _blocks(query: _Query) -> tuple[tuple[ListedBlock, ...], tuple[FedBlock, ...]]:
    """Return the blocks of memory backends, and the others."""
    # With machine types older than 4.0 a block is called by the whole path of its backend.
    backends = {
        name
        for backend in await query("query-memdev")
        if "id" in backend
        for name in (backend["id"], f"/objects/{backend['id']}")
    }
    listed = parse_blocks(await query.human("info ramblock"))
    backed = [block for block in listed if block.name in backends]
    if not backed:
        raise AdoptionRefused(
            "this QEMU has no memory backend: start it with a machine that has RAM"
        )
    if any(block.address is None for block in backed):
        backed = await _with_addresses(query, backed)
    fed = tuple(
        FedBlock(block.name, block.used, block.total)
        for block in listed
        if block.name not in backends
    )
    return tuple(backed), fed


async def _with_addresses(query: _Query, blocks: list[ListedBlock]) -> list[ListedBlock]:
    """Find each block through the guest's address space, where every one of its parts agrees."""
    found: dict[str, set[int]] = {block.name: set() for block in blocks}
    for part in parse_guest_memory(await query.human("info mtree -f")):
        if part.name in found:
            address = parse_host_address(await query.human(f"gpa2hva {part.guest_address:#x}"))
            found[part.name].add(address - part.offset)
    for name, addresses in found.items():
        if len(addresses) != 1:
            raise AdoptionRefused(
                f"this QEMU does not tell where its RAM block {name!r} is: "
                + ("the guest does not see it" if not addresses else "its parts do not agree")
            )
    return [
        msgspec.structs.replace(block, address=found[block.name].copy().pop()) for block in blocks
    ]
