"""Real guests: Debian's cloud kernel and an initrd made here, under QEMU's TCG.

The initrd holds a static busybox, the virtio modules and a job: a shell script that runs with the disks as /dev/vda,
/dev/vdb, ... and whose output is the serial console. The guest powers off when the job ends.
"""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.qemu.qmp import Qmp

ROOT = Path(__file__).resolve().parents[2]

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp /sbin /usr/bin /usr/sbin
/bin/busybox --install -s
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in /modules/*; do insmod $module; done
echo 1 >/proc/sys/kernel/printk
for try in 1 2 3 4 5 6 7 8 9 10; do [ -e /dev/vda ] && break; sleep 0.1; done
echo GUEST-UP
if sh -e /job; then echo GUEST-OK; else echo GUEST-FAILED; fi
poweroff -f
"""


def kernel_directory() -> Path:
    """`vmlinuz` and `modules/`, unpacked on first use by scripts/guest-kernel."""
    run = subprocess.run([ROOT / "scripts" / "guest-kernel"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(run.stdout.strip())


def cpio_newc(entries: Mapping[str, tuple[int, bytes, tuple[int, int]]]) -> bytes:
    """A cpio archive (newc, see the kernel's early-userspace/buffer-format): name -> (mode, content, device number)."""
    archive = bytearray()

    def add(inode: int, name: str, mode: int, content: bytes, device: tuple[int, int]) -> None:
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        archive.extend(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(content)
        archive.extend(bytes(-len(archive) % 4))

    for inode, (name, (mode, content, device)) in enumerate(entries.items(), 1):
        add(inode, name, mode, content, device)
    add(0, "TRAILER!!!", 0, b"", (0, 0))
    return bytes(archive)


def build_initrd(path: Path, job: str) -> Path:
    """Write an initrd to `path` whose init runs `job` (POSIX shell, stops at the first error)."""
    directory, plain, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFREG | 0o755
    busybox = Path("/bin/busybox").read_bytes()
    entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {
        "bin": (directory, b"", (0, 0)),
        "dev": (directory, b"", (0, 0)),
        "modules": (directory, b"", (0, 0)),
        "dev/console": (stat.S_IFCHR | 0o600, b"", (5, 1)),
        "bin/busybox": (program, busybox, (0, 0)),
        "init": (program, INIT.encode(), (0, 0)),
        "job": (plain, job.encode(), (0, 0)),
    }
    for module in sorted((kernel_directory() / "modules").iterdir()):
        entries[f"modules/{module.name}"] = (plain, module.read_bytes(), (0, 0))
    path.write_bytes(gzip.compress(cpio_newc(entries), 1))
    return path


class Guest:
    """One QEMU process. A context manager: leaving it kills the process if it still runs.

    `disks` are raw files; `cache` is QEMU's cache mode for them. `incoming` waits for a migration instead of booting.
    """

    def __init__(
        self,
        directory: Path,
        initrd: Path,
        disks: Sequence[Path],
        *,
        name: str = "guest",
        cache: str = "none",
        incoming: str | None = None,
        memory_mib: int = 160,
    ) -> None:
        self.serial_path = directory / f"{name}.serial"
        self.serial_path.write_bytes(b"")
        self.log_path = directory / f"{name}.log"
        qmp_path = directory / f"{name}.qmp"
        command = ["qemu-system-x86_64", "-nodefaults", "-no-reboot", "-display", "none", "-machine", "q35"]
        command += ["-accel", "tcg", "-cpu", "max", "-m", str(memory_mib), "-smp", "1"]
        command += ["-kernel", str(kernel_directory() / "vmlinuz"), "-initrd", str(initrd)]
        command += ["-append", "console=ttyS0 panic=-1 quiet"]
        command += ["-serial", f"file:{self.serial_path}", "-qmp", f"unix:{qmp_path},server=on,wait=off"]
        for number, disk in enumerate(disks):
            options = f"file={disk},format=raw,cache={cache},discard=unmap,if=none,id=disk{number}"
            command += ["-drive", options, "-device", f"virtio-blk-pci,drive=disk{number}"]
        if incoming is not None:
            command += ["-incoming", incoming]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.qmp = Qmp(qmp_path)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"QEMU did not start: {self.log_path.read_text()}") from None

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def serial(self) -> str:
        return self.serial_path.read_text(errors="replace").replace("\r", "")

    def wait_serial(self, text: str, timeout: float = 120.0) -> str:
        """The console so far, once it contains `text`. A guest that failed or ended without it is an AssertionError."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            console = self.serial()
            if text in console:
                return console
            if ended or "GUEST-FAILED" in console or time.monotonic() > deadline:
                reason = "QEMU ended" if ended else "no such line in time"
                log = self.log_path.read_text()
                raise AssertionError(f"{reason}: {text!r}\nqemu: {log}\nconsole: {console[-4000:]}")
            time.sleep(0.02)

    def wait_off(self, timeout: float = 120.0) -> str:
        """Wait until the guest has powered off; returns the console, which must end in GUEST-OK."""
        console = self.wait_serial("GUEST-OK", timeout)
        code = self.process.wait(timeout)
        assert code == 0, f"QEMU exited {code}: {self.log_path.read_text()}"
        return console


def make_ext4(image: Path, size_mib: int, tree: Path) -> None:
    """A raw image of `size_mib` MiB with an ext4 file system that holds a copy of `tree`. Needs no root, no mount."""
    with image.open("wb") as file:
        file.truncate(size_mib << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, image], check=True, env=_with_sbin())


def fsck(image: Path) -> subprocess.CompletedProcess[str]:
    """e2fsck -fn: exit 0 means that the file system is clean."""
    return subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, env=_with_sbin(), check=False)


def lines_with(console: str, prefix: str) -> Iterator[str]:
    """What follows `prefix` on every console line that starts with it."""
    for line in console.splitlines():
        if line.startswith(prefix):
            yield line[len(prefix) :].strip()


def _with_sbin() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
