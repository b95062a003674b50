"""`silofs check --repair` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from silofs.blocks import PAGE
from silofs.layers import schema
from silofs.layers.store import Store
from silofs.limits import CELL_OBJECTS_MIN
from tests.storerig import Rig
from tests.unit.cli.commands import Silofs


def spoil(store: Path) -> None:
    with Store.open(store) as opened:

        def remove(txn: object) -> None:
            (key,) = txn.scan_keys(schema.LAYER)  # type: ignore[attr-defined]
            txn._delete(schema.LAYER, key)  # type: ignore[attr-defined]

        opened.write(remove)


def test_a_repair_says_what_it_gives_up_and_asks(silofs: Silofs) -> None:
    silofs.ok("create", "vm", "--size", "1G")
    spoil(silofs.store)
    refused = silofs("check", "--repair")
    assert refused.code == 11 and "volume 'vm'" in refused.err and "--yes" in refused.err
    assert not (silofs.store / "data.damaged").exists()
    done = silofs("--json", "check", "--repair", "--yes")
    assert done.code == 3 and '"vm"' in done.out
    assert silofs.ok("check")["damaged"] == 0
    assert silofs.ok("ls")["volumes"] == [] and (silofs.store / "data.damaged").is_dir()
    silofs.ok("create", "vm", "--size", "1G")


def test_a_store_that_is_open_is_not_repaired(silofs: Silofs) -> None:
    silofs.ok("create", "vm", "--size", "1G")
    with Store.open(silofs.store):
        silofs.fails(11, "check", "--repair")


@pytest.mark.parametrize("point", ["repair.built", "repair.moved", "repair.exchanged"])
def test_a_repair_that_is_killed_is_begun_again_and_the_damaged_store_stays(silofs: Silofs, point: str) -> None:
    silofs.ok("create", "vm", "--size", "1G")
    spoil(silofs.store)
    damaged = data_file(silofs.store / "data")
    program = "import sys; from silofs.cli.main import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--store", str(silofs.store), "check", "--repair", "--yes"]
    killed = subprocess.run(command, env={**os.environ, "SILOFS_FAIL": f"{point}:kill"}, check=False)
    assert killed.returncode == -9
    assert silofs("check", "--repair", "--yes").code == (0 if point == "repair.exchanged" else 3)
    assert silofs.ok("check")["damaged"] == 0
    assert damaged in map(data_file, silofs.store.glob("data.damaged*"))


def test_a_second_repair_keeps_what_the_first_one_replaced(silofs: Silofs) -> None:
    silofs.ok("create", "vm", "--size", "1G")
    spoil(silofs.store)
    damaged = data_file(silofs.store / "data")
    assert silofs("check", "--repair", "--yes").code == 3
    assert silofs.ok("check", "--repair")["damaged_store"] == str(silofs.store / "data.damaged.2")
    assert data_file(silofs.store / "data.damaged") == damaged


def test_a_store_without_its_file_of_cells_is_refused_and_repaired(silofs: Silofs) -> None:
    silofs.ok("create", "vm", "--size", "2M")
    silofs.ok("create", "other", "--size", "2M")
    with closing(Rig(silofs.store)) as rig, rig.store.reader() as txn:
        vm, other = (txn.volume_by_name(name).uuid for name in ("vm", "other"))
        rig.put(other, range(5))
        rig.put(vm, range(31 * CELL_OBJECTS_MIN))
    cells = silofs.store / "data" / "cells"
    cells.unlink()
    refused = silofs.fails(1, "check")
    assert refused["code"] == "bad_format" and f"{cells} is missing" in refused["message"]
    assert "check --repair" in refused["hint"] and not cells.exists()
    done = silofs("--json", "check", "--repair", "--yes")
    assert done.code == 3
    (loss,) = json.loads(done.out)["losses"]
    assert (loss["name"], loss["ranges"]) == ("vm", [[0, 31 * CELL_OBJECTS_MIN * PAGE]])
    assert silofs.ok("check", "--read-data")["damaged"] == 0


def data_file(directory: Path) -> bytes:
    return (directory / "data.mdb").read_bytes()
