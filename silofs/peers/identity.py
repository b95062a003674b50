"""Who this store is: a key and a self-signed certificate in STORE/identity, made once and never replaced.

There is no authority: peers pin each other's certificate when they are paired (pairing.py), so nothing but the
certificate's bytes matters. Its *fingerprint* is their SHA-256; the *store id* is the first 16 bytes of it, so nobody
can claim another store's id without its key. The certificate is valid for 100 years from well before it was made:
expiry would only be a way for a wrong clock to cut hosts off from each other.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from silofs.errors import BadFormat

DIRECTORY = "identity"
KEY_FILE = "key.pem"
CERTIFICATE_FILE = "certificate.pem"
VALID_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
VALID_YEARS = 100
STORE_ID_BYTES = 16


def fingerprint_of(der: bytes) -> bytes:
    """SHA-256 of a certificate's DER bytes: 32 bytes."""
    return hashlib.sha256(der).digest()


def store_id_of(der: bytes) -> bytes:
    """16 bytes: the store id that belongs to a certificate."""
    return fingerprint_of(der)[:STORE_ID_BYTES]


@dataclass(frozen=True, slots=True)
class Identity:
    """This store's key and certificate: `key` and `certificate` are paths of PEM files, `der` the certificate."""

    key: Path
    certificate: Path
    der: bytes

    @property
    def fingerprint(self) -> bytes:
        return fingerprint_of(self.der)

    @property
    def store_id(self) -> bytes:
        return store_id_of(self.der)


def ensure(store: Path) -> Identity:
    """The identity of the store in directory `store`, made if there is none. BadFormat if it cannot be read.

    The files appear all at once (a rename of their directory), so a crash leaves either none or both.
    """
    directory = store / DIRECTORY
    if not directory.exists():
        _make(directory)
    return load(store)


def load(store: Path) -> Identity:
    """The identity of the store; BadFormat if a file is missing or is no certificate."""
    directory = store / DIRECTORY
    certificate = directory / CERTIFICATE_FILE
    try:
        parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        if not (directory / KEY_FILE).is_file():
            raise FileNotFoundError(directory / KEY_FILE)
    except (OSError, ValueError) as error:
        raise BadFormat(
            f"the identity in {directory} cannot be read: {error}",
            hint="restore it from a copy; a new one (remove the directory) must be paired again with every peer",
        ) from error
    return Identity(directory / KEY_FILE, certificate, parsed.public_bytes(serialization.Encoding.DER))


def _make(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"silofs {secrets.token_hex(8)}")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=365.25 * VALID_YEARS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    made = directory.with_name(f"{DIRECTORY}.{secrets.token_hex(8)}")
    made.mkdir(mode=0o700)
    _write(
        made / KEY_FILE,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    _write(made / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM))
    _sync(made)
    try:
        made.rename(directory)
    except OSError:  # another process was faster; its identity is the store's
        for file in made.iterdir():
            file.unlink()
        made.rmdir()
    _sync(directory.parent)


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
