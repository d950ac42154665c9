"""What is here goes over to the memory of another VMM, in the place of one that has not loaded.

Who is killed in the middle must leave one account that is right: that of the VMM before, until all
has been copied, and from then on that of the new one. Between the two stands the journal, so what
is copied changes nothing that both have in common, and what has to change then is right, or does
not matter, for whichever of the two the journal names.
"""

from __future__ import annotations

from postcopyd.incoming.holdings import Holdings, table_of
from postcopyd.incoming.vmm import GuestMemory


def check_fits(holdings: Holdings, memory: GuestMemory) -> None:
    """Check that another VMM has the same blocks in the same order.

    :raise ValueError: naming the first difference.
    """
    theirs = {block.name: block for block in memory.blocks}
    for block in holdings.blocks:
        other = theirs.pop(block.name, None)
        if other is None:
            raise ValueError(f"it has no RAM block {block.name!r}")
        if (other.length, other.page_size) != (block.length, block.page_size):
            raise ValueError(
                f"its RAM block {block.name!r} has {other.length:#x} bytes in pages of "
                f"{other.page_size:#x}, not {block.length:#x} in pages of {block.page_size:#x}"
            )
    if theirs:
        raise ValueError(f"it has a RAM block {next(iter(theirs))!r} more")
    # A successor finds account and memory files by their place.
    order = [block.name for block in holdings.blocks]
    if [block.name for block in memory.blocks] != order:
        raise ValueError(f"its RAM blocks are in another order than {', '.join(order)}")


class Move:
    """Takes what `holdings` has to the memory of another VMM, which fits and has not run."""

    def __init__(self, holdings: Holdings, memory: GuestMemory) -> None:
        """Open what takes it. In the event loop: what a successor needs is kept from there.

        :raise OSError: if there is no memory for it.
        """
        self._holdings = holdings
        theirs = {block.name: block for block in memory.blocks}
        handed = [theirs[block.name] for block in holdings.blocks]
        self._blocks = table_of(handed)
        self._before = list(holdings.stages)
        self._stages = list(self._before)
        try:
            for index, (block, other) in enumerate(zip(self._blocks, handed, strict=True)):
                # Private memory is filled from the staging, whichever VMM it is.
                if self._before[index].direct or other.memory_file is not None:
                    self._stages[index] = holdings.new_stage(block, other)
        except BaseException:
            self.close()
            raise

    def copy(self) -> None:
        """Copy everything; the account still is that of the VMM before.

        Takes as long as copying does; may run in another thread, while nobody else is at it.

        :raise OSError: if the new memory cannot be written.
        """
        for stage, before in zip(self._stages, self._before, strict=True):
            if stage is not before:
                stage.take_over(before)

    def prepare(self) -> None:
        """Have the account be right for private memory, too. When all is copied.

        In a VMM's memory file nothing is staged, and nobody asks there.
        """
        for stage, before in zip(self._stages, self._before, strict=True):
            if stage is not before and not stage.direct:
                stage.all_is_staged()

    def take_effect(self) -> None:
        """Go on with the new memory, which the journal names now."""
        for stage in self._stages:
            if stage.direct:
                stage.nothing_is_staged()
        self._holdings.blocks, self._holdings.stages = self._blocks, self._stages

    def close(self) -> None:
        """Release what is not in use. Idempotent."""
        for stage in {*self._before, *self._stages}.difference(self._holdings.stages):
            stage.close()
