"""Opening, handshake, registering: on the kernel that the tests run on."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import threading
from array import array
from collections.abc import Callable
from threading import Thread

import pytest

from postcopyd.kernel import memory_file
from postcopyd.kernel.memory import Mapping, advise
from postcopyd.kernel.userfaultfd import (
    PRESENT,
    Feature,
    Operation,
    RegisterMode,
    Userfaultfd,
    UserfaultfdUnsupported,
    features_of,
    is_userfaultfd,
)
from tests.kernel.watched import PAGE, Watched
from tests.support import GuestRead, libc, run_python, wait_until

# -- opening and closing -------------------------------------------------------------------------


@pytest.mark.parametrize("user_mode_only", [False, True])
def test_a_new_one_is_close_on_exec_and_non_blocking(user_mode_only: bool) -> None:
    with Userfaultfd.open(user_mode_only=user_mode_only) as userfaultfd:
        descriptor = userfaultfd.fileno()
        assert is_userfaultfd(descriptor)
        assert not os.get_inheritable(descriptor)
        assert not os.get_blocking(descriptor)


def test_closing_twice_closes_once() -> None:
    userfaultfd = Userfaultfd.open()
    descriptor = userfaultfd.fileno()
    userfaultfd.close()
    other = os.open("/dev/null", os.O_RDONLY)
    assert other == descriptor, "the number must have been taken anew"
    userfaultfd.close()
    os.close(other)
    assert userfaultfd.closed
    assert userfaultfd.fileno() == -1


def test_user_mode_only_does_not_wait_for_the_kernels_own_accesses() -> None:
    with Mapping.anonymous(PAGE) as mapping, Userfaultfd.open(user_mode_only=True) as userfaultfd:
        userfaultfd.handshake(Feature(0))
        userfaultfd.register(mapping.address, PAGE, RegisterMode.MISSING, Operation.COPY)
        reading, writing = os.pipe()
        with pytest.raises(OSError, match="Bad address"):
            os.write(writing, mapping.view)
        os.close(reading)
        os.close(writing)


# A user with no rights, and what a seccomp filter of a container forbids besides.
WITHOUT_RIGHTS = """
import errno, sys
from postcopyd.kernel.userfaultfd import Feature, Userfaultfd, UserfaultfdUnavailable
from tests.kernel.rights import drop_rights, forbid_userfaultfd
if sys.argv[1] == "user":
    drop_rights()
elif sys.argv[1] == "user, seccomp":
    drop_rights()
    forbid_userfaultfd(errno.EPERM)
else:
    forbid_userfaultfd(int(sys.argv[1]))
for user_mode_only in (False, True):
    try:
        with Userfaultfd.open(user_mode_only=user_mode_only) as userfaultfd:
            userfaultfd.handshake(Feature(0))
            print("open")
    except UserfaultfdUnavailable as error:
        print(error.errno, error.strerror)
"""


def test_a_user_without_rights_is_told_both_ways_and_what_to_do() -> None:
    both, user_mode_only = run_python(WITHOUT_RIGHTS, "user").splitlines()
    assert both == (
        f"{errno.EPERM} no userfaultfd: userfaultfd(2): Operation not permitted; "
        "/dev/userfaultfd: Permission denied. Run as root, give this user access to "
        "/dev/userfaultfd, or set sysctl vm.unprivileged_userfaultfd=1"
    )
    assert user_mode_only == "open"


def test_where_a_seccomp_filter_forbids_the_system_call_the_filter_is_named() -> None:
    _, user_mode_only = run_python(WITHOUT_RIGHTS, "user, seccomp").splitlines()
    assert "seccomp" in user_mode_only


def test_where_the_system_call_fails_the_device_is_used() -> None:
    assert run_python(WITHOUT_RIGHTS, str(errno.ENOSYS)).splitlines() == ["open", "open"]


def test_no_descriptor_to_spare_is_named() -> None:
    code = """
import resource
from postcopyd.kernel.userfaultfd import Userfaultfd, UserfaultfdUnavailable
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    Userfaultfd.open()
except UserfaultfdUnavailable as error:
    print(error)
