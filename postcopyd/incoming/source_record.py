"""The source in the journal: how it is written down, and what a successor makes of that."""

from __future__ import annotations

import os

from postcopyd.incoming.journal import SourceBlockRecord, SourceRecord
from postcopyd.incoming.loading import Loading
from postcopyd.wire import stream_writer
from postcopyd.wire.messages import BlockEntry, BlockList, Configuration, Package
from postcopyd.wire.stream_reader import ResumeState, StreamReader


def record_of(loading: Loading, resume: ResumeState) -> SourceRecord:
    """Return what the journal is to say of the source, once its package has come."""
    assert loading.package is not None
    return SourceRecord(
        configuration=loading.configuration.raw,
        blocks=tuple(
            SourceBlockRecord(block.name, block.length, block.page_size) for block in resume.blocks
        ),
        section_id=resume.section_id,
        target_page_size=resume.target_page_size,
        package_length=len(loading.package.data),
    )


def configuration_of(source: SourceRecord) -> Configuration:
    """Return what it began with.

    :raise ProtocolError: if that is wrong.
    :raise StopIteration: if it is not whole.
    """
    # Where it ends shows only in what follows.
    told = StreamReader().feed(source.configuration + stream_writer.open_return_path())
    configuration = next(told)
    assert isinstance(configuration, Configuration)
    return configuration


def block_list_of(source: SourceRecord) -> BlockList:
    """Return its RAM blocks."""
    blocks = tuple(BlockEntry(block.name, block.length, block.page_size) for block in source.blocks)
    return BlockList(sum(block.length for block in blocks), blocks)


def package_of(source: SourceRecord, file: int) -> Package:
    """Return its device package, which `file` has.

    :raise ValueError: if it is not whole.
    """
    length = source.package_length
    if length > os.fstat(file).st_size:
        raise ValueError(f"its device package of {length} bytes is not whole")
    return Package(os.pread(file, length, 0))
