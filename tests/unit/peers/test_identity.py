"""A store's identity: made once, private, long-lived, and named by its certificate."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from silofs.errors import BadFormat
from silofs.peers import identity


def test_it_is_made_once_and_read_again(tmp_path: Path):
    first = identity.ensure(tmp_path)
    assert identity.ensure(tmp_path) == first
    assert first.store_id == first.fingerprint[:16]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["identity"]


def test_nobody_else_may_read_the_key(tmp_path: Path):
    made = identity.ensure(tmp_path)
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.key.parent.stat().st_mode) == 0o700


def test_it_is_valid_for_a_hundred_years_even_if_the_clock_is_wrong(tmp_path: Path):
    certificate = x509.load_der_x509_certificate(identity.ensure(tmp_path).der)
    assert certificate.not_valid_before_utc <= datetime(2001, 1, 1, tzinfo=UTC)
    assert certificate.not_valid_after_utc.year >= datetime.now(UTC).year + 99


def test_two_stores_differ(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert identity.ensure(tmp_path / "a").store_id != identity.ensure(tmp_path / "b").store_id


@pytest.mark.parametrize("broken", ["key.pem", "certificate.pem"])
def test_a_missing_file_is_said_and_not_replaced(tmp_path: Path, broken: str):
    made = identity.ensure(tmp_path)
    (made.key.parent / broken).unlink()
    with pytest.raises(BadFormat):
        identity.ensure(tmp_path)


def test_a_damaged_certificate_is_said(tmp_path: Path):
    identity.ensure(tmp_path).certificate.write_text("nonsense")
    with pytest.raises(BadFormat):
        identity.ensure(tmp_path)
