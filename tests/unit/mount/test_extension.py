from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from silofs.mount import extension

SOURCE = extension.LIBRARY.with_suffix(".c")
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Werror"]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("optimised", ["-O0", "-O2"])
def test_it_compiles_without_a_warning(tmp_path: Path, optimised: str) -> None:
    command = ["gcc", *STRICT, optimised, "-shared", "-fPIC", "-o", tmp_path / "dispatch.so", SOURCE, "-lfuse3", "-ldl"]
    subprocess.run(command, check=True)


def test_the_daemon_loads_it_before_pyfuse3() -> None:
    code = "import silofs.daemon; from silofs.mount import extension; print(extension.available)"
    assert python(code, SILOFS_EXTENSION="") == "True"
    assert python(code, SILOFS_EXTENSION="off") == "False"


def test_it_does_nothing_after_pyfuse3() -> None:
    code = "import pyfuse3; from silofs.mount import extension; print(extension.available)"
    assert python(code, SILOFS_EXTENSION="") == "False"


def test_without_it_everything_is_there_and_says_nothing() -> None:
    code = (
        "from silofs.mount import extension as e; e.install(print); "
        "print(e.available, e.abilities, e.request_unique(), list(e.request))"
    )
    assert python(code, SILOFS_EXTENSION="off") == "False () None [0, 0, 0, 0, 0, 0]"


def test_an_installation_without_a_compiler_works(tmp_path: Path) -> None:
    """The extension is then left out, and setup.py says so and succeeds."""
    root = SOURCE.parents[3]
    (tmp_path / "silofs/mount/extension").mkdir(parents=True)
    for name in ("setup.py", "silofs/mount/extension/dispatch.c"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    environment = {**os.environ, "CC": "/nonexistent/cc"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, env=environment, check=True
    )
    assert not list(tmp_path.rglob("*.so"))
