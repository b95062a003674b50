"""The story that power cuts are put into: everything that makes something durable, on one recorded disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic_ns

from tests.crash.driver import REQUEST, Driver
from tests.crash.powercut import Disk
from tests.crash.story import Story
from tests.harness import Mount

SCRATCH = Path("/dev/shm")
CELLS_REUSED = 4
WORK = 12  # operations of each writer between two verbs


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory, if there is one: a recording is some hundred MiB."""
    with tempfile.TemporaryDirectory(prefix="silofs-power-", dir=SCRATCH if SCRATCH.is_dir() else None) as name:
        yield Path(name)


def record(directory: Path, *, seed: str, rounds: int = 1, environment: Mapping[str, str] | None = None) -> None:
    """Tell the story on a new disk: `tests.crash.explore` finds all that it needs in `directory`."""
    story = Story()
    marks = {"SILOFS_FAIL": "*:mark", "SILOFS_FAIL_DIR": str(directory)}
    with Disk(directory) as disk:
        mount = Mount(disk.path, environment={**marks, **(environment or {})})
        driver = Driver(mount, story, seed)
        issued = monotonic_ns()
        try:
            with mount:
                story.chapter(issued)
                tell(driver, directory / "image", rounds)
        finally:
            story.save(directory / "story.json")


def tell(driver: Driver, source: Path, rounds: int) -> None:
    try:
        driver.create("a", 12 << 10)
        driver.create("b", 8 << 10)
        for number in range(rounds):
            for again in range(CELLS_REUSED):
                # Large commits, of which each gives up what the one before it stored.
                driver.overwrite("a", 0, 6 * REQUEST)
                driver.work(2)
                driver.snapshot("a", f"large{again}")
                driver.rm(f"a@large{again}")
            driver.work(WORK)
            driver.extend("a", 40)
            driver.snapshot("a", "one")
            driver.work(WORK)
            driver.clone("a", f"c{number}")
            driver.imported(f"i{number}", 6000, source)
            driver.work(WORK)
            driver.mount.kill_daemon()
            driver.work(WORK)
            driver.snapshot("b", "one")
            driver.share("a", "b", 800, 2400)
            driver.resize("b", 6 << 10)
            driver.rename(f"c{number}", f"d{number}")
            driver.fail_journal(WORK)
            driver.freeze("a")
            driver.work(WORK)
            driver.kill_host()
            driver.overwrite("a", 1000, 6 * REQUEST)
            driver.overwrite("b", 0, 4 * REQUEST)
            driver.work(WORK)
            driver.rollback("a", "one")
            driver.resize("b", 8 << 10)
            driver.work(WORK)
            driver.rm(f"d{number}")
            driver.rm("a@one")
            driver.rm("b@one")
            driver.work(WORK)
            driver.rm(f"i{number}")
    finally:
        driver.stop()
    driver.verify()
