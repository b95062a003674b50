"""A map that goes on in a leaf which already holds pages leaves those pages alone."""

from __future__ import annotations

import uuid
from pathlib import Path

from silofs.blocks import PAGE, pages_for
from silofs.layers import schema
from silofs.layers.store import Store

SIZE = 4 << 20


def content(page: int) -> bytes:
    return page.to_bytes(4, "little") * (PAGE // 4)


def test_pages_of_an_earlier_batch_outlive_the_next_map(tmp_path: Path) -> None:
    Store.create(tmp_path / "store")
    store = Store.open(tmp_path / "store")
    layer = store.write(lambda txn: txn.receive_layer(uuid.uuid4().bytes, 0, SIZE, SIZE)).id
    store.write(lambda txn: txn.pin(layer, "test"))
    batches = [range(start, start + 100) for start in (0, 100, 200)]  # all in one leaf, with packed and lone pages
    for batch in batches:
        store.write(lambda txn, batch=batch: txn.put_map(layer, [(batch.start, len(batch), schema.REMOTE)]))
        store.write(lambda txn, batch=batch: txn.fill(layer, {page: content(page) for page in batch}))
    store.write(lambda txn: txn.put_map(layer, [], mapped=pages_for(SIZE)))
    with store.reader() as reader:
        refs = reader.own_leaf(layer, 0)
        assert refs is not None
        for batch in batches:
            assert [bytes(reader.page(int(refs[page]))) for page in batch] == [content(page) for page in batch]
        assert reader.layer(layer).own_pages == 300
    store.close()