"""
    assert "RLIMIT_NOFILE" in run_python(code)


# -- handshake -----------------------------------------------------------------------------------


def test_what_was_asked_for_is_enabled_and_no_more() -> None:
    wanted = Feature.THREAD_ID | Feature.EVENT_REMOVE | Feature.MISSING_SHMEM
    with Userfaultfd.open() as userfaultfd:
        assert features_of(userfaultfd.fileno()) == Feature(0)
        offered = userfaultfd.handshake(wanted)
        assert wanted in offered
        assert offered == Userfaultfd.offered()
        assert features_of(userfaultfd.fileno()) == wanted
        assert features_of(userfaultfd.fileno(), os.getpid()) == wanted


def test_what_the_kernel_does_not_have_is_named_and_the_handshake_can_still_be_done() -> None:
    unknown = Feature(1 << 40)
    with Userfaultfd.open() as userfaultfd:
        with pytest.raises(UserfaultfdUnsupported, match="has no 0x10000000000: "):
            userfaultfd.handshake(unknown | Feature.THREAD_ID)
        userfaultfd.handshake(Feature.THREAD_ID)


def test_a_second_handshake_is_an_error() -> None:
    with Userfaultfd.open() as userfaultfd:
        userfaultfd.handshake(Feature(0))
        with pytest.raises(OSError, match=r"UFFDIO_API with features .*: Invalid argument"):
            userfaultfd.handshake(Feature(0))


def test_without_a_handshake_nothing_can_be_read() -> None:
    with Userfaultfd.open() as userfaultfd, pytest.raises(OSError, match="Invalid argument"):
        userfaultfd.read_events()


def test_what_is_no_userfaultfd_is_told_apart() -> None:
    reading, writing = os.pipe()
    assert not is_userfaultfd(reading)
    assert features_of(reading) is None
    os.close(reading)
    os.close(writing)
    with pytest.raises(FileNotFoundError):
        is_userfaultfd(reading)
    with pytest.raises(FileNotFoundError):
        features_of(reading)


def test_on_another_descriptor_every_request_is_an_error_that_names_it() -> None:
    with Userfaultfd(os.open("/dev/null", os.O_RDWR)) as other:
        requests: dict[str, Callable[[], object]] = {
            "UFFDIO_API": lambda: other.handshake(Feature(0)),
            "UFFDIO_REGISTER": lambda: other.register(
                PAGE, PAGE, RegisterMode.MISSING, Operation.COPY
            ),
            "UFFDIO_UNREGISTER": lambda: other.unregister(PAGE, PAGE),
            "UFFDIO_WAKE": lambda: other.wake(PAGE, PAGE),
            "UFFDIO_WRITEPROTECT": lambda: other.writeprotect(PAGE, PAGE, True),
            "": lambda: other.copy(PAGE, PAGE, PAGE),
        }
        for name, request in requests.items():
            with pytest.raises(OSError, match=f"{name}.*Inappropriate ioctl"):
                request()


# -- registering ---------------------------------------------------------------------------------


def test_anonymous_memory_allows_all_that_post_copy_needs() -> None:
    with Watched.anonymous() as watched:
        assert watched.operations >= Operation.COPY | Operation.ZEROPAGE | Operation.WAKE


def test_an_operation_that_the_memory_does_not_allow_is_named() -> None:
    with (
        Watched.anonymous() as watched,
        pytest.raises(UserfaultfdUnsupported, match=r"does not allow CONTINUE"),
    ):
        watched.userfaultfd.register(
            watched.address,
            watched.length,
            RegisterMode.MISSING,
            Operation.COPY | Operation.CONTINUE,
        )


def test_memory_that_cannot_be_registered_is_an_error_that_says_where() -> None:
    with Mapping.anonymous(PAGE) as mapping, Userfaultfd.open() as userfaultfd:
        userfaultfd.handshake(Feature(0))
        with pytest.raises(OSError, match=rf"{mapping.address:#x}\+0x1001 .*Invalid argument"):
            userfaultfd.register(mapping.address, PAGE + 1, RegisterMode.MISSING, Operation.COPY)
        with Watched(mapping), pytest.raises(OSError, match="busy"):
            userfaultfd.register(mapping.address, PAGE, RegisterMode.MISSING, Operation.COPY)


def test_a_memory_file_that_may_only_be_read_cannot_be_registered() -> None:
    descriptor = memory_file.create("ram", PAGE)
    reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    with (
        Mapping.of_file(reading, PAGE, writable=False) as mapping,
        Userfaultfd.open() as userfaultfd,
    ):
        userfaultfd.handshake(Feature(0))
        with pytest.raises(PermissionError):
            userfaultfd.register(mapping.address, PAGE, RegisterMode.MISSING, Operation.COPY)
    os.close(reading)
    os.close(descriptor)


def test_registering_again_leaves_what_is_placed_alone() -> None:
    with Watched.anonymous() as watched:
        watched.copy(0)
        watched.userfaultfd.register(
            watched.address, watched.length, RegisterMode.MISSING, Operation.COPY
        )
        assert watched.copy(0) == PRESENT


def test_after_unregistering_who_waited_reads_zeros() -> None:
    with Watched.anonymous() as watched:
        guest = GuestRead(watched.page(2))
        watched.event()
        watched.userfaultfd.unregister(watched.address, watched.length)
        assert guest.data() == bytes(8)


def test_unregistering_leaves_nobody_behind_whose_fault_is_on_its_way() -> None:
    """The kernel alone leaves one about every thousand rounds of these, so 5000 tell."""
    rounds = array("q", bytes(8 * 4))
    stop = threading.Event()

    def touch(place: int) -> None:
        while not stop.is_set():
            libc.memcmp(ctypes.c_void_p(mapping.address), bytes(8), ctypes.c_size_t(8))
            rounds[place] += 1

    def gone_on_since(before: list[int]) -> Callable[[], bool]:
        return lambda: all(now > then for now, then in zip(rounds, before, strict=True))

    with Mapping.anonymous(PAGE) as mapping, Userfaultfd.open() as userfaultfd:
        userfaultfd.handshake(Feature(0))
        threads = [Thread(target=touch, args=(place,)) for place in range(len(rounds))]
        for thread in threads:
            thread.start()
        try:
            for _ in range(100):
                for _ in range(50):
                    userfaultfd.register(
                        mapping.address, PAGE, RegisterMode.MISSING, Operation.COPY
                    )
                    advise(mapping.address, PAGE, mmap.MADV_DONTNEED)
                    userfaultfd.unregister(mapping.address, PAGE)
                wait_until(gone_on_since(list(rounds)))
        finally:
            stop.set()
            userfaultfd.wake(mapping.address, PAGE)
            for thread in threads:
                thread.join(10)


def test_unregistering_what_is_not_mapped_is_an_error_that_says_where() -> None:
    with Userfaultfd.open() as userfaultfd:
        userfaultfd.handshake(Feature(0))
        with pytest.raises(OSError, match=r"UFFDIO_UNREGISTER of 0x1000\+0x1000: "):
            userfaultfd.unregister(PAGE, PAGE)


def test_the_kernel_registers_a_range_that_is_mapped_only_in_part() -> None:
    """So a registration alone does not prove that memory is there."""
    with Mapping.anonymous(4 * PAGE) as mapping, Userfaultfd.open() as userfaultfd:
        userfaultfd.handshake(Feature(0))
        assert libc.munmap(ctypes.c_void_p(mapping.address + PAGE), ctypes.c_size_t(PAGE)) == 0
        userfaultfd.register(mapping.address, 4 * PAGE, RegisterMode.MISSING, Operation.COPY)


def test_it_polls_readable_only_while_an_event_waits() -> None:
    with Watched.anonymous() as watched:
        poll = select.poll()
        poll.register(watched.userfaultfd.fileno(), select.POLLIN)
        assert poll.poll(0) == []
        guest = GuestRead(watched.page(0))
        watched.event()
        assert poll.poll(0) == []
        watched.copy(0)
        assert guest.data() == watched.content(0)[:8]
