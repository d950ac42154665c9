"""Ends of TCP connections that fall silent, without a word to the other end."""

from __future__ import annotations

import ctypes
import socket
import struct

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
_BPF_RETURN = 0x06  # linux/bpf_common.h: BPF_RET | BPF_K
_TCP_REPAIR = 19  # linux/tcp.h


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection on this host; the second is the source's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    source.setblocking(False)
    return ours, source


def make_deaf(end: socket.socket) -> None:
    """Have an end hear nothing any more, so that it answers nothing either: its host is away."""
    drop_all = struct.pack("=HBBI", _BPF_RETURN, 0, 0, 0)
    instructions = ctypes.create_string_buffer(drop_all, len(drop_all))
    program = struct.pack("@HP", 1, ctypes.addressof(instructions))
    end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def hear_again(end: socket.socket) -> None:
    """Have an end that was deaf hear again what comes from now on."""
    end.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def make_forgotten(end: socket.socket) -> None:
    """Close an end without a word; its host does not know the connection any more."""
    end.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    end.close()
