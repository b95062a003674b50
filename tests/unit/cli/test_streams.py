"""Streams between two stores, without a daemon and through one: full, incremental, chained, interrupted, refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs.errors import Busy
from silofs.layers.store import Store
from silofs.stream import FRAME, SUM_BYTES, Decoder
from tests.storerig import Rig
from tests.unit.cli.commands import PAGE, Silofs, daemon, image

SIZE = 16 << 20


class Other:
    """Commands on a second store: `there.ok("info", "vm1")`."""

    def __init__(self, silofs: Silofs, path: Path) -> None:
        Store.create(path)
        self.path = path
        self._silofs = silofs

    def ok(self, *args: str | Path) -> dict[str, object]:
        return self._silofs.ok("--store", self.path, *args)

    def fails(self, code: int, *args: str | Path) -> dict[str, object]:
        return self._silofs.fails(code, "--store", self.path, *args)


@pytest.fixture(params=["alone", "daemon"])
def there(request: pytest.FixtureRequest, silofs: Silofs, tmp_path: Path) -> Iterator[Other]:
    other = Other(silofs, tmp_path / "there")
    if request.param == "alone":
        yield other
        return
    with daemon(other.path):
        yield other


def content(silofs: Silofs, store: Path, name: str, scratch: Path) -> bytes:
    silofs.ok("--store", store, "export", name, scratch, "--force")
    return scratch.read_bytes()


def change(silofs: Silofs, name: str, seed: int) -> None:
    """Write, zero and leave pages of a volume at random."""
    rng = random.Random(seed)
    with Store.open(silofs.store) as store:
        rig = Rig.over(store)
        with store.reader() as txn:
            volume = txn.volume_by_name(name)
        for _ in range(60):
            page = rng.randrange(volume.size // PAGE)
            rig.write(volume.uuid, page * PAGE, rng.choice([bytes(PAGE), rng.randbytes(PAGE), b"z" * PAGE]))
        first = rng.randrange(volume.size // PAGE)
        rig.zero(volume.uuid, first, min(volume.size // PAGE, first + 700))
        rig.commit()


def test_a_chain_of_increments(silofs: Silofs, there: Other, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", SIZE, *range(0, 4096, 5)), "vm1")
    silofs.ok("snapshot", "vm1@s0")
    full = silofs.ok("export", "vm1@s0", tmp_path / "s0", "--format", "stream")
    assert (full["format"], full["size"], full["data_bytes"], full["bytes_kept"]) == ("stream", SIZE, 820 * PAGE, 0)
    assert full["bytes_written"] == (tmp_path / "s0").stat().st_size < 820 * PAGE // 10  # zstd pays here
    made = there.ok("import", tmp_path / "s0", "vm1")
    assert (made["schema"], made["type"], made["snapshot"]) == ("silofs.import/1", "result", "s0")
    assert (made["bytes_stored"], made["bytes_skipped"]) == (820 * PAGE, 0)
    for at in range(1, 5):
        change(silofs, "vm1", at)
        if at == 2:
            silofs.ok("resize", "vm1", str(SIZE // 2 + 512), "--yes")
        if at == 3:
            silofs.ok("resize", "vm1", str(2 * SIZE))
        silofs.ok("snapshot", f"vm1@s{at}")
        sent = silofs.ok("export", f"vm1@s{at}", tmp_path / f"s{at}", "--since", f"vm1@s{at - 1}")
        silofs.ok("rm", f"vm1@s{at - 1}")
        assert sent["format"] == "stream"
        got = there.ok("import", "--onto", "vm1", tmp_path / f"s{at}")
        assert got["bytes_stored"] == sent["data_bytes"]
        assert got["zero_bytes"] <= sent["zero_bytes"]
        # What changed, and not the volume.
        assert sent["data_bytes"] <= 60 * PAGE
        for name in ("vm1", f"vm1@s{at}"):
            mine = content(silofs, silofs.store, name, tmp_path / "a")
            assert content(silofs, there.path, name, tmp_path / "b") == mine
    assert [each["name"] for each in there.ok("info", "vm1")["snapshots"]] == [f"s{at}" for at in range(5)]  # type: ignore[attr-defined]
    assert there.ok("check", "--read-data")["damaged"] == 0
    # A day on which nothing was written: only the name comes.
    silofs.ok("snapshot", "vm1@s5")
    assert silofs.ok("export", "vm1@s5", tmp_path / "s5", "--since", "vm1@s4")["bytes_written"] < 1000
    for _ in range(2):
        got = there.ok("import", "--onto", "vm1", tmp_path / "s5")
        assert (got["bytes_stored"], len(got["snapshots"])) == (0, 6)  # type: ignore[arg-type]
    # And back: what this store has been sent has the same name there.
    there.ok("clone", "vm1@s5", "vm2")
    there.ok("resize", "vm2", "8192", "--yes")
    there.ok("snapshot", "vm2@back")
    there.ok("export", "vm2@back", tmp_path / "back", "--since", "vm1@s5")
    silofs.ok("import", "--onto", "vm1", tmp_path / "back")
    assert silofs.ok("info", "vm1")["virtual_size"] == 8192


def test_states_that_part_are_sent_too(silofs: Silofs, tmp_path: Path) -> None:
    """After a rollback the newer snapshot does not descend from the older one: the difference is right all the same."""
    there = Other(silofs, tmp_path / "there")
    silofs.ok("import", image(tmp_path / "i", SIZE, *range(50)), "vm1")
    silofs.ok("snapshot", "vm1@root")
    change(silofs, "vm1", 1)
    silofs.ok("snapshot", "vm1@one")
    silofs.ok("rollback", "vm1@root", "--yes")
    change(silofs, "vm1", 2)
    silofs.ok("snapshot", "vm1@two")
    silofs.ok("export", "vm1@one", tmp_path / "one", "--format", "stream")
    silofs.ok("export", "vm1@two", tmp_path / "two", "--since", "vm1@one")
    there.ok("import", tmp_path / "one", "vm1")
    there.ok("import", "--onto", "vm1", tmp_path / "two")
    assert content(silofs, there.path, "vm1", tmp_path / "b") == content(silofs, silofs.store, "vm1", tmp_path / "a")


def test_what_does_not_fit(silofs: Silofs, there: Other, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", SIZE, 1), "vm1")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    change(silofs, "vm1", 1)
    silofs.ok("snapshot", "vm1@b")
    silofs.ok("export", "vm1@b", tmp_path / "more", "--since", "vm1@a")
    change(silofs, "vm1", 2)
    silofs.ok("snapshot", "vm1@c")
    silofs.ok("export", "vm1@c", tmp_path / "last", "--since", "vm1@b")
    assert "--onto" in str(there.fails(2, "import", tmp_path / "more", "vm1")["hint"])
    assert there.fails(10, "import", "--onto", "vm1", tmp_path / "more")["code"] == "no_such_volume"
    there.ok("create", "vm1", "--size", str(SIZE))
    assert "never been at vm1@a" in str(there.fails(11, "import", "--onto", "vm1", tmp_path / "more")["message"])
    assert there.fails(2, "import", "--onto", "vm1", tmp_path / "full")["code"] == "invalid"
    assert there.fails(11, "import", tmp_path / "full", "vm1")["code"] == "exists"
    there.ok("import", tmp_path / "full", "copy")
    assert there.fails(11, "import", "--onto", "copy", tmp_path / "last")["code"] == "busy"
    there.ok("resize", "copy", str(2 * SIZE))
    changed = there.fails(11, "import", "--onto", "copy", tmp_path / "more")
    assert "changed since" in str(changed["message"])
    assert "silofs rollback copy@a --yes" in str(changed["hint"])
    there.ok("rollback", "copy@a", "--yes")
    there.ok("import", "--onto", "copy", tmp_path / "more")
    again = there.ok("import", "--onto", "copy", tmp_path / "more")  # once more does no harm
    assert (again["bytes_stored"], again["snapshot"]) == (0, "b")
    there.ok("import", "--onto", "copy", tmp_path / "last")
    assert there.fails(2, "import", "--onto", "copy", tmp_path / "i")["code"] == "bad_stream"
    assert there.fails(2, "import", tmp_path / "i", "new", "--format", "stream")["code"] == "bad_stream"
    assert there.fails(2, "import", tmp_path / "full", "new", "--size", "1G")["code"] == "invalid"
    assert silofs.fails(2, "export", "vm1", tmp_path / "o", "--format", "stream")["code"] == "bad_name"
    since = ["--since", "vm1@a", "--format", "raw"]
    assert silofs.fails(2, "export", "vm1@b", tmp_path / "o", *since)["code"] == "invalid"
    assert silofs.fails(10, "export", "vm1@b", tmp_path / "o", "--since", "vm1@nosuch")["code"] == "no_such_snapshot"
    assert not (tmp_path / "o.part").exists()


def test_an_import_that_breaks_off_goes_on(silofs: Silofs, there: Other, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", 64 << 20, *range(8000)), "vm1")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    data = (tmp_path / "full").read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[: len(data) * 2 // 3])
    before = there.ok("ls")["volumes"]
    broken = there.fails(2, "import", cut, "vm1")
    assert broken["code"] == "bad_stream"
    assert "ends before its end" in str(broken["message"])
    assert there.ok("ls")["volumes"] == before
    got = there.ok("import", tmp_path / "full", "vm1")
    assert got["bytes_stored"] + got["bytes_skipped"] == 8000 * PAGE  # type: ignore[operator]
    assert got["bytes_skipped"] > 3000 * PAGE  # type: ignore[operator]
    assert content(silofs, there.path, "vm1", tmp_path / "b") == (tmp_path / "i").read_bytes()
    there.fails(2, "import", cut, "vm2")
    assert there.fails(10, "import", "--abandon", "vm1")["code"] == "no_such_volume"


def test_what_an_import_left_can_be_dropped(silofs: Silofs, there: Other, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", 64 << 20, *range(8000)), "vm1")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    data = (tmp_path / "full").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    there.fails(2, "import", tmp_path / "cut", "vm1")
    (kept,) = there.ok("du")["arriving"]  # type: ignore[misc]
    assert kept["name"] == "vm1"
    assert there.ok("import", "--abandon", "vm1")["bytes_dropped"] == kept["bytes"] > 0
    assert (there.ok("du")["stored"], there.ok("du")["arriving"]) == (0, [])
    assert there.fails(10, "import", "--abandon", "vm1")["code"] == "no_such_volume"
    assert there.ok("import", tmp_path / "full", "vm1")["bytes_skipped"] == 0


def test_what_an_import_left_goes_with_its_volume(silofs: Silofs, there: Other, tmp_path: Path) -> None:
    silofs.ok("create", "vm1", "--size", str(64 << 20))
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    silofs.ok("import", image(tmp_path / "i", 64 << 20, *range(8000)), "vm2")
    silofs.ok("snapshot", "vm2@b")
    silofs.ok("export", "vm2@b", tmp_path / "more", "--since", "vm1@a")
    there.ok("import", tmp_path / "full", "vm1")
    (tmp_path / "cut").write_bytes((tmp_path / "more").read_bytes()[:-100])
    there.fails(2, "import", "--onto", "vm1", tmp_path / "cut")
    assert there.ok("du")["stored"] > 0  # type: ignore[operator]
    there.ok("rm", "vm1", "--yes")
    assert (there.ok("du")["stored"], there.ok("du")["arriving"]) == (0, [])


def frames_of(data: bytes) -> list[bytes]:
    """The header, then each frame, as bytes."""
    at = 0

    def read(length: int) -> bytes:
        nonlocal at
        at += length
        return data[at - length : at]

    decoder = Decoder(read)
    parts, start = [data[:at]], at
    for _ in decoder.frames():
        parts.append(data[start:at])
        start = at
    parts.append(data[start:at])
    return parts


@pytest.mark.parametrize("what", ["flip", "swap", "drop", "twice", "cut", "tail of another"])
def test_a_stream_that_is_not_what_was_sent(silofs: Silofs, tmp_path: Path, what: str) -> None:
    there = Other(silofs, tmp_path / "there")
    silofs.ok("import", image(tmp_path / "i", SIZE, *range(1500)), "vm1")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    there.ok("import", tmp_path / "full", "vm1")
    change(silofs, "vm1", 1)
    silofs.ok("import", image(tmp_path / "j", SIZE, *range(0, 3000, 2)), "vm2")
    silofs.ok("snapshot", "vm2@b")
    silofs.ok("export", "vm2@b", tmp_path / "more", "--since", "vm1@a")
    parts = frames_of((tmp_path / "more").read_bytes())
    assert len(parts) >= 5
    assert len(parts[-1]) > FRAME.size + SUM_BYTES
    if what == "flip":
        parts[2] = parts[2][:70] + bytes([parts[2][70] ^ 1]) + parts[2][71:]
    elif what == "swap":
        parts[2], parts[3] = parts[3], parts[2]
    elif what == "drop":
        del parts[2]
    elif what == "twice":
        parts.insert(2, parts[2])
    elif what == "cut":
        del parts[-1]
    else:
        parts[-1] = frames_of((tmp_path / "full").read_bytes())[-1]
    (tmp_path / "wrong").write_bytes(b"".join(parts))
    before = there.ok("info", "vm1")
    assert there.fails(2, "import", "--onto", "vm1", tmp_path / "wrong")["code"] == "bad_stream"
    # What has arrived lies on the volume's layer, which therefore counts as shared for now.
    counted = ("unique", "shared")
    assert {**there.ok("info", "vm1"), **dict.fromkeys(counted)} == {**before, **dict.fromkeys(counted)}
    assert content(silofs, there.path, "vm1", tmp_path / "b") == (tmp_path / "i").read_bytes()
    got = there.ok("import", "--onto", "vm1", tmp_path / "more")
    assert got["bytes_skipped"] > 0  # type: ignore[operator]
    assert content(silofs, there.path, "vm1", tmp_path / "b") == (tmp_path / "j").read_bytes()


def test_an_export_that_was_interrupted_goes_on(silofs: Silofs, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", 64 << 20, *range(8000)), "vm1")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "whole", "--format", "stream")
    whole = (tmp_path / "whole").read_bytes()
    part, out = tmp_path / "out.part", tmp_path / "out"
    header = len(frames_of(whole)[0])
    for keep, kept in ((0, 0), (10, 0), (header, 0), (header + 30, 0), (len(whole) // 2, 1), (len(whole), 1)):
        part.write_bytes(whole[:keep])
        done = silofs.ok("export", "vm1@a", out, "--format", "stream", "--force")
        assert (done["bytes_kept"] > 0) == bool(kept), keep
        assert done["bytes_kept"] + done["bytes_written"] == len(whole)
        assert out.read_bytes() == whole
        assert not part.exists()
    part.write_bytes(whole[: len(whole) // 2] + b"torn by a power cut" * 1000)
    assert silofs.ok("export", "vm1@a", out, "--format", "stream", "--force")["bytes_kept"] > len(whole) // 4
    assert out.read_bytes() == whole
    part.write_bytes(b"another file that somebody put there")
    assert silofs.ok("export", "vm1@a", out, "--format", "stream", "--force")["bytes_kept"] == 0
    assert out.read_bytes() == whole


def test_through_a_pipe(silofs: Silofs, there: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silofs.ok("import", image(tmp_path / "i", SIZE, *range(0, 4000, 3)), "vm1")
    silofs.ok("snapshot", "vm1@a")
    command = [sys.executable, "-m", "silofs.cli.main", "--store", str(silofs.store), "export", "vm1@a", "-", "-q"]
    for name, options in (("vm1", ["--format", "stream"]), ("raw", [])):
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE) as sender:
            monkeypatch.setattr(sys, "stdin", sender.stdout)
            there.ok("import", "-", name, *options)
            assert sender.wait() == 0
        assert content(silofs, there.path, name, tmp_path / "b") == (tmp_path / "i").read_bytes()


def test_a_stream_where_an_image_is_expected(silofs: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silofs.ok("create", "vm1", "--size", "1M")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    with subprocess.Popen(["cat", tmp_path / "full"], stdout=subprocess.PIPE) as sender:
        monkeypatch.setattr(sys, "stdin", sender.stdout)
        done = silofs("import", "-", "vm2")
    assert done.code == 2
    assert "--format stream" in done.err


def test_what_the_store_has_is_not_stored_again(silofs: Silofs, tmp_path: Path) -> None:
    """The same content under another name: a stream of it costs next to nothing."""
    there = Other(silofs, tmp_path / "there")
    source = tmp_path / "i"
    source.write_bytes(random.Random(3).randbytes(SIZE))
    silofs.ok("import", source, "vm1")
    silofs.ok("snapshot", "vm1@a")
    silofs.ok("export", "vm1@a", tmp_path / "full", "--format", "stream")
    there.ok("import", source, "other")
    before = (there.path / "data" / "data.mdb").stat().st_size
    got = there.ok("import", tmp_path / "full", "vm1")
    assert got["bytes_stored"] == SIZE
    assert got["bytes_shared"] > SIZE * 15 // 16  # type: ignore[operator]  # the rest did not fill a container
    assert there.ok("check", "--read-data")["damaged"] == 0
    assert (there.path / "data" / "data.mdb").stat().st_size < before + SIZE // 8


def test_what_is_said_of_an_export_that_was_stopped(tmp_path: Path) -> None:
    """A part is spoken of only where there is one."""
    from silofs.cli.exports import _again
    from silofs.cli.files import partial

    with partial(tmp_path / "full.st"):
        pass
    assert ".part" not in _again(tmp_path / "full.st")
    with partial(tmp_path / "full.st") as (fd, _):
        os.write(fd, b"begun")
    assert str(tmp_path / "full.st.part") in _again(tmp_path / "full.st")


def test_two_exports_to_one_file(tmp_path: Path) -> None:
    """The second is refused, and does not take away what the first has not begun to write."""
    from silofs.cli.files import partial

    with partial(tmp_path / "full.st") as (fd, path):
        with pytest.raises(Busy), partial(tmp_path / "full.st"):
            pass
        os.write(fd, b"all")
        assert path.read_bytes() == b"all"


def test_a_stream_to_a_file_that_only_the_shell_knows(
    either: Silofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    either.ok("create", "vm1", "--size", "1M")
    either.ok("snapshot", "vm1@s")
    assert either("export", "vm1@s", tmp_path / "named", "--format", "stream").code == 0
    with (tmp_path / "shell").open("w") as file:
        file.write("before")
        file.flush()
        monkeypatch.setattr("sys.stdout", file)
        assert either("export", "vm1@s", "-", "--format", "stream").code == 0
    assert (tmp_path / "shell").read_bytes() == b"before" + (tmp_path / "named").read_bytes()
