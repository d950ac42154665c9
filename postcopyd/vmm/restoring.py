"""A VMM of which a predecessor of this process has left descriptors and facts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import msgspec

from postcopyd.incoming.inheriting import InheritedVmm
from postcopyd.incoming.journal import JournalUnreadable
from postcopyd.incoming.vmm import Vmm
from postcopyd.vmm import firecracker, native
from postcopyd.vmm.peer import peer_of


def restore_vmm(inherited: InheritedVmm) -> Vmm:
    """Go on with a VMM, whatever it is; takes over what is inherited.

    :raise JournalUnreadable: if it is of a kind that is not known, or what was left of it does
        not fit together.
    :raise VmmFailure: if it cannot be gone on with; what is inherited still is the caller's.
    """
    restore = _KINDS.get(inherited.kind)
    if restore is None:
        raise JournalUnreadable(f"it speaks of a VMM of kind {inherited.kind!r}")
    try:
        return restore(inherited)
    except (msgspec.MsgspecError, KeyError) as error:
        raise JournalUnreadable(f"what it says of its VMM is wrong: {error}") from error


def _restore_native(inherited: InheritedVmm) -> Vmm:
    facts = msgspec.json.decode(inherited.facts, type=native.NativeFacts)
    connection = socket.socket(fileno=inherited.descriptors["connection"])
    del inherited.descriptors["connection"]
    inherited.resources.callback(connection.close)
    pidfd = inherited.descriptors.pop("pidfd", None)
    if pidfd is not None:
        inherited.resources.callback(os.close, pidfd)
    return native.NativeVmm(
        connection,
        peer_of(connection),
        pidfd,
        inherited.memory,
        inherited.resources.pop_all(),
        facts,
    )


def _restore_firecracker(inherited: InheritedVmm) -> Vmm:
    facts = msgspec.json.decode(inherited.facts, type=firecracker.FirecrackerFacts)
    pidfd = inherited.descriptors.pop("pidfd")
    inherited.resources.callback(os.close, pidfd)
    return firecracker.FirecrackerVmm(
        facts.peer, pidfd, inherited.memory, inherited.resources.pop_all()
    )


def _restore_qemu(inherited: InheritedVmm) -> Vmm:
    # Imported here: most daemons never meet a QEMU, and it takes memory.
    from postcopyd.vmm.qemu import restore_qemu

    return restore_qemu(inherited)


_KINDS: dict[str, Callable[[InheritedVmm], Vmm]] = {
    native.KIND: _restore_native,
    firecracker.KIND: _restore_firecracker,
    "qemu": _restore_qemu,
}
