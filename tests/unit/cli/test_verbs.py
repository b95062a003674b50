"""Every verb on volumes, without a daemon and through one: its JSON fields, what it does, how it refuses."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from silofs import limits
from silofs.cli import client, runner
from silofs.verbs import READS, WRITES
from tests.unit.cli.commands import Silofs, daemon, image

SIZE = 1 << 30
INFO = {
    "schema": str,
    "name": str,
    "uuid": str,
    "path": (str, type(None)),
    "virtual_size": int,
    "allocated": int,
    "unique": int,
    "shared": int,
    "chain_depth": int,
    "role": str,
    "epoch": int,
    "open_count": int,
    "parent": (str, type(None)),
    "snapshots": list,
}
TIME = re.compile(r"20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-6][0-9]Z")


def check_info(fields: dict[str, object], verb: str | None) -> None:
    for key, kind in INFO.items():
        if key == "schema" and verb is None:
            continue
        assert isinstance(fields[key], kind), key  # type: ignore[arg-type]
    if verb is not None:
        assert fields["schema"] == f"silofs.{verb}/1"
    assert fields["unique"] + fields["shared"] == fields["allocated"]  # type: ignore[operator]


def test_create_and_info(either: Silofs) -> None:
    made = either.ok("create", "vm1", "--size", "1G")
    check_info(made, "create")
    assert (made["virtual_size"], made["allocated"], made["role"], made["epoch"]) == (SIZE, 0, "owner", 1)
    shown = either.ok("info", "vm1")
    check_info(shown, "info")
    assert {**shown, "schema": None} == {**made, "schema": None}
    assert shown["chain_depth"] == 1


def test_ls(either: Silofs) -> None:
    assert either.ok("ls") == {"schema": "silofs.ls/1", "volumes": []}
    for name in ("b", "a"):
        either.ok("create", name, "--size", "4096")
    listed = either.ok("ls")["volumes"]
    assert [volume["name"] for volume in listed] == ["a", "b"]
    for volume in listed:
        check_info(volume, None)
    assert either("ls").out.splitlines()[1].split()[:3] == ["a", "4.0", "KiB"]


def test_a_snapshot_and_what_info_says_of_it(either: Silofs) -> None:
    either.ok("create", "vm1", "--size", "1G")
    taken = either.ok("snapshot", "vm1@daily")
    assert (taken["schema"], taken["volume"], taken["snapshot"]) == ("silofs.snapshot/1", "vm1", "daily")
    (shown,) = either.ok("info", "vm1")["snapshots"]
    assert (shown["name"], shown["size"]) == ("daily", SIZE)
    assert TIME.fullmatch(shown["created"])
    assert "daily" in either("info", "vm1").out


def test_snapshots_of_several_volumes_are_all_or_none(either: Silofs) -> None:
    for name in ("vm1", "vm2"):
        either.ok("create", name, "--size", "1G")
    taken = either.ok("snapshot", "vm1@s", "vm2@s")
    assert [(each["volume"], each["snapshot"], each["size"]) for each in taken["snapshots"]] == [
        ("vm1", "s", SIZE),
        ("vm2", "s", SIZE),
    ]
    assert "volume" not in taken
    assert either.fails(11, "snapshot", "vm1@t", "vm2@s")["code"] == "exists"
    assert either.fails(10, "snapshot", "vm1@t", "nosuch@t")["code"] == "no_such_volume"
    assert either.fails(2, "snapshot", "vm1@t", "vm1@t")["code"] == "invalid"
    assert [each["name"] for each in either.ok("info", "vm1")["snapshots"]] == ["s"]
    assert either("snapshot", "vm1@t", "vm1@u").err == "kept vm1@t vm1@u\n"


def test_clones_say_where_they_come_from_and_share(either: Silofs, tmp_path: Path) -> None:
    either.ok("import", image(tmp_path / "i", SIZE, 0, 7, 4096), "golden")
    either.ok("snapshot", "golden@v1")
    clone = either.ok("clone", "golden@v1", "vm1")
    check_info(clone, "clone")
    assert (clone["parent"], clone["allocated"], clone["shared"], clone["unique"]) == ("golden@v1", 12288, 12288, 0)
    assert either.ok("info", "golden")["parent"] is None
    # A snapshot of a clone that wrote nothing names its source's layer; neither becomes the other's child by it.
    either.ok("snapshot", "vm1@same")
    assert either.ok("info", "golden")["parent"] is None
    assert either.ok("info", "vm1")["parent"] == "golden@v1"
    assert either.ok("clone", "golden", "vm2")["allocated"] == 12288


def test_rm_keeps_clones(either: Silofs, tmp_path: Path) -> None:
    source = image(tmp_path / "i", 4 << 20, 3)
    either.ok("import", source, "golden")
    either.ok("snapshot", "golden@v1")
    either.ok("clone", "golden@v1", "vm1")
    assert either.ok("rm", "golden", "--yes")["snapshots_removed"] == 1
    left = either.ok("info", "vm1")
    assert (left["parent"], left["unique"], left["shared"]) == (None, 4096, 0)
    either.ok("export", "vm1", tmp_path / "o")
    assert (tmp_path / "o").read_bytes() == source.read_bytes()


def test_rm_of_a_volume_with_snapshots_asks(either: Silofs) -> None:
    either.ok("create", "vm1", "--size", "1G")
    either.ok("snapshot", "vm1@a")
    error = either.fails(11, "rm", "vm1")
    assert error["code"] == "busy"
    assert "--yes" in error["hint"]
    assert either.ok("rm", "vm1@a") == {
        "schema": "silofs.rm/1",
        "volume": "vm1",
        "snapshot": "a",
        "snapshots_removed": 1,
    }
    either.ok("rm", "vm1")
    assert either.ok("ls")["volumes"] == []


def test_rollback(either: Silofs, tmp_path: Path) -> None:
    either.ok("import", image(tmp_path / "i", 4 << 20, 3), "vm1")
    either.ok("snapshot", "vm1@a")
    either.ok("resize", "vm1", "8192", "--yes")
    assert either.ok("info", "vm1")["allocated"] == 0
    assert "--yes" in either.fails(11, "rollback", "vm1@a")["hint"]
    back = either.ok("rollback", "vm1@a", "--yes")
    check_info(back, "rollback")
    assert (back["virtual_size"], back["allocated"]) == (4 << 20, 4096)
    assert either.fails(10, "rollback", "vm1@b")["code"] == "no_such_snapshot"
    assert either.ok("check")["damaged"] == 0


def test_rename_and_resize(either: Silofs) -> None:
    either.ok("create", "vm1", "--size", "1G")
    check_info(either.ok("rename", "vm1", "vm2"), "rename")
    either.fails(10, "info", "vm1")
    assert either.ok("resize", "vm2", "2G")["virtual_size"] == 2 * SIZE
    error = either.fails(11, "resize", "vm2", "1G")
    assert "--yes" in error["hint"]
    check_info(either.ok("resize", "vm2", "1G", "--yes"), "resize")


def test_df_and_du(either: Silofs, tmp_path: Path) -> None:
    either.ok("import", image(tmp_path / "i", SIZE, 1, 2), "vm1")
    space = either.ok("df")
    assert space["schema"] == "silofs.df/1"
    for key in ("total", "used", "free", "available", "file_bytes", "data_bytes", "virtual_bytes"):
        assert isinstance(space[key], int), key
    assert (space["volumes"], space["data_bytes"], space["virtual_bytes"]) == (1, 8192, SIZE)
    used = either.ok("du")
    assert used["schema"] == "silofs.du/1"
    (row,) = used["volumes"]
    assert (row["name"], row["allocated"], row["unique"], row["freed_by_rm"]) == ("vm1", 8192, 8192, 8192)
    assert either.ok("du", "vm1")["volumes"] == [row]
    assert "8.0 KiB" in either("du").out
    assert "file system" in either("df").out


def test_check(either: Silofs, tmp_path: Path) -> None:
    either.ok("import", image(tmp_path / "i", 4 << 20, 1, 2), "vm1")
    either.ok("snapshot", "vm1@a")
    either.ok("clone", "vm1@a", "vm2")
    for flags in ([], ["--read-data"]):
        report = either.ok("check", *flags)
        assert (report["schema"], report["type"]) == ("silofs.check/1", "result")
        assert (report["findings"], report["damaged"]) == ([], 0)
    assert either("check").err == "no damage found\n"


def test_check_finds_damage(silofs: Silofs, tmp_path: Path) -> None:
    silofs.ok("import", image(tmp_path / "i", 4 << 20, *range(0, 640, 16)), "vm1")
    data = silofs.store / "data" / "data.mdb"
    content = data.read_bytes()
    at = content.index(bytes([113]) * 4096)
    data.write_bytes(content[:at] + b"!" + content[at + 1 :])
    done = silofs("check", "--read-data", "--json")
    assert done.code == 4
    (finding,) = done.json["findings"]
    assert (finding["volume"], finding["page"]) == ("vm1", 112)
    assert silofs("check", "--read-data").out == finding["message"] + "\n"
    assert silofs.fails(4, "export", "vm1", tmp_path / "o")["code"] == "damaged"
    assert not (tmp_path / "o").exists()


def test_init(silofs: Silofs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    made = silofs.ok("init", "--store", other)
    assert (made["schema"], made["store"]) == ("silofs.init/1", str(other))
    assert re.fullmatch("[0-9a-f]{64}", made["fingerprint"])
    assert other.stat().st_mode & 0o777 == 0o700
    assert silofs.fails(11, "init", "--store", other)["code"] == "exists"
    file = tmp_path / "file"
    file.write_bytes(b"no directory")
    assert silofs.fails(2, "init", "--store", file)["hint"] == "check the path"
    assert silofs.ok("--store", str(other), "ls")["volumes"] == []


def test_a_mount_that_is_refused_makes_no_store(silofs: Silofs, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert silofs.fails(2, "mount", "--store", new, tmp_path / "nowhere")["code"] == "invalid"
    assert not new.exists()


def test_version(either: Silofs) -> None:
    shown = either.ok("version")
    assert (shown["schema"], shown["version"]) == ("silofs.version/1", "0.1.0")
    assert either("version").out == "silofs 0.1.0\n"
    assert either("--version").out == "silofs 0.1.0\n"


def test_doctor(silofs: Silofs) -> None:
    done = silofs("doctor", "--json")
    assert done.code in (0, 1, 3)
    report = done.json
    assert report["schema"] == "silofs.doctor/1"
    worse = [check for check in report["checks"] if check["status"] != "ok"]
    assert report["warnings"] == len(worse)
    assert (done.code == 0) == (not worse)
    names = {"kernel", "dev_fuse", "qemu_img", "file_system", "free_space", "journal"}
    assert names <= {check["name"] for check in report["checks"]}
    assert silofs("doctor").out


# What is refused


@pytest.mark.parametrize(
    "args",
    [
        ["info", "nosuch"],
        ["clone", "nosuch", "vm2"],
        ["rm", "nosuch"],
        ["rename", "nosuch", "vm2"],
        ["resize", "nosuch", "1G"],
        ["snapshot", "nosuch@a"],
        ["export", "nosuch", "file"],
        ["du", "nosuch"],
    ],
    ids=lambda args: args[0],
)
def test_a_volume_that_is_not_there(either: Silofs, args: list[str]) -> None:
    error = either.fails(10, *args)
    assert error["schema"] == f"silofs.{args[0]}/1"
    assert (error["code"], error["message"]) == ("no_such_volume", "there is no volume 'nosuch'")
    assert error["hint"] == "silofs ls lists the volumes of this store"


def test_a_snapshot_that_is_not_there(either: Silofs, tmp_path: Path) -> None:
    either.ok("create", "vm1", "--size", "1G")
    for args in (["clone", "vm1@x", "vm2"], ["rm", "vm1@x"], ["export", "vm1@x", str(tmp_path / "o")]):
        assert either.fails(10, *args)["code"] == "no_such_snapshot"
    assert not list(tmp_path.glob("*o*[!r]e"))


def test_a_name_that_is_taken(either: Silofs, tmp_path: Path) -> None:
    either.ok("create", "vm1", "--size", "1G")
    either.ok("create", "vm2", "--size", "1G")
    either.ok("snapshot", "vm1@a")
    source = image(tmp_path / "i", SIZE, 1)
    for args in (
        ["create", "vm1", "--size", "2G"],
        ["clone", "vm2", "vm1"],
        ["rename", "vm2", "vm1"],
        ["snapshot", "vm1@a"],
        ["import", str(source), "vm1"],
    ):
        assert either.fails(11, *args)["code"] == "exists", args
    assert either.ok("info", "vm1")["virtual_size"] == SIZE


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".x", "vm1.img", "a" * 129, "ä", "a@b", "a\tb"])
def test_a_name_that_nothing_may_have(silofs: Silofs, name: str) -> None:
    assert silofs.fails(2, "create", "--size", "1G", "--", name)["code"] == "bad_name"
    assert silofs.fails(2, "info", "--", name)["code"] == "bad_name"


def test_a_name_that_looks_like_an_option(silofs: Silofs) -> None:
    assert silofs("create", "-rf", "--size", "1G").code == 2
    assert silofs("create", "--size", "1G", "--", "-rf").code == 2


@pytest.mark.parametrize("size", ["0", "1000", "512", "4097", "-1G", "lots", "2P", ""])
def test_a_size_that_no_volume_can_have(silofs: Silofs, size: str) -> None:
    assert silofs.fails(2, "create", "vm1", f"--size={size}")["code"] == "bad_size"
    assert silofs.ok("ls")["volumes"] == []


@pytest.mark.parametrize(
    "args",
    [[], ["nosuchverb"], ["create"], ["create", "vm1"], ["ls", "--nosuch"], ["info", "a", "b"], ["top", "vm1"]],
)
def test_a_command_line_that_is_wrong(silofs: Silofs, args: list[str]) -> None:
    done = silofs(*args)
    assert done.code == 2
    assert done.err
    assert "Traceback" not in done.err


def test_a_wrong_command_line_in_json(silofs: Silofs) -> None:
    error = silofs.fails(2, "create", "vm1")
    assert (error["schema"], error["code"]) == ("silofs.create/1", "invalid")
    error = silofs.fails(2, "migration", "show")
    assert error["schema"] == "silofs.migration_show/1"


def test_a_store_that_is_not_there(silofs: Silofs, tmp_path: Path) -> None:
    for args in (["ls"], ["create", "vm1", "--size", "1G"], ["status"], ["check"]):
        assert silofs.fails(10, *args, "--store", tmp_path / "nothing")["code"] == "no_store", args
    assert not (tmp_path / "nothing").exists()


def test_what_needs_a_daemon_says_so(silofs: Silofs) -> None:
    for args in (["status"], ["restart"], ["peer", "ls"], ["migrate", "vm1", "--to", "b"], ["migration", "ls"]):
        error = silofs.fails(1, *args)
        assert error["code"] == "no_daemon"
        assert "silofs mount" in error["hint"]


def test_status(silofs: Silofs) -> None:
    silofs.ok("create", "vm1", "--size", "1G")
    with daemon(silofs.store):
        status = silofs.ok("status")
        assert status["schema"] == "silofs.status/1"
        assert (status["state"], status["mountpoint"], status["volumes"]) == ("serving", "/mnt/silo", 1)
        for key in ("daemon_pid", "holder_pid", "restarts", "dirty_bytes", "migrations"):
            assert isinstance(status[key], int), key
        assert status["capabilities"] == ["resend"]
        assert status["store"] == str(silofs.store)
        assert "serving" in silofs("status").out
        assert silofs.ok("info", "vm1")["path"] == "/mnt/silo/vm1.img"


def test_a_volume_that_is_open_is_not_removed(silofs: Silofs) -> None:
    uuid = silofs.ok("create", "vm1", "--size", "1G")["uuid"]
    with daemon(silofs.store) as log:
        log.handles.allocate(bytes.fromhex(uuid.replace("-", "")), 2)
        assert silofs.ok("info", "vm1")["open_count"] == 1
        assert silofs.fails(11, "rm", "vm1")["code"] == "busy"


WRONG: list[object] = [
    None,
    7,
    True,
    "",
    "../x",
    "a\0b",
    "\ud800",
    "x" * 5000,
    [],
    {},
    1e300,
    float("nan"),
    -1,
    1 << 70,
    "vm1.img",
]
ARGUMENTS = ["name", "volume", "snapshot", "source", "new", "old", "size", "shrink", "force", "read_data", "targets"]


def test_arguments_that_no_client_of_ours_sends(silofs: Silofs) -> None:
    from silofs.cli.client import connect, request
    from silofs.errors import SiloError

    silofs.ok("create", "vm1", "--size", "1G")
    before = silofs.ok("ls")
    seen = set()
    with daemon(silofs.store), open("/dev/null") as null:
        for verb in (*READS, *WRITES, "import", "export", "diff", "check", "status", "nosuch"):
            for wrong in WRONG:
                sock = connect(silofs.store)
                assert sock is not None
                args = dict.fromkeys(ARGUMENTS, wrong)
                with sock:
                    try:
                        request(sock, verb, args, fds=[null.fileno()] * (verb in ("import", "export", "diff")))
                        assert verb in ("ls", "df", "du", "count", "status", "check"), (verb, wrong)
                    except SiloError as error:
                        assert error.exit_code in (2, 10), (verb, wrong, error)
                        seen.add(error.code)
        assert silofs.ok("ls")["volumes"][0]["name"] == "vm1"
    assert silofs.ok("ls") == before
    assert {"invalid", "bad_name", "unsupported"} <= seen


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_store_of_another_user(silofs: Silofs) -> None:
    silofs.store.parent.chmod(0o755)
    for verb in ("ls", "status"):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                code = silofs(verb).code
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 12, verb


def test_a_verb_that_the_daemon_does_not_have(silofs: Silofs) -> None:
    with daemon(silofs.store):
        assert silofs.fails(2, "peer", "ls")["code"] == "unsupported"


def test_while_a_holder_lives_without_a_daemon(silofs: Silofs, monkeypatch: pytest.MonkeyPatch) -> None:
    from silofs.layers.store import Store

    monkeypatch.setattr(limits, "HOLDER_WAIT_S", 0.05)
    with Store.open(silofs.store):
        for args in (["ls"], ["create", "vm1", "--size", "1G"], ["restart"], ["status"]):
            assert silofs.fails(75, *args)["code"] == "try_again", args


def test_what_a_dying_daemon_leaves_unsaid(silofs: Silofs) -> None:
    import socket
    import threading

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(silofs.store / "control.sock"))
        listener.listen()

        def die() -> None:
            for _ in range(2):
                sock, _ = listener.accept()
                sock.recv(100)
                sock.send(b'{"type": "progr')
                sock.close()

        thread = threading.Thread(target=die)
        thread.start()
        error = silofs.fails(75, "snapshot", "vm1@a")
        thread.join()
    assert error["code"] == "try_again"


# How it talks


def test_data_goes_to_stdout_and_the_rest_to_stderr(silofs: Silofs) -> None:
    done = silofs("create", "vm1", "--size", "1G")
    assert (done.out, done.err) == ("", "created vm1, 1.0 GiB\n")
    done = silofs("create", "vm2", "--size", "1G", "-q")
    assert (done.out, done.err) == ("", "")
    done = silofs("ls", "-q")
    assert done.out
    assert not done.err


def test_a_traceback_only_with_debug(silofs: Silofs) -> None:
    assert "Traceback" not in silofs("info", "nosuch").err
    assert "NoSuchVolume" in silofs("info", "nosuch", "--debug").err


def test_an_answer_on_a_terminal(silofs: Silofs, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    silofs.ok("create", "vm1", "--size", "1G")
    silofs.ok("snapshot", "vm1@a")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    for answer in ("", "n\n", "nonsense\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert silofs("rm", "vm1").code == 130
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert silofs("rm", "vm1").code == 0
    assert "vm1 has 1 snapshot: remove it with them? [y/N]" in shown.getvalue()
    assert silofs("info", "vm1").code == 10


def test_a_reader_that_went_away_is_no_bug(silofs: Silofs, tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        f"{sys.executable} -m silofs.cli.main ls --json | true; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr


def test_light_verbs_import_nothing_heavy() -> None:
    import subprocess
    import sys

    script = (
        "import sys; from silofs.cli.main import run; run(sys.argv[1:]);"
        "heavy = {'trio', 'lmdb', 'numpy', 'rich', 'pyfuse3', 'cryptography', 'click'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for args, loaded in ((["--version"], "[]"), (["--help"], "['click']"), (["peer", "ls"], "['click']")):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == loaded, args


@pytest.mark.parametrize("command", [["ls", "--json"], ["ls"], ["info", "vm1"], ["info", "none", "--json"]])
def test_output_that_nobody_takes_is_not_called_a_full_store(silofs: Silofs, command: list[str]) -> None:
    silofs.ok("create", "vm1", "--size", "1M")
    program = [sys.executable, "-m", "silofs.cli.main", *command]
    environment = {**os.environ, "SILOFS_STORE": str(silofs.store)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    what = done.stderr.splitlines()
    assert len(what) == 2 and done.returncode == (10 if "none" in command else 1)
    assert "there is no volume" in what[0] if "none" in command else "the output cannot be written" in what[0]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *program]
    closed = subprocess.run(shell, capture_output=True, check=False, env=environment)
    assert closed.returncode == (10 if "none" in command else 0) and b"bug" not in closed.stderr


@pytest.mark.parametrize("verb", ["ls", "create"])
def test_what_only_looks_is_asked_again_when_the_daemon_dies_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    asked = []

    def request(sock: object, verb: str, *_: object, **rest: object) -> dict[str, object]:
        asked.append(verb)
        if len(asked) < 3:
            raise client.Gone("the daemon went away before it answered")
        return {"volumes": []}

    monkeypatch.setattr(runner, "daemon", lambda store, needed: contextlib.nullcontext())
    monkeypatch.setattr(runner, "request", request)
    if verb == "ls":
        assert runner.call(tmp_path, verb, {}) == {"volumes": []} and len(asked) == 3
    else:
        with pytest.raises(client.Gone):
            runner.call(tmp_path, verb, {})
        assert len(asked) == 1
