"""Text for terminals; quick to import."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` with what a terminal would act on made visible.

    Names and reasons come from VMMs and sources, which may have put anything into them.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
