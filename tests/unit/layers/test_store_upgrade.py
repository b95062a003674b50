"""A store of an older version becomes one of this version when it is opened; a crash leaves one of the two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from silofs import failpoints
from silofs.errors import BadFormat, Damaged
from silofs.layers import catalog, schema
from silofs.layers.environment import Environment
from silofs.layers.format import Format, read_format
from silofs.layers.store import Store
from tests.storerig import Rig

SAMPLE = Path(__file__).parents[2] / "golden" / "store-v1.tar.xz"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    shutil.unpack_archive(SAMPLE, tmp_path)
    yield tmp_path / "store"
    failpoints.rearm("")


def tables(store: Path, version: int) -> set[str]:
    with closing(Environment(store / "data", version=version)) as environment:
        return {table.name for table in environment.tables}


def test_a_store_of_version_1_is_upgraded_once(old: Path) -> None:
    assert read_format(old / "data").version == 1
    Store.open(old).close()
    assert read_format(old / "data").version == schema.FORMAT_VERSION
    assert tables(old, schema.FORMAT_VERSION) == {table.name for table in schema.TABLES}
    rig = Rig(old)
    assert rig.findings() == []
    rig.close()


@pytest.mark.parametrize(
    ("point", "version"),
    [("upgrade.tables", 1), ("upgrade.before_commit", 1), ("upgrade.after_commit", schema.FORMAT_VERSION)],
)
def test_an_interrupted_upgrade_is_one_of_the_two(old: Path, point: str, version: int) -> None:
    failpoints.rearm(f"{point}:raise")
    with pytest.raises(failpoints.FailpointReached):
        Store.open(old)
    assert read_format(old / "data").version == version
    failpoints.rearm("")
    rig = Rig(old)
    assert rig.findings() == []
    rig.close()
    assert read_format(old / "data").version == schema.FORMAT_VERSION


def test_a_damaged_old_store_is_not_upgraded(old: Path) -> None:
    with closing(Environment(old / "data", version=1)) as environment, environment.begin(write=True) as txn:
        txn.put(b"hostC", b"x", db=environment.tables[schema.PEER])  # the state does not know of it
    before = (old / "data" / "data.mdb").read_bytes()
    with pytest.raises(Damaged):
        Store.open(old)
    assert (old / "data" / "data.mdb").read_bytes() == before


def test_a_version_of_before_the_first_is_refused(old: Path) -> None:
    with closing(Environment(old / "data", version=1)) as environment, environment.begin(write=True) as txn:
        key = schema.META_FORMAT
        value = catalog.encode(schema.META, key, Format(0, schema.ENGINE, b""))
        txn.put(key, value, db=environment.tables[schema.META])
    with pytest.raises(BadFormat, match="format 0"):
        Store.open(old)
