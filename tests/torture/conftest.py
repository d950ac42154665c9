"""Fixtures of the matrices."""

from __future__ import annotations

import pytest

from postcopyd.outgoing import comeback


@pytest.fixture
def soon_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a source that nobody listens to any more give up before the test's time is over."""
    monkeypatch.setattr(comeback, "_SECONDS", 4.0)
