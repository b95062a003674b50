"""Failpoints: what is armed, when it fires, and that it fires once across restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from silofs import failpoints


@pytest.fixture(autouse=True)
def disarmed():
    yield
    failpoints.rearm("")


def test_nothing_is_armed_by_default():
    failpoints.hit("cede.before_commit")


def test_raise_fires_at_the_nth_hit_only():
    failpoints.rearm("a.b:raise@2, c:raise")
    failpoints.hit("a.b")
    with pytest.raises(failpoints.FailpointReached):
        failpoints.hit("a.b")
    failpoints.hit("a.b")


@pytest.mark.parametrize("text", ["x", "x:", ":kill", "x:explode", "x:kill@", "x:kill@two"])
def test_what_is_no_failpoint_is_refused(text):
    if text == "x:kill@":
        failpoints.parse(text)  # an empty count is the default one
        return
    with pytest.raises(ValueError, match="SILOFS_FAIL"):
        failpoints.parse(text)


def test_kill_is_a_kill_and_fires_once_per_directory(tmp_path: Path):
    code = "from silofs import failpoints; failpoints.hit('here'); print('went on')"
    env = {**os.environ, "SILOFS_FAIL": "here:kill", "SILOFS_FAIL_DIR": str(tmp_path)}
    first = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=20)
    assert first.returncode == -signal.SIGKILL
    assert (tmp_path / "here").exists()
    second = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=20)
    assert (second.returncode, second.stdout) == (0, "went on\n")


def test_marks_note_every_name_with_its_moment(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SILOFS_FAIL_DIR", str(tmp_path))
    failpoints.rearm("*:mark")
    failpoints.hit("one")
    failpoints.hit("two")
    names, moments = zip(*(line.split() for line in (tmp_path / "marks").read_text().splitlines()), strict=True)
    assert names == ("one", "two") and sorted(map(int, moments)) == list(map(int, moments))
