"""A store of an older version becomes one of this version when it is opened; a crash leaves one of the two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from silofs import failpoints
from silofs.blocks import PAGE
from silofs.errors import BadFormat, Damaged, StoreError
from silofs.layers import catalog, schema, scrub
from silofs.layers.environment import Environment
from silofs.layers.format import Format, read_format
from silofs.layers.salvage import Salvage
from silofs.layers.store import Store
from silofs.limits import GIB
from tests.storerig import Rig, page_bytes

SAMPLES = Path(__file__).parents[2] / "golden"
RELEASED = range(1, schema.FORMAT_VERSION)
"""Versions before this one."""


@pytest.fixture(params=RELEASED)
def version(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def old(tmp_path: Path, version: int) -> Iterator[Path]:
    """A store of that version."""
    shutil.unpack_archive(SAMPLES / f"store-v{version}.tar.xz", tmp_path)
    yield tmp_path / "store"
    failpoints.rearm("")


def tables(store: Path, version: int) -> set[str]:
    with closing(Environment(store / "data", version=version)) as environment:
        return {table.name for table in environment.tables}


def test_a_store_of_an_older_version_is_upgraded_once(old: Path, version: int) -> None:
    assert read_format(old / "data").version == version
    Store.open(old).close()
    assert read_format(old / "data").version == schema.FORMAT_VERSION
    assert tables(old, schema.FORMAT_VERSION) == {table.name for table in schema.TABLES}
    rig = Rig(old)
    assert rig.findings() == []
    rig.close()


@pytest.mark.parametrize(
    ("point", "done"), [("upgrade.tables", False), ("upgrade.before_commit", False), ("upgrade.after_commit", True)]
)
def test_an_interrupted_upgrade_is_one_of_the_two(old: Path, version: int, point: str, done: bool) -> None:
    failpoints.rearm(f"{point}:raise")
    with pytest.raises(failpoints.FailpointReached):
        Store.open(old)
    assert read_format(old / "data").version == (schema.FORMAT_VERSION if done else version)
    failpoints.rearm("")
    rig = Rig(old)
    assert rig.findings() == []
    rig.close()
    assert read_format(old / "data").version == schema.FORMAT_VERSION


def test_an_upgraded_store_uses_cells(old: Path) -> None:
    rig = Rig(old)
    assert not (old / "data" / "cells").exists()
    vm = rig.store.write(lambda txn: txn.create_volume("large", GIB)).uuid
    for seed in range(3):
        rig.put(vm, range(300), seed=seed)
    rig.reopen()
    assert (old / "data" / "cells").exists()
    assert rig.read("large")[: 300 * PAGE] == b"".join(page_bytes(page, 2) for page in range(300))
    with rig.store.reader() as txn:
        assert txn.entries(schema.CELL) == 10
    assert rig.findings() == []
    rig.close()


def test_a_damaged_old_store_is_not_upgraded(old: Path, version: int) -> None:
    with closing(Environment(old / "data", version=version)) as environment, environment.begin(write=True) as txn:
        txn.put(b"hostC", b"x", db=environment.tables[schema.PEER])  # the state does not know of it
    before = (old / "data" / "data.mdb").read_bytes()
    with pytest.raises(Damaged):
        Store.open(old)
    assert (old / "data" / "data.mdb").read_bytes() == before


def test_a_version_of_before_the_first_is_refused(old: Path, version: int) -> None:
    with closing(Environment(old / "data", version=version)) as environment, environment.begin(write=True) as txn:
        key = schema.META_FORMAT
        value = catalog.encode(schema.META, key, Format(0, schema.ENGINE, b""))
        txn.put(key, value, db=environment.tables[schema.META])
    with pytest.raises(BadFormat, match="format 0"):
        Store.open(old)


def test_a_check_looks_at_an_older_store_as_it_is(tmp_path: Path) -> None:
    """An older daemon serves it, and starts the child that is installed."""
    shutil.unpack_archive(SAMPLES / "store-v2.tar.xz", tmp_path)
    path = tmp_path / "store"
    found = scrub.scrub(path, read_data=True)
    assert found.findings == [] and found.volumes
    assert read_format(path / "data").version == 2, "nothing was changed"


def test_a_child_of_another_program_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path / "store")
    rig.close()
    monkeypatch.setattr(scrub, "ASKS_FORMAT", "--not-known-there")
    with pytest.raises(StoreError) as raised:
        scrub.scrub(rig.path)
    assert raised.value.hint and "restart" in raised.value.hint


def test_a_newer_store_is_not_repaired(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "store")
    rig.close()
    data = rig.path / "data"
    with closing(Environment(data)) as environment, environment.begin(write=True) as txn:
        key, table = schema.META_FORMAT, environment.tables[schema.META]
        found = catalog.decode(schema.META, key, txn.get(key, db=table) or b"", Format)
        newer = replace(found, version=schema.FORMAT_VERSION + 1)
        txn.put(key, catalog.encode(schema.META, key, newer), db=table)
    with pytest.raises(BadFormat, match=f"has format {schema.FORMAT_VERSION + 1}"):
        Salvage(data / "data.mdb")
