"""Commands run in the tests' process: what they do to logging ends with the test."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command writes its log to the test's stdout, which is closed after the test."""
    monkeypatch.setattr(logging.root, "handlers", [])
