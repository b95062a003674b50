"""What the record of a migration holds on to in the store, from the transaction that writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.layers.catalog import Layer
from silofs.layers.store import Store
from silofs.migrate import events as ev
from silofs.migrate.messages import Base, VolumeEpoch
from silofs.migrate.states import MigrationRecord, Options, Phase, Side
from silofs.peers import records

MIGRATION, PEER, COMING = b"m" * 16, b"p" * 16, b"v" * 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    Store.create(tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        yield store


def common_state(store: Store) -> tuple[bytes, Layer]:
    """(volume, sealed layer) of a golden image that both sides have."""
    golden = store.write(lambda txn: txn.create_volume("golden", 1 << 20))
    layer = store.write(lambda txn: txn.layer(txn.take_snapshot(golden.uuid, "v1").layer))
    return golden.uuid, layer


def arriving(base: bytes) -> ev.Commit:
    volumes, bases = (VolumeEpoch(COMING, 2),), (Base(COMING, base),)
    record = MigrationRecord(MIGRATION, Side.TARGET, PEER, Phase.OFFERED, volumes, Options(), (), bases=bases)
    return ev.Commit(1, record=record)


def test_the_base_of_an_arriving_volume_outlives_its_last_name(store: Store) -> None:
    golden, layer = common_state(store)
    store.write(lambda txn: records.apply(txn, arriving(layer.uuid), None))
    store.write(lambda txn: txn.delete_volume(golden))
    with store.reader() as reader:
        held = reader.layer_by_uuid(layer.uuid)
        assert held is not None
        assert not held.doomed
    store.write(lambda txn: records.apply(txn, ev.Commit(2, drop=(MIGRATION,)), None))
    with store.reader() as reader:
        freed = reader.layer_by_uuid(layer.uuid)
        assert freed is None or freed.doomed, "nothing holds it once the migration is over"


def test_a_base_that_went_before_the_record_was_written_is_refused_and_nothing_stored(store: Store) -> None:
    golden, layer = common_state(store)
    store.write(lambda txn: txn.delete_volume(golden))
    with pytest.raises(records.BaseGone):
        store.write(lambda txn: records.apply(txn, arriving(layer.uuid), None))
    with store.reader() as reader:
        assert records.stored(reader) == []


def test_a_base_that_is_replaced_is_let_go(store: Store) -> None:
    golden, layer = common_state(store)
    store.write(lambda txn: records.apply(txn, arriving(layer.uuid), None))
    store.write(lambda txn: records.apply(txn, arriving(b""), None))
    store.write(lambda txn: txn.delete_volume(golden))
    with store.reader() as reader:
        freed = reader.layer_by_uuid(layer.uuid)
        assert freed is None or freed.doomed
