"""Listening sockets: who may connect, what is in the way, and what systemd hands over."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopyd.daemon.sockets import (
    address_of,
    listen_address,
    open_stream_listener,
    open_unix_listener,
    take_over,
)
from postcopyd.wire.address import Address
from tests.support import ROOT, belongings


def test_the_file_has_the_mode_and_group_that_it_should(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    before = os.umask(0o077)
    try:
        with open_unix_listener(str(path), 0o606, "daemon") as listener:
            status = path.stat()
            assert stat.S_IMODE(status.st_mode) == 0o606
            assert status.st_gid != os.getegid()
            assert listener.getblocking() is False
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
    finally:
        assert os.umask(before) == 0o077


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    open_unix_listener(str(path), 0o600, "").close()
    assert path.is_socket()
    with (
        open_unix_listener(str(path), 0o600, ""),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(str(path))


def a_living_socket(path: Path) -> socket.socket | None:
    return open_unix_listener(str(path), 0o600, "")


def a_file(path: Path) -> None:
    path.write_text("precious")


def somebody_elses_socket(path: Path) -> None:
    open_unix_listener(str(path), 0o600, "").close()
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        (a_living_socket, "a process listens there already: stop it"),
        (a_file, "there is something else already: remove it"),
        (somebody_elses_socket, "there is something else already: remove it"),
    ],
)
def test_what_is_not_our_dead_socket_stays(
    obstacle: Callable[[Path], socket.socket | None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    kept = obstacle(path)
    before = belongings(), path.lstat().st_ino
    with pytest.raises(OSError, match=message) as caught:
        open_unix_listener(str(path), 0o600, "")
    assert caught.value.errno == errno.EADDRINUSE
    assert (belongings(), path.lstat().st_ino) == before
    if kept is not None:
        kept.close()


@pytest.mark.parametrize(
    ("path", "group", "message"),
    [("/no/such/directory/s", "", "cannot listen on /no/such"), ("s", "no-such", "no group")],
)
def test_an_error_names_the_path(tmp_path: Path, path: str, group: str, message: str) -> None:
    before = belongings()
    with pytest.raises(OSError, match=message):
        open_unix_listener(str(tmp_path / path), 0o600, group)
    assert belongings() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["tcp:127.0.0.1:0", "tcp:localhost:0", "tcp:[::1]:0"])
def test_port_0_becomes_the_port_that_was_found(text: str) -> None:
    with open_stream_listener(listen_address(text), 0o600, "") as listener:
        address = address_of(listener)
        assert address.port != 0
        assert Address.parse(str(address)) == address
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        with socket.socket(family) as client:
            client.connect((address.host, address.port))


def test_a_port_that_is_taken_is_named() -> None:
    with open_stream_listener(listen_address("tcp:127.0.0.1:0"), 0o600, "") as listener:
        address = address_of(listener)
        before = belongings()
        with pytest.raises(OSError, match=f"cannot listen on {address}: Address already in use"):
            open_stream_listener(address, 0o600, "")
        assert belongings() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tcp:example.org:1", "is a name; to listen takes an IP address"),
        ("unix:relative", "the path must be absolute"),
        ("nonsense", "is not an address"),
    ],
)
def test_where_nobody_can_listen_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listen_address(text)


# -- from systemd ----------------------------------------------------------------------------

_TAKE_OVER = """
import json, os, sys
from postcopyd.daemon.sockets import take_over
os.environ["LISTEN_PID"] = sys.argv[1] or str(os.getpid())
try:
    taken, stored = take_over(os.environ)
except OSError as error:
    print(json.dumps(error.strerror))
else:
    print(json.dumps({
        "taken": {path: listener.fileno() for path, listener in taken.items()},
        "stored": stored,
        "blocking": [listener.getblocking() for listener in taken.values()],
        "inheritable": [listener.get_inheritable() for listener in taken.values()],
        "left": sorted(name for name in os.environ if name.startswith("LISTEN_")),
    }))
"""


def take_over_in_child(descriptors: list[int], process: str = "", names: str = "a:b") -> object:
    """Start a process as systemd does, with `descriptors` from 3 on; return what it took over."""

    def place() -> None:
        for number, descriptor in enumerate(copies):
            os.dup2(descriptor, 3 + number)

    copies = [os.dup(descriptor) for descriptor in descriptors]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TAKE_OVER, process],
            cwd=ROOT,
            env={"LISTEN_FDS": str(len(copies)), "LISTEN_FDNAMES": names},
            capture_output=True,
            preexec_fn=place,
            pass_fds=range(3, 3 + len(copies)),
            timeout=20,
            check=True,
        )
    finally:
        for copy in copies:
            os.close(copy)
    return json.loads(done.stdout)


def test_sockets_from_systemd_are_known_by_their_paths(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("control", "handoff")]
    listeners = [open_unix_listener(path, 0o600, "") for path in paths]
    try:
        assert take_over_in_child([listener.fileno() for listener in listeners]) == {
            "taken": {paths[0]: 3, paths[1]: 4},
            "stored": {},
            "blocking": [False, False],
            "inheritable": [False, False],
            "left": [],
        }
    finally:
        for listener in listeners:
            listener.close()


def test_what_a_predecessor_has_stored_is_known_by_its_name(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with open_unix_listener(path, 0o600, "") as listener, open("/dev/null") as stored:
        answer = take_over_in_child(
            [stored.fileno(), listener.fileno()], names="vm0/journal:postcopyd.socket"
        )
    assert isinstance(answer, dict)
    assert answer["stored"] == {"vm0/journal": 3}
    assert answer["taken"] == {path: 4}


def test_sockets_for_another_process_are_not_taken(tmp_path: Path) -> None:
    with open_unix_listener(str(tmp_path / "s"), 0o600, "") as listener:
        answer = take_over_in_child([listener.fileno()], process="1")
    assert isinstance(answer, dict)
    assert answer["taken"] == {}
    assert answer["left"] == []


def test_what_is_not_a_listening_unix_socket_is_refused() -> None:
    with socket.socket(socket.AF_INET) as not_unix:
        answer = take_over_in_child([not_unix.fileno()])
    assert str(answer).startswith("descriptor 3 from systemd is not a listening Unix stream socket")


def test_without_systemd_there_is_nothing_to_take() -> None:
    assert take_over({}) == ({}, {})
    assert take_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == ({}, {})
