"""The Nth fault: every operation of a store, with its 1st, 2nd, ... Nth system call failing.

    LD_PRELOAD=SHIM python -m tests.faults.nth SHIM DIRECTORY [--share 0.1] [--seed N] [--only NAME]

For each operation, each kind of fault (shim.c) and each N that is chosen: a copy of one store is opened in a child, the
operation runs into the fault, is tried once more, and the child ends as if the power had been cut: what it had not
synced is undone. Another child opens what is left. An operation that said that it was done must be there; one that was
refused, wholly or not at all; of one in steps (an engine that serves, serving.py) all that it said was durable;
everything from before must be as it was, and `check` clean. The last line of stdout is JSON: trials, faults that were
met by operation, problems.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import lmdb

from silofs import offline
from silofs.errors import SiloError
from silofs.layers import writer
from silofs.layers.check import check
from silofs.layers.policies import drain
from silofs.layers.store import Store
from silofs.layers.syncer import Syncer
from tests.faults.serving import serve, states
from tests.harness import ROOT
from tests.storerig import Rig, hurry, page_bytes, read_layer

KINDS: Final = {"EIO": 1, "ENOSPC": 2, "SHORT": 3, "LOST": 4}
PAGE: Final = 4096
MIB: Final = 1 << 20
SIZE: Final = 3 * MIB
PROBLEMS_MAX: Final = 8
HANG_S: Final = 30
NO_STORE: Final = {"": "no store"}

Digests = dict[str, str]
"""Name of a volume, or "volume@snapshot" -> what it holds."""


@dataclass(frozen=True)
class Operation:
    """`run` works on an open store, or with `path` on that of a closed one; `effect` says what it makes of the digests.

    `base` is the store that its trials start from. One with `steps` gets the faults themselves, and `steps` tells all
    states that the store may pass through. One that is done in `several` commits may be refused after any of them.
    """

    run: Callable[..., object]
    effect: Callable[[Digests], Digests] = dict
    path: bool = False
    base: str = "base"
    steps: Callable[[Digests], list[Digests]] | None = None
    several: Callable[[Digests], list[Digests]] | None = None

    def states(self, before: Digests) -> list[Digests]:
        if self.steps is not None:
            return self.steps(before)
        return self.several(before) if self.several is not None else [before, self.effect(before)]


def digest(data: bytes) -> str:
    return f"{len(data)}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def verb(which: str, /, **arguments: Any) -> Callable[[Store], object]:
    return lambda store: offline.run(store, which, arguments)


def with_names(**changes: str | None) -> Callable[[Digests], Digests]:
    """Digests with those keys ("AT" stands for @) set, or removed; the value names another key, or is a digest."""

    def effect(before: Digests) -> Digests:
        after = dict(before)
        for key, value in changes.items():
            name = key.replace("AT", "@")
            if value is None:
                after = {each: kept for each, kept in after.items() if each != name and not each.startswith(f"{name}@")}
            else:
                after[name] = before.get(value, value)
        return after

    return effect


IMAGE: Final = b"".join(page_bytes(page, 9) for page in range(40)) + bytes(200 * PAGE) + page_bytes(300, 9) * 3
WRITTEN: Final = {page: page_bytes(page, 5) for page in (*range(40), 100, 301, 520)}
LARGE: Final = range(150, 460)
"""Pages of a commit whose objects go to cells."""
ROUNDS: Final = 5
FIRST: Final = 40
"""Pages of "vm" in a store that has no cells yet."""


def import_image(store: Store, name: str = "new") -> None:
    fd = os.memfd_create("image")
    os.pwrite(fd, IMAGE, 0)
    try:
        offline.run(store, "import", {"name": name}, fds=(fd,))
    finally:
        os.close(fd)


def export_image(store: Store) -> None:
    fd = os.memfd_create("image")
    try:
        offline.run(store, "export", {"volume": "vm", "snapshot": "one"}, fds=(fd,))
    finally:
        os.close(fd)


def commit_pages(store: Store) -> None:
    rig = Rig.over(store)
    with store.reader() as txn:
        uuid = txn.volume_by_name("vm").uuid
    for page, data in WRITTEN.items():
        rig.write(uuid, page * PAGE, data)
    rig.zero(uuid, 60, 90)
    rig.commit()


def overwritten(before: Digests) -> Digests:
    data = bytearray(base_content())
    for page, page_data in WRITTEN.items():
        data[page * PAGE : (page + 1) * PAGE] = page_data
    data[60 * PAGE : 90 * PAGE] = bytes(30 * PAGE)
    return before | {"vm": digest(bytes(data))}


def vm_of(store: Store) -> bytes:
    with store.reader() as txn:
        return txn.volume_by_name("vm").uuid


def commit_large(store: Store, seed: int = 8) -> None:
    """Objects in cells, in place of others that are there."""
    Rig.over(store).put(vm_of(store), LARGE, seed=seed)


def discard_large(store: Store) -> None:
    """Their cells are given up, and the blocks of all of them go back once they are free."""
    writer.CELLS_KEPT = 0
    rig, vm = Rig.over(store), vm_of(store)
    rig.zero(vm, LARGE.start, LARGE.stop)
    rig.commit()
    rig.put(vm, [0], seed=5)


def with_pages(content: bytes, seed: int, pages: Iterable[int] = LARGE) -> bytes:
    data = bytearray(content)
    for page in pages:
        data[page * PAGE : (page + 1) * PAGE] = page_bytes(page, seed)
    return bytes(data)


def discarded(before: Digests) -> list[Digests]:
    """In two commits."""
    data = bytearray(base_content())
    data[LARGE.start * PAGE : LARGE.stop * PAGE] = bytes(len(LARGE) * PAGE)
    return [before, before | {"vm": digest(bytes(data))}, before | {"vm": digest(with_pages(bytes(data), 5, [0]))}]


def in_rounds(path: Path, arm: Callable[[], None], disarm: Callable[[], None], end: Callable[[int], None]) -> None:
    """The same pages again and again: what one commit gives up the next but one writes over. Cells that could not be
    written are tried again by the next one. A commit that is refused twice ends it: its outcome is not known."""
    writer.CELLS_KEPT = 8
    store = offline.open_store(path)
    arm()
    reached = 0
    for number in range(ROUNDS):
        store._environment.cells._again = 0.0
        said = attempt(lambda number=number: commit_large(store, number + 20))
        if said == "refused":
            said = attempt(lambda number=number: commit_large(store, number + 20))
        if said not in ("done", "refused"):
            raise AssertionError(said)
        if said == "refused":
            break
        reached = number + 1
    disarm()
    end(reached)


def rounds(before: Digests) -> list[Digests]:
    content = base_content()
    return [before, *(before | {"vm": digest(with_pages(content, number + 20))} for number in range(ROUNDS))]


def remove_and_reap(store: Store) -> None:
    offline.run(store, "rm", {"volume": "vm", "force": True})
    drain(store)


OPERATIONS: Final[dict[str, Operation]] = {
    "create": Operation(verb("create", name="new", size=MIB), with_names(new=digest(bytes(MIB)))),
    "commit": Operation(commit_pages, overwritten),
    "commit-large": Operation(commit_large, lambda b: b | {"vm": digest(with_pages(base_content(), 8))}),
    "first-cells": Operation(
        commit_large, lambda b: b | {"vm": digest(with_pages(first_content(), 8))}, base="without-cells"
    ),
    "rounds": Operation(in_rounds, steps=rounds),
    "discard": Operation(discard_large, several=discarded),
    "snapshot": Operation(verb("snapshot", volume="vm", snapshot="two"), with_names(vmATtwo="vm")),
    "clone": Operation(verb("clone", source="vm", new="new"), with_names(new="vm")),
    "clone-of-snapshot": Operation(verb("clone", source="vm", snapshot="one", new="new"), with_names(new="vm@one")),
    "rollback": Operation(verb("rollback", volume="vm", snapshot="one"), with_names(vm="vm@one")),
    "grow": Operation(
        verb("resize", name="vm", size=SIZE + MIB),
        lambda before: before | {"vm": digest(base_content() + bytes(MIB))},
    ),
    "shrink": Operation(
        verb("resize", name="vm", size=MIB, shrink=True),
        lambda before: before | {"vm": digest(base_content()[:MIB])},
    ),
    "rename": Operation(
        verb("rename", old="other", new="new"), lambda b: with_names(other=None)(with_names(new="other")(b))
    ),
    "rm": Operation(remove_and_reap, with_names(vm=None)),
    "rm-snapshot": Operation(verb("rm", volume="vm", snapshot="one"), with_names(vmATone=None)),
    "import": Operation(import_image, with_names(new=digest(IMAGE))),
    "export": Operation(export_image),
    "background": Operation(hurry),
    "check": Operation(verb("check", read_data=True)),
    "serve": Operation(serve, steps=lambda before: [before | {"vm": digest(each)} for each in states(base_content())]),
    "init": Operation(offline.init, lambda _: {}, path=True, base="nothing"),
    "open": Operation(lambda path: offline.open_store(path).close(), path=True),
    "upgrade": Operation(lambda path: offline.open_store(path).close(), path=True, base="v1"),
}


def base_content() -> bytes:
    """What "vm" holds in the store that every trial starts from."""
    pages = [page_bytes(page, 1) if page % 3 else page_bytes(page, 2) for page in range(SIZE // PAGE)]
    pages[400:430] = [bytes(PAGE)] * 30
    return b"".join(pages)


def first_content() -> bytes:
    return with_pages(bytes(SIZE), 1, range(FIRST))


def build_without_cells(path: Path) -> None:
    rig = Rig(path)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    rig.put(vm, range(FIRST), seed=1)
    rig.close()
    assert not (path / "data" / "cells").exists()


def build(path: Path) -> None:
    """That store: overwritten pages, snapshots, one of them gone from the middle, clones; most of it in cells."""
    rig = Rig(path)
    vm = rig.store.write(lambda txn: txn.create_volume("vm", SIZE)).uuid
    rig.put(vm, range(SIZE // PAGE), seed=1)
    rig.store.write(lambda txn: txn.take_snapshot(vm, "gone"))
    rig.put(vm, range(0, SIZE // PAGE, 3), seed=3)
    layer = rig.store.write(lambda txn: txn.take_snapshot(vm, "one").layer)
    rig.store.write(lambda txn: txn.clone(layer, "copy"))
    rig.put(vm, range(0, SIZE // PAGE, 3), seed=2)
    rig.zero(vm, 400, 430)
    rig.commit()
    other = rig.store.write(lambda txn: txn.create_volume("other", MIB)).uuid
    rig.put(other, range(0, 256, 2), seed=4)
    rig.store.write(lambda txn: txn.remove_snapshot(vm, "gone"))
    import_image(rig.store, "packed")
    packed = rig.store.write(lambda txn: txn.volume_by_name("packed")).uuid
    rig.put(packed, range(0, 40, 2), seed=6)
    rig.close()


def digests(store: Store) -> Digests:
    with store.reader() as txn:
        shown = {volume.name: (volume.head, volume.size) for volume in txn.volumes()}
        for volume in txn.volumes():
            shown |= {f"{volume.name}@{each.name}": (each.layer, each.size) for each in txn.snapshots(volume.uuid)}
        return {name: digest(read_layer(txn, layer, min(size, 8 * MIB))) for name, (layer, size) in shown.items()}


def look(path: Path) -> dict[str, Any]:
    """What a store holds and what a check says, opened as any command would."""
    if not (path / "data").exists():
        Store.create(path)  # what an interrupted `init` left must not be in the way of the next one
        shutil.rmtree(path)
        return {"digests": NO_STORE, "findings": []}
    with offline.open_store(path) as store:
        found = digests(store)
        with store.reader() as txn:
            findings = [f"{finding.code}: {finding.message}" for finding in check(txn, read_data=True)]
    return {"digests": found, "findings": findings}


def unsynced() -> None:
    lmdb.Environment = partial(lmdb.Environment, sync=False)


def unsynced_cells() -> None:
    Syncer.written = lambda self: None  # type: ignore[method-assign]


MISTAKES: Final = {each.__name__.replace("_", "-"): each for each in (unsynced, unsynced_cells)}


class Faults:
    """The shim that is loaded in this process."""

    def __init__(self, library: Path, watched: Path) -> None:
        self._lib = ctypes.CDLL(str(library))
        self._lib.faults_arm.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int)
        self._lib.faults_calls.restype = self._lib.faults_fired.restype = ctypes.c_long
        self._lib.faults_watch(os.fsencode(watched))

    def arm(self, nth: int, kind: str, *, on: bool = False) -> None:
        self._lib.faults_arm(nth, KINDS[kind], on)

    def disarm(self) -> tuple[int, int]:
        """(calls since `arm`, how many of them failed)"""
        counted = self._lib.faults_calls(), self._lib.faults_fired()
        self._lib.faults_arm(0, 0, 0)
        return counted

    def cut(self) -> None:
        self._lib.faults_cut()


def attempt(function: Callable[[], object]) -> str:
    """ "done", "refused", or the traceback of what no operation may raise."""
    try:
        function()
    except (SiloError, OSError):
        return "refused"
    except BaseException:
        return traceback.format_exc()
    return "done"


def operate(faults: Faults, operation: Operation, path: Path, nth: int, kind: str, on: bool) -> Any:
    """In a child: the operation, then once more without a fault if it was refused; then the power goes."""
    if operation.steps is not None:
        return step(faults, operation, path, nth, kind, on)
    target = path if operation.path else offline.open_store(path)
    faults.arm(nth, kind, on=on)
    first = attempt(lambda: operation.run(target))
    calls, fired = faults.disarm()
    again = attempt(lambda: operation.run(target)) if first == "refused" else ""
    faults.cut()
    bugs = [said for said in (first, again) if said not in ("done", "refused", "")]
    last = 1 if operation.several is None else len(operation.several({})) - 1
    return {"reached": last * ("done" in (first, again)), "calls": calls, "fired": fired, "bugs": bugs}


def step(faults: Faults, operation: Operation, path: Path, nth: int, kind: str, on: bool) -> Any:
    """The same for one in steps; it ends this process."""
    counted = (0, 0)

    def disarm() -> None:
        nonlocal counted
        counted = faults.disarm()

    def end(reached: int) -> None:
        faults.cut()
        finish({"reached": reached, "calls": counted[0], "fired": counted[1], "bugs": []})

    operation.run(path, lambda: faults.arm(nth, kind, on=on), disarm, end)


_result = -1  # in a child: where its result goes


def finish(result: Any) -> NoReturn:
    """End this child with a result."""
    try:
        left = json.dumps(result).encode()
        while left:
            left = left[os.write(_result, left) :]
    finally:
        os._exit(0)


def in_child(function: Callable[[], Any]) -> Any:
    """The result of a function that runs in a fork of this process and ends there; {"error": ...} if it raises."""
    global _result
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _result = writer
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(HANG_S)  # ends this process
            result = function()
        except BaseException as error:
            result = {"error": "".join(traceback.format_exception(error))}
        finish(result)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return {"error": f"the process ended with wait status {status}"} if status else json.loads(said)


def judge(states: list[Digests], outcome: dict[str, Any], left: dict[str, Any]) -> str | None:
    """What is wrong with a trial; None if nothing."""
    for part in (outcome, left):
        if "error" in part:
            return str(part["error"])
    if outcome["bugs"]:
        return str(outcome["bugs"])
    if left["findings"]:
        return f"check: {left['findings'][:3]}"
    found, reached = left["digests"], outcome["reached"]
    if found not in states[reached:]:
        if found in states:
            return f"it said that it had reached step {reached}, but the store is at step {states.index(found)}"
        return f"after step {reached} the store has {difference(states[0], states[-1], found)}"
    return None


def difference(before: Digests, after: Digests, found: Digests) -> str:
    return "; ".join(
        f"{name}: {found.get(name)}, not {after.get(name)} (it was {before.get(name)})"
        for name in sorted(before.keys() | after.keys() | found.keys())
        if found.get(name) != after.get(name)
    )


def trials(calls: int, share: float, rng: random.Random) -> Iterator[tuple[int, bool]]:
    """(N, whether all later calls fail, too): every N when share is 1, else some."""
    chosen = list(range(1, calls + 1))
    if share < 1:
        chosen = sorted(rng.sample(chosen, min(calls, max(3, round(calls * share)))))
    for nth in chosen:
        yield nth, False
        if share == 1 or rng.random() < share:
            yield nth, True


class Suite:
    """All trials, and what came of them."""

    def __init__(self, faults: Faults, directory: Path, share: float, seed: int) -> None:
        self.faults, self.directory, self.share = faults, directory, share
        self.rng = random.Random(seed)
        self.directory, self.work = directory, directory / "work" / "store"
        self.work.parent.mkdir(parents=True)
        self.trials = 0
        self.met: dict[str, int] = {}
        self.problems: list[str] = []

    def run(self, name: str, operation: Operation) -> None:
        before = in_child(lambda: look(self._copy(operation)))["digests"]
        states = operation.states(before)
        for kind in KINDS:
            counted = self._trial(operation, 0, kind, False)
            self._note(name, judge(states, *counted), kind, 0, False)
            for nth, on in trials(counted[0].get("calls", 0), self.share, self.rng):
                outcome, left = self._trial(operation, nth, kind, on)
                self.met[name] = self.met.get(name, 0) + outcome.get("fired", 0)
                self._note(name, judge(states, outcome, left), kind, nth, on)
                if len(self.problems) >= PROBLEMS_MAX:
                    return

    def _trial(self, operation: Operation, nth: int, kind: str, on: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        self._copy(operation)
        outcome = in_child(lambda: operate(self.faults, operation, self.work, nth, kind, on))
        left = in_child(lambda: look(self.work))
        self.trials += 1
        return outcome, left

    def _copy(self, operation: Operation) -> Path:
        shutil.rmtree(self.work, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", self.directory / operation.base, self.work], check=True)
        return self.work

    def _note(self, name: str, problem: str | None, kind: str, nth: int, on: bool) -> None:
        if problem:
            self.problems.append(f"{name}, call {nth} {'and all later ones ' if on else ''}with {kind}: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(description="operations of a store, with their Nth system call failing")
    parser.add_argument("library", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the calls; 1 is all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=OPERATIONS, action="append")
    parser.add_argument("--mistake", choices=MISTAKES, help="in the store: has to be found out")
    options = parser.parse_args()
    if options.mistake:
        MISTAKES[options.mistake]()
    suite = Suite(Faults(options.library, options.directory / "work"), options.directory, options.share, options.seed)
    (options.directory / "nothing").mkdir()
    shutil.unpack_archive(ROOT / "tests" / "golden" / "store-v1.tar.xz", options.directory / "old")
    (options.directory / "old" / "store").rename(options.directory / "v1")
    in_child(lambda: {"built": build(options.directory / "base")})
    in_child(lambda: {"built": build_without_cells(options.directory / "without-cells")})
    for name in options.only or OPERATIONS:
        suite.run(name, OPERATIONS[name])
        print(f"{name}: {suite.met.get(name, 0)} faults, {len(suite.problems)} problems", flush=True)
    print(json.dumps({"trials": suite.trials, "met": suite.met, "problems": suite.problems}))
    return 0


@dataclass(frozen=True)
class Tried:
    """How many trials there were, how many faults each operation met, and what was wrong."""

    trials: int
    met: dict[str, int]
    problems: list[str]


def run(directory: Path, *arguments: str) -> Tried:
    """Compile the shim and run the trials in a process that has it loaded."""
    library, source = directory / "shim.so", Path(__file__).with_name("shim.c")
    compiler = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-O1", "-o", library, source, "-ldl"]
    subprocess.run(compiler, check=True)
    command = [sys.executable, "-m", "tests.faults.nth", library, directory, *arguments]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Tried(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
