from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from silofs import limits
from silofs.errors import SiloError, StoreFull, StoreLocked, UserError, error_of
from silofs.mount import kernel


def init_request(flags2: int, flags: int = 0) -> kernel.Init:
    header = kernel.IN_HEADER.pack(104, kernel.OPCODE_INIT, 2, 0, 0, 0, 0, 0, 0)
    return kernel.Init(header + kernel.INIT_IN.pack(7, 45, 1 << 17, kernel.INIT_EXT | flags, flags2) + bytes(44))


def test_resend_is_what_the_kernel_says() -> None:
    assert init_request(1 << 7).can_resend
    assert not init_request(0).can_resend
    assert not kernel.Init(init_request(1 << 7).request[:48]).can_resend  # before flags2


MMAP, LOCKS = kernel.DIRECT_IO_ALLOW_MMAP, kernel.POSIX_LOCKS


def init_reply() -> bytes:
    body = struct.pack("<IIIIHHIIHHI7I", 7, 38, 1 << 17, 0x1F0, 12, 9, 1 << 20, 1, 256, 0, 0, *range(7))
    return kernel.OUT_HEADER.pack(16 + len(body), 0, 2) + body


def test_a_reply_is_widened_by_the_background_limits_and_nothing_else_on_an_old_kernel() -> None:
    reply = init_reply()
    widened = kernel.widen(kernel.Init(init_request(0).request[:48]), reply, ["locks"])
    assert struct.unpack_from("<HH", widened, 32) == (limits.FUSE_MAX_BACKGROUND, limits.FUSE_MAX_BACKGROUND * 3 // 4)
    assert widened[:32] == reply[:32] and widened[36:] == reply[36:]
    with pytest.raises(SiloError):
        kernel.widen(init_request(0), kernel.OUT_HEADER.pack(16, -71, 2), [])


@pytest.mark.parametrize(
    ("offered", "abilities", "flags", "flags2"),
    [
        (0, ["locks"], kernel.INIT_EXT, MMAP),
        (LOCKS, ["locks"], LOCKS | kernel.INIT_EXT, MMAP),
        (LOCKS, ["write_flags"], kernel.INIT_EXT, MMAP),
    ],
)
def test_locks_and_mappings_are_asked_for_where_both_sides_have_them(
    offered: int, abilities: list[str], flags: int, flags2: int
) -> None:
    fields = struct.unpack_from("<IIIIHHIIHHI", kernel.widen(init_request(MMAP, offered), init_reply(), abilities), 16)
    assert (fields[3], fields[10]) == (0x1F0 | flags, flags2)


def test_mount_options() -> None:
    assert kernel.Options.parse("", root=True) == kernel.Options(allow_other=True)
    assert not kernel.Options.parse("", root=False).allow_other
    assert not kernel.Options.parse("noallow_other", root=True).allow_other
    assert kernel.Options.parse("defaults,_netdev,x-systemd.automount,nonempty", root=True).nonempty
    assert kernel.Options.parse("ro,noatime", root=True).flags & (kernel.MS_RDONLY | kernel.MS_NOATIME) == 1025
    with pytest.raises(UserError, match="'colour'"):
        kernel.Options.parse("ro,colour", root=True)


def test_a_path_is_made_absolute_through_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert kernel.absolute(tmp_path / "link") == tmp_path.resolve() / "real"
    assert kernel.absolute(tmp_path / "link" / "x") == tmp_path.resolve() / "real" / "x"
    assert kernel.absolute(Path("x")) == Path(os.path.realpath(".")) / "x"


def test_errors_are_found_by_their_code() -> None:
    assert error_of("store_full") is StoreFull
    assert error_of("store_locked") is StoreLocked
    assert error_of("nobody knows").code == "failed"


def test_the_holder_stays_small() -> None:
    heavy = {"trio", "lmdb", "pyfuse3", "numpy", "click"}
    program = f"import sys, silofs.mount.holder; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
