"""Memory images: which files can be served, and where their holes are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from postcopyd.outgoing.image import BlockFile, ImageError, MemoryImage
from postcopyd.wire.messages import BlockEntry
from tests.outgoing.destination import no_descriptor_left

PAGE = 4096
HUGE = 2 << 20


@pytest.fixture
def file(tmp_path: Path) -> BlockFile:
    """A block of ten pages: page n is full of n."""
    path = tmp_path / "ram"
    path.write_bytes(b"".join(bytes((page,)) * PAGE for page in range(10)))
    return BlockFile("pc.ram", path)


def test_a_block_is_its_file(file: BlockFile) -> None:
    with MemoryImage([file]) as image:
        block = image.blocks[0]
        assert block.memory == file.path.read_bytes()
        assert block.memory.readonly
        assert block.entry == BlockEntry("pc.ram", 10 * PAGE, PAGE)
        assert (image.length, image.page_sizes, block.pages) == (10 * PAGE, PAGE, 10)


def test_a_block_is_a_piece_of_its_file_from_any_offset(file: BlockFile) -> None:
    with MemoryImage([replace(file, offset=3 * PAGE + 7, length=2 * PAGE)]) as image:
        start = 3 * PAGE + 7
        expected = file.path.read_bytes()[start : start + 2 * PAGE]
        assert image.blocks[0].memory == expected


def test_a_block_shows_what_is_written_to_its_file(file: BlockFile) -> None:
    with MemoryImage([file]) as image, file.path.open("r+b") as writer:
        writer.write(b"changed")
        writer.flush()
        assert bytes(image.blocks[0].memory[:7]) == b"changed"


def test_page_sizes_are_or_ed(file: BlockFile, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, HUGE)
    with MemoryImage([file, BlockFile("huge", huge, page_size=HUGE)]) as image:
        assert image.page_sizes == 0x201000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"length": PAGE + 1}, "length 4097 is not a multiple of its page size 4096: .* is 4096"),
        ({"length": 11 * PAGE}, "length 45056 is not there: .* has 40960 bytes from offset 0"),
        ({"offset": PAGE, "length": 10 * PAGE}, "has 36864 bytes from offset 4096"),
        ({"length": 0}, "length 0 is not there"),
        ({"length": -PAGE}, "length -4096 is not there"),
        ({"offset": 10 * PAGE}, "offset 40960 is outside .* of 40960 bytes"),
        ({"offset": -1}, "offset -1 is outside"),
        ({"offset": 1}, "length 40959 is not a multiple"),
        ({"page_size": HUGE}, "not a multiple of its page size 2097152"),
        ({"page_size": 2048}, "page size 2048 is not a power of two from 4096 on"),
        ({"page_size": 12288}, "page size 12288 is not a power of two"),
        ({"name": ""}, "must have 1 to 255 bytes"),
        ({"name": "n" * 256}, "must have 1 to 255 bytes"),
        ({"path": Path("/nowhere/ram")}, "cannot open /nowhere/ram: No such file"),
        ({"path": Path("/dev/null")}, "/dev/null is not a regular file"),
        ({"path": Path("/tmp")}, "/tmp is not a regular file"),
        ({"path": Path("/proc/self/status")}, "/proc/self/status is empty"),
    ],
)
def test_what_cannot_be_a_block_is_refused_and_nothing_stays_open(
    file: BlockFile, change: dict[str, object], complaint: str
) -> None:
    with no_descriptor_left(), pytest.raises(ImageError, match=complaint):
        MemoryImage([replace(file, name="first"), replace(file, **change)])


def test_two_blocks_of_one_name_are_refused(file: BlockFile) -> None:
    with pytest.raises(ImageError, match=r"two blocks have the name 'pc\.ram'"):
        MemoryImage([file, file])


def test_an_image_of_nothing_is_refused() -> None:
    with pytest.raises(ImageError, match="at least one block"):
        MemoryImage([])


def test_closing_releases_all_and_may_be_repeated(file: BlockFile) -> None:
    with no_descriptor_left():
        image = MemoryImage([file, replace(file, name="again")])
        image.close()
        image.close()


def test_an_error_inside_is_not_hidden_by_a_view_that_it_holds(file: BlockFile) -> None:
    with pytest.raises(KeyError, match="the real one"), MemoryImage([file]) as image:
        raise KeyError("the real one", image.blocks[0].memory[:PAGE])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=st.lists(st.booleans(), min_size=1, max_size=64),
    first=st.integers(0, 20),
    shift=st.sampled_from([0, 1, 2048]),
)
def test_holes_are_known_and_never_hide_anything(
    tmp_path: Path, written: list[bool], first: int, shift: int
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(len(written) * PAGE)
        for page, is_written in enumerate(written):
            if is_written:
                file.seek(page * PAGE)
                file.write(b"x" * PAGE)
    start = min(first, len(written) - 1) * PAGE + shift
    length = (len(written) * PAGE - start) // PAGE * PAGE
    if not length:
        return
    with MemoryImage([BlockFile("ram", path, offset=start, length=length)]) as image:
        block = image.blocks[0]
        holes = block.holes()
        assert len(holes) == length // PAGE
        empty = [not any(block.memory[offset : offset + PAGE]) for offset in range(0, length, PAGE)]
        assert [bool(hole) for hole in holes] == empty


def test_a_hole_without_an_end_is_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with MemoryImage([BlockFile("ram", path, offset=1 << 39, length=1 << 30)]) as image:
        assert image.blocks[0].holes().all()
