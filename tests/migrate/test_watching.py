"""What `silofs metrics` and `silofs top` say of a migration, at both ends."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.exposition import described, golden, parse
from tests.harness import Mount, until

pytestmark = [pytest.mark.fuse]


def test_a_migration_is_shown_while_it_runs_and_when_it_is_over(tmp_path: Path) -> None:
    with Mount(tmp_path / "a", listen=True) as here, Mount(tmp_path / "b", listen=True) as there:
        peer = here.pair(there)
        here.silofs("create", "vm1", "--size", "16M")
        with here.image("vm1").open("r+b") as file:
            file.write(random.Random(1).randbytes(8 << 20))
        slow = ["--switchover", "manual", "--max-bandwidth", "2M", "--detach"]
        migration = here.silofs_json("migrate", "vm1", "--to", peer, *slow)["migration"]
        for end, way in ((here, "out"), (there, "in")):
            shown = until(
                lambda end=end: end.silofs_json("top", "--once", "--interval", "100ms")["migrations"], "shown"
            )
            assert [(each["migration"], each["direction"]) for each in shown] == [(migration, way)]
        row = next(row for row in here.silofs_json("top", "--once", "--interval", "100ms")["volumes"])
        assert (row["name"], row["migration"]) == ("vm1", migration)
        here.silofs("migration", "cancel", migration)
        here.silofs("migrate", "vm1", "--to", peer, "--switchover", "now")
        found = parse(here.silofs("metrics"))
        assert described(found) == golden()
        phases = {labels["phase"] for labels in map(dict, found["silofs_migration_phase"].samples)}
        assert phases == {"cancelled", "complete"}
        assert sum(found["silofs_migration_bytes_total"].samples.values()) >= 8 << 20
        assert found["silofs_volume_role"].value(volume="vm1", role="tombstone") == 1
        assert found["silofs_peers_connected"].value() == 1
        arrived = parse(there.silofs("metrics"))
        assert arrived["silofs_volume_role"].value(volume="vm1", role="owner") == 1
        assert here.silofs_json("top", "--once", "--interval", "100ms")["migrations"] == []
