"""Every test of the kernel room counts what it leaves behind."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_left(assert_nothing_left: None) -> None:
    """Apply to all of them."""
