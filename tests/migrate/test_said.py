"""What the commands of a migration say: of what does not travel, of what cannot move, and of what a peer decides."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Mount, until

pytestmark = [pytest.mark.fuse]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Mount, Mount, str]]:
    with Mount(tmp_path / "a", listen=True) as here, Mount(tmp_path / "b", listen=True) as there:
        yield here, there, here.pair(there)


def test_a_snapshot_that_a_rollback_passed_is_named(pair: tuple[Mount, Mount, str]) -> None:
    here, there, peer = pair
    here.silofs("create", "vm1", "--size", "64M")
    for at, name in enumerate(("old", "passed")):
        here.image("vm1").write_bytes(bytes([at + 1]) * 4096)
        here.silofs("snapshot", f"vm1@{name}")
    here.silofs("rollback", "vm1@old", "--yes")
    done = here.run("migrate", "vm1", "--to", peer, "--switchover", "now", "--json")
    assert done.returncode == 3, done
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["state"], result["left_snapshots"]) == ("complete", ["vm1@passed"])
    assert "vm1@passed" in done.stderr
    assert [each["name"] for each in there.silofs_json("info", "vm1")["snapshots"]] == ["old"]
    assert here.silofs_json("info", "vm1")["role"] == "tombstone"
    again = here.run("migrate", "vm1", "--to", peer, "--json")
    error = json.loads(again.stdout.splitlines()[-1])
    assert (again.returncode, error["code"]) == (11, "not_owner")
    assert error["hint"]
    shown = there.silofs_json("migration", "ls")["migrations"][-1]
    assert (shown["direction"], shown["mode"], shown["switchover"]) == ("in", None, None)
    assert here.silofs_json("migration", "ls")["migrations"][-1]["switchover"] == "now"


def test_a_cancel_that_the_destination_has_to_grant(pair: tuple[Mount, Mount, str]) -> None:
    here, there, peer = pair
    here.silofs("create", "vm1", "--size", "256M")
    with here.image("vm1").open("r+b") as file:
        file.write(random.Random(1).randbytes(64 << 20))
    options = ["--mode", "postcopy", "--switchover", "now", "--max-bandwidth", "1M", "--detach"]
    migration = here.silofs_json("migrate", "vm1", "--to", peer, *options)["migration"]
    until(lambda: there.run("info", "vm1").returncode == 0, "vm1 is there")
    until(lambda: there.silofs_json("info", "vm1")["role"] == "owner", "vm1 is owned there")
    there.silofs("clone", "vm1", "copy")
    done = here.run("migration", "cancel", migration)
    assert done.returncode == 3, done
    assert "gives them back only if" in done.stderr
    assert there.run("migration", "cancel", migration).returncode == 11
    there.silofs("rm", "copy")
