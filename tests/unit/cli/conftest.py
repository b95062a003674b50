"""Commands on a store of their own: once without a daemon, once through a daemon's service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.layers.store import Store
from tests.unit.cli.commands import Silofs, daemon


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store of this test is to be."""
    path = tmp_path / "store"
    monkeypatch.setenv("SILOFS_STORE", str(path))
    monkeypatch.delenv("NO_COLOR", raising=False)
    return path


@pytest.fixture
def silofs(store: Path, capsys: pytest.CaptureFixture[str]) -> Silofs:
    """Commands on an empty store that nobody serves."""
    Store.create(store)
    return Silofs(store, capsys)


@pytest.fixture(params=["alone", "daemon"])
def either(request: pytest.FixtureRequest, silofs: Silofs) -> Iterator[Silofs]:
    """Commands on an empty store, without and with a daemon."""
    if request.param == "alone":
        yield silofs
        return
    with daemon(silofs.store):
        yield silofs
