"""What both sides must agree on before any page is taken."""

from __future__ import annotations

from postcopyd.incoming.collecting import Collection
from postcopyd.incoming.vmm import FedBlock
from postcopyd.kernel.memory import HOST_PAGE_SIZE
from postcopyd.ram.block import BlockTable, RamBlock
from postcopyd.wire.errors import ProtocolError
from postcopyd.wire.messages import Advise, BlockEntry, BlockList


def check_advise(
    message: Advise, blocks: BlockTable, fed: Collection, return_path_open: bool
) -> None:
    """Compare the source's page sizes with the VMM's.

    :raise ProtocolError: if they differ, or there is no way to ask for a page.
    """
    if not return_path_open:
        raise ProtocolError("ADVISE came before a return path was opened", None)
    if message.target_page_size != HOST_PAGE_SIZE:
        raise ProtocolError(
            f"the source's target pages have {message.target_page_size} bytes, "
            f"this host's pages {HOST_PAGE_SIZE}",
            None,
        )
    # What is fed is ROMs and video memory, on pages of the common size.
    page_sizes = blocks.page_sizes | (HOST_PAGE_SIZE if fed.blocks else 0)
    if message.page_sizes != page_sizes:
        raise ProtocolError(
            f"the source's host page sizes add up to {message.page_sizes:#x}, "
            f"the VMM's to {page_sizes:#x}: back the memory with pages of the same size on both "
            "sides",
            None,
        )


def check_block_list(message: BlockList, blocks: BlockTable, fed: Collection) -> None:
    """Compare the source's RAM blocks with the VMM's: same names, lengths and page sizes.

    :raise ProtocolError: naming the first block that differs, and how.
    """
    for entry in message.blocks:
        block = blocks.by_name(entry.name)
        if block is not None:
            _check_watched(entry, block)
        elif entry.name in fed:
            _check_fed(entry, fed.blocks[entry.name])
        else:
            names = ", ".join([*(block.name for block in blocks), *fed.blocks])
            raise ProtocolError(
                f"the source has a RAM block {entry.name!r}, the VMM has not (it has: {names})",
                None,
            )
    named = {entry.name for entry in message.blocks}
    for name in (*(block.name for block in blocks), *fed.blocks):
        if name not in named:
            raise ProtocolError(f"the VMM has a RAM block {name!r}, the source has not", None)


def _check_watched(entry: BlockEntry, block: RamBlock) -> None:
    if entry.length != block.length:
        raise ProtocolError(
            f"RAM block {entry.name!r} has {entry.length:#x} bytes at the source and "
            f"{block.length:#x} in the VMM",
            None,
        )
    if entry.page_size != block.page_size:
        raise ProtocolError(
            f"RAM block {entry.name!r} has host pages of {entry.page_size:#x} bytes at the "
            f"source and {block.page_size:#x} in the VMM",
            None,
        )


def _check_fed(entry: BlockEntry, block: FedBlock) -> None:
    resizable = block.maximum != block.length
    if entry.length > block.maximum or (entry.length != block.length and not resizable):
        raise ProtocolError(
            f"RAM block {entry.name!r} has {entry.length:#x} bytes at the source and "
            f"{block.length:#x} in the VMM{f', {block.maximum:#x} at most' if resizable else ''}",
            None,
        )
    if entry.page_size != HOST_PAGE_SIZE:
        raise ProtocolError(
            f"RAM block {entry.name!r} has host pages of {entry.page_size:#x} bytes at the source "
            f"and {HOST_PAGE_SIZE:#x} in the VMM",
            None,
        )
