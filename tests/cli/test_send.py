"""`postcopyctl send`, from its arguments to its exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from postcopyd.cli import send
from postcopyd.cli.send_progress import ProgressBar, ProgressLines
from postcopyd.outgoing.image import BlockFile
from postcopyd.outgoing.report import Account, Phase
from postcopyd.wire.device_state import unwrap_device_state
from postcopyd.wire.stream_writer import device_section
from tests.cutting_relay import Cut, CuttingRelay
from tests.incoming.engine import DEVICE_STATE, MACHINE
from tests.incoming.engine import image as random_image
from tests.outgoing.destination import LIMIT, Destination
from tests.outgoing.real_destination import RealDestination

PAGE = 4096
MEMORY = b"".join(page.to_bytes(8, "big") * 512 for page in range(1, 101)) + bytes(20 * PAGE)

PAGES = 64
IN_THE_PAGES = 100_000
"""Bytes of a stream behind its package, and before its end."""
CONTENT = random_image(PAGES)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="postcopyctl")
    send.register(parser.add_subparsers())
    return parser.parse_args(["send", *arguments])


def run(*arguments: str) -> int:
    namespace = parse(*arguments)
    status = namespace.func(namespace)
    assert isinstance(status, int)
    return status


class Listener:
    """A destination in a thread and an event loop of its own."""

    def __init__(self, server: socket.socket, address: str) -> None:
        self.address = address
        self.destination: Destination | None = None
        self.status = 0
        self._server = server
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self._server.settimeout(LIMIT)
        connection, _ = self._server.accept()
        with connection:
            asyncio.run(self._receive(connection))

    async def _receive(self, connection: socket.socket) -> None:
        self.destination = Destination(connection)
        self.destination.confirm = not self.status
        await self.destination.run()
        if self.status:
            self.destination.say(self.destination.writer.shut(self.status))

    def received(self) -> Destination:
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()
        assert self.destination is not None
        return self.destination


@pytest.fixture(params=["tcp", "unix"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listener]:
    """A destination that waits for one migration."""
    if request.param == "tcp":
        server = socket.create_server(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "stream.sock"))
        server.listen()
        address = f"unix:{tmp_path / 'stream.sock'}"
    with server:
        yield Listener(server, address)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """100 pages with content, 20 without."""
    path = tmp_path / "ram.img"
    path.write_bytes(MEMORY)
    return path


def test_an_image_arrives_and_the_summary_says_what_was_sent(
    listener: Listener, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = tmp_path / "devices"
    devices.write_bytes(device_section(3, "cpu", b"registers"))
    status = run(
        *("--to", listener.address, "--block", f"pc.ram={image},length=400K"),
        *("--block", f"rom={image},offset=400K", "--device-state", str(devices)),
        *("--machine", "pc-q35-7.2", "--precopy-passes", "1", "--max-bandwidth", "100M", "--json"),
    )
    destination = listener.received()
    assert status == 0
    assert destination.contents() == {"pc.ram": MEMORY[: 400 << 10], "rom": MEMORY[400 << 10 :]}
    assert destination.device_state == devices.read_bytes()
    assert destination.machine == "pc-q35-7.2"
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert 0 < summary.pop("switchover_seconds") < summary.pop("seconds") < LIMIT
    assert summary == {
        "completed": True,
        "failure": None,
        "bytes": len(destination.stream),
        "pages": 100,
        "zero_pages": 20,
        "precopy_passes": 1,
        "postcopy_bytes": 0,
        "requests": 0,
        "requests_answered": 0,
        "reconnects": 0,
        "pages_again": 0,
    }
    assert "pre-copy pass 1: 0 B of 480 KiB\n" in captured.err
    assert captured.err.endswith("completed, 0 requests answered\n")


def test_without_json_there_is_one_line_about_the_result(
    listener: Listener, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--to", listener.address, "--block", f"ram={image}") == 0
    listener.received()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "100 pages, 20 zero pages, 0 requests answered" in out


def test_quiet_says_nothing(
    listener: Listener, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--to", listener.address, "--block", f"ram={image}", "--quiet") == 0
    listener.received()
    assert capsys.readouterr() == ("", "")


def test_a_failing_destination_is_exit_status_1_and_one_message(
    listener: Listener, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listener.status = 1
    status = run("--to", listener.address, "--block", f"ram={image}", "--json", "--quiet")
    listener.received()
    assert status == 1
    out, err = capsys.readouterr()
    assert err.startswith("postcopyctl send: the destination reports failure (SHUT with status 1)")
    assert err.count("\n") == 1
    summary = json.loads(out)
    assert not summary["completed"]
    assert summary["failure"] in err
    assert summary["pages"] == 100


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("{image},length=5000", "length 5000 is not a multiple of its page size 4096"),
        ("{image},page-size=2M", "is not a multiple of its page size 2097152"),
        ("{image},offset=1G", "offset 1073741824 is outside"),
        ("{image}.missing", "No such file or directory"),
        ("/dev/null", "/dev/null is not a regular file"),
    ],
)
def test_a_file_that_cannot_be_served_is_one_message_that_names_the_block(
    image: Path, block: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--to", "tcp:127.0.0.1:1", "--block", "ram=" + block.format(image=image)) == 1
    err = capsys.readouterr().err
    assert err.startswith("postcopyctl send: block 'ram': ")
    assert complaint in err
    assert err.count("\n") == 1


def test_two_blocks_of_one_name_are_one_message(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = ("--block", f"ram={image}")
    assert run("--to", "tcp:127.0.0.1:1", *block, *block) == 1
    assert capsys.readouterr().err == "postcopyctl send: two blocks have the name 'ram'\n"


def test_a_device_state_of_any_form_can_be_unwrapped_at_the_destination(
    listener: Listener, image: Path, tmp_path: Path
) -> None:
    devices = tmp_path / "devices"
    devices.write_bytes(b"raw registers")
    block = f"ram={image}"
    assert run("--to", listener.address, "--block", block, "--device-state", str(devices)) == 0
    state = listener.received().device_state
    assert state is not None
    assert unwrap_device_state(state) == b"raw registers"


def test_a_device_state_that_is_not_there_is_one_message(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing")
    arguments = ("--to", "tcp:127.0.0.1:1", "--block", f"ram={image}", "--device-state", missing)
    assert run(*arguments) == 1
    assert capsys.readouterr().err == f"postcopyctl send: {missing}: No such file or directory\n"


def test_a_destination_that_is_not_there_is_one_message(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
    assert run("--to", address, "--block", f"ram={image}", "--quiet", "--json") == 1
    out, err = capsys.readouterr()
    assert err == f"postcopyctl send: cannot connect to {address}: Connection refused\n"
    assert json.loads(out)["failure"] in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--block", "a=b"], "required: --to"),
        (["--to", "tcp:h:1"], "required: --block"),
        (["--to", "host:1", "--block", "a=b"], "write tcp:HOST:PORT"),
        (["--to", "tcp:h:1", "--block", "a"], "'a' is not a block: write NAME=FILE"),
        (["--to", "tcp:h:1", "--block", "=b"], "is not a block"),
        (["--to", "tcp:h:1", "--block", "a=b,ofset=1"], "'ofset' of block 'a' is not one of"),
        (["--to", "tcp:h:1", "--block", "a=b,offset=x"], "offset of block 'a': 'x' is not a size"),
        (["--to", "tcp:h:1", "--block", "a=b,length=1,length=2"], "'length' .* given twice"),
        (["--to", "tcp:h:1", "--block", "a=b", "--max-bandwidth", "0"], "sends nothing"),
        (["--to", "tcp:h:1", "--block", "a=b", "--max-bandwidth", "fast"], "'fast' is not a size"),
        (["--to", "tcp:h:1", "--block", "a=b", "--precopy-passes", "-1"], "whole number from 0"),
        (["--to", "tcp:h:1", "--block", "a=b", "--retry-for", "-1"], "not a number of seconds"),
        (["--to", "tcp:h:1", "--block", "a=b", "--retry-for", "inf"], "not a number of seconds"),
        (["--to", "tcp:h:1", "--block", "a=b", "--break-after", "0.5"], "1 to 3600 are possible"),
        (["--to", "tcp:h:1", "--block", "a=b", "--break-after", "soon"], "not a number of seconds"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_says_what_is_right(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    before, _, behind = complaint.partition(" .* ")
    assert before in err and behind in err


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("pc.ram=/a/b", BlockFile("pc.ram", Path("/a/b"))),
        ("a=b=c", BlockFile("a", Path("b=c"))),
        ("a=x,,y,offset=1", BlockFile("a", Path("x,y"), offset=1)),
        (
            "0000:00:02.0/vga.vram=f,page-size=2M,length=1G,offset=64K",
            BlockFile("0000:00:02.0/vga.vram", Path("f"), 64 << 10, 1 << 30, 2 << 20),
        ),
    ],
)
def test_a_block_is_read_as_it_is_written(text: str, block: BlockFile) -> None:
    assert send.parse_block(text) == block


@contextlib.asynccontextmanager
async def sending(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the command in a process of its own."""
    program = "import sys; from tests.cli.test_send import run; sys.exit(run(*sys.argv[1:]))"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        async with asyncio.timeout(LIMIT):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_an_interrupt_is_exit_status_1_and_leaves_nothing_behind(
    image: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        arguments = ("--block", f"ram={image}", "--quiet", "--max-bandwidth", "1")
        async with sending("--to", address, *arguments) as process:
            connection, _ = await asyncio.get_running_loop().sock_accept(server)
            with connection:
                destination = Destination(connection)
                await destination.receive_until(lambda: destination.device_state is not None)
                process.send_signal(signal.SIGINT)
                _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode() == (
        "postcopyctl send: interrupted: cancelled "
        "(phase postcopy; the package had been sent: the guest must not go on here)\n"
    )


def to(relay: CuttingRelay, directory: Path) -> list[str]:
    """Arguments that send `CONTENT` through `relay` to a real destination, not too fast."""
    (directory / "ram").write_bytes(CONTENT)
    (directory / "devices").write_bytes(DEVICE_STATE)
    return [
        *("--to", f"tcp:127.0.0.1:{relay.port}", "--block", f"pc.ram={directory / 'ram'}"),
        *("--device-state", str(directory / "devices"), "--machine", MACHINE),
        *("--max-bandwidth", "2M"),
    ]


async def test_a_broken_connection_is_told_and_mended(tmp_path: Path) -> None:
    cuts = [Cut(forward=IN_THE_PAGES), Cut(forward=20_000)]
    async with (
        RealDestination(PAGES).listening() as destination,
        CuttingRelay(destination.port, cuts).listening() as relay,
        sending(*to(relay, tmp_path), "--json") as process,
    ):
        out, err = await process.communicate()
        await destination.migration.wait()
        assert await destination.vmm.guest.content() == CONTENT
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["completed"]
    assert summary["reconnects"] == 2
    assert summary["pages"] + summary["zero_pages"] == PAGES + summary["pages_again"]
    lines = err.decode().splitlines()
    assert "the connection was lost: Connection reset by peer; trying to come back at once" in lines
    assert "connected again, asking what has arrived" in lines


async def test_it_goes_on_when_nobody_reads_its_progress_any_more(tmp_path: Path) -> None:
    cuts = [Cut(forward=IN_THE_PAGES), Cut(forward=20_000)]
    async with (
        RealDestination(PAGES).listening() as destination,
        CuttingRelay(destination.port, cuts).listening() as relay,
        sending(*to(relay, tmp_path), "--json") as process,
    ):
        assert process.stderr is not None
        assert process.stdout is not None
        while b"post-copy" not in await process.stderr.readline():
            pass
        reader = process._transport.get_pipe_transport(2)  # type: ignore[attr-defined]
        reader.close()
        out = await process.stdout.read()
        await process.wait()
        await destination.migration.wait()
        assert await destination.vmm.guest.content() == CONTENT
    assert process.returncode == 0
    assert json.loads(out)["completed"]
    assert json.loads(out)["reconnects"] == 2


async def test_whoever_interrupts_it_while_it_is_coming_back_is_told_where_it_stands(
    tmp_path: Path,
) -> None:
    cuts = [Cut(forward=IN_THE_PAGES), *[Cut(forward=0)] * 1000]
    async with (
        RealDestination(PAGES).listening() as destination,
        CuttingRelay(destination.port, cuts).listening() as relay,
        sending(*to(relay, tmp_path)) as process,
    ):
        assert process.stderr is not None
        while b"trying to come back" not in await process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == (
        "postcopyctl send: interrupted: cancelled (phase reconnecting, broken in postcopy; "
        "the package had been sent: the guest must not go on here)"
    )


async def test_when_the_time_to_come_back_is_over_it_is_exit_status_1(tmp_path: Path) -> None:
    cuts = [Cut(forward=IN_THE_PAGES), *[Cut(forward=0)] * 1000]
    async with (
        RealDestination(PAGES).listening() as destination,
        CuttingRelay(destination.port, cuts).listening() as relay,
        sending(*to(relay, tmp_path), "--retry-for", "0.2", "--quiet") as process,
    ):
        _, err = await process.communicate()
    assert process.returncode == 1
    assert err.startswith(b"postcopyctl send: the connection was lost: Connection reset by peer; ")
    assert b"no way back in 0." in err
    assert err.count(b"\n") == 1


def account(phase: Phase, done: int, total: int) -> Account:
    account = Account(lambda: 0.0)
    account.enter(phase, total)
    account.phase_bytes = done
    return account


def test_lines_are_written_for_each_phase_and_each_quarter_of_it() -> None:
    output = io.StringIO()
    lines = ProgressLines(output)
    lines(account(Phase.SETUP, 0, 0).report())
    for done in range(401):
        lines(account(Phase.POSTCOPY, done * 1024, 400 * 1024).report())
    lines(account(Phase.COMPLETED, 0, 0).report())
    lines.close()
    assert output.getvalue().splitlines() == [
        "connected",
        "post-copy: 0 B of 400 KiB, 0 requests answered",
        "post-copy: 100 KiB of 400 KiB, 0 requests answered",
        "post-copy: 200 KiB of 400 KiB, 0 requests answered",
        "post-copy: 300 KiB of 400 KiB, 0 requests answered",
        "post-copy: 400 KiB of 400 KiB, 0 requests answered",
        "completed, 0 requests answered",
    ]


def test_one_line_tells_of_all_tries_that_meet_the_same() -> None:
    output = io.StringIO()
    lines = ProgressLines(output)
    broken = account(Phase.POSTCOPY, 100, 400)
    for why in ("the network is down", "nobody listens", "the network is down"):
        for seconds in (0.0, 0.05, 0.1):
            broken.broke(why, seconds)
            broken.enter(Phase.RECONNECTING)
            lines(broken.report())
    broken.retry_seconds = None
    lines(broken.report())
    broken.enter(Phase.POSTCOPY, 300)
    lines(broken.report())
    broken.broke("the network is down", 0.0)
    broken.enter(Phase.FAILED)
    lines(broken.report())
    assert output.getvalue().splitlines() == [
        "the network is down; trying to come back at once",
        "nobody listens; trying to come back at once",
        "the network is down; trying to come back at once",
        "connected again, asking what has arrived",
        "post-copy: 0 B of 300 B, 0 requests answered",
        "failed",
    ]


def test_on_a_terminal_there_is_a_bar() -> None:
    output = io.StringIO()
    bar = ProgressBar(Console(file=output, force_terminal=True, width=100))
    bar(account(Phase.PRECOPY, 100, 400).report())
    bar(account(Phase.POSTCOPY, 400, 400).report())
    bar.close()
    assert "pre-copy pass 1: 100 B of 400 B" in output.getvalue()
    assert "━" in output.getvalue()
    assert output.getvalue().endswith("\x1b[?25h"), "the cursor is still hidden"
