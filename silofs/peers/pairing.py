"""Pairing: the one exchange between two stores that do not know each other yet.

The inviter makes a *token*: one printable word with its address, the fingerprint of its certificate and a secret of
128 bits. Whoever holds the token dials the address, sees by the fingerprint that it reached the inviter and nobody
else, and proves the secret with an HMAC over both fingerprints; the secret itself never travels, and an HMAC that was
overheard is of no use with another certificate. Both then keep each other's certificate, and the token is spent.

A token works once and for ten minutes by a clock that no one can set (time is an argument here, in seconds of a
monotonic clock). It lives in the daemon's memory only: a restart voids it. Spent and expired tokens are remembered for
a while, so that their holder is told which it is; who does not know the secret only learns "refused".

Messages, each a frame of u32 big-endian length and msgpack: JOIN, answered by WELCOME or REFUSED.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

import msgspec
import trio

from silofs.errors import PeerRefused, ProtocolError, UserError
from silofs.limits import INVITE_S, NAME
from silofs.peers.identity import Identity, fingerprint_of
from silofs.peers.tls import TlsStream

TOKEN_PREFIX = "silofs1"
SECRET_BYTES = 16
FINGERPRINT_BYTES = 32
CHECK_BYTES = 4
ADDRESS_CHARS_MAX = 255
INVITES_MAX = 16  # open at a time
SPENT_MAX = 64  # remembered to tell their holder why
FRAME_BYTES_MAX = 16384
CERTIFICATE_BYTES_MAX = 8192


@dataclass(frozen=True, slots=True)
class Token:
    """What the word carries: address (HOST:PORT) and certificate fingerprint of the inviter, and the secret."""

    address: str
    fingerprint: bytes
    secret: bytes

    def word(self) -> str:
        body = self.fingerprint + self.secret + self.address.encode()
        raw = body + hashlib.sha256(body).digest()[:CHECK_BYTES]
        return TOKEN_PREFIX + base64.b32encode(raw).decode().rstrip("=").lower()

    @classmethod
    def parse(cls, word: str) -> Token:
        """UserError if the word is no token or was not copied whole."""
        text = word.strip().lower()
        fixed = FINGERPRINT_BYTES + SECRET_BYTES
        try:
            if not text.startswith(TOKEN_PREFIX):
                raise ValueError("prefix")
            code = text.removeprefix(TOKEN_PREFIX).upper()
            raw = base64.b32decode(code + "=" * (-len(code) % 8))
            body, check = raw[:-CHECK_BYTES], raw[-CHECK_BYTES:]
            if len(body) <= fixed or hashlib.sha256(body).digest()[:CHECK_BYTES] != check:
                raise ValueError("check")
            address = body[fixed:].decode("ascii")
            split_address(address)
        except (ValueError, binascii.Error, UserError):
            raise UserError(
                "this is no pairing token, or not all of it", hint="silofs peer invite on the other host makes one"
            ) from None
        return cls(address, body[:FINGERPRINT_BYTES], body[FINGERPRINT_BYTES:fixed])


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT or [HOST]:PORT. UserError otherwise."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    plain = bool(host) and len(address) <= ADDRESS_CHARS_MAX and host.isascii() and host.isprintable()
    if not colon or not plain or " " in host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise UserError(f"{address!r} is not HOST:PORT")
    return host, int(port)


def proof(secret: bytes, role: str, inviter: bytes, joiner: bytes) -> bytes:
    """HMAC-SHA256 over both certificate fingerprints; `role` (join or welcome) keeps the two directions apart."""
    return hmac.digest(secret, b"silofs pairing " + role.encode() + b"\0" + inviter + joiner, "sha256")


class Join(msgspec.Struct, array_like=True, tag="join"):
    certificate: bytes
    name: str
    address: str  # where the joiner listens; "" if it does not
    proof: bytes


class Welcome(msgspec.Struct, array_like=True, tag="welcome"):
    certificate: bytes
    name: str
    proof: bytes


class Refused(msgspec.Struct, array_like=True, tag="refused"):
    reason: str


class Reason(StrEnum):
    """Why a token was refused; said only to a holder of its secret, except `wrong`."""

    WRONG = "wrong"
    USED = "used"
    EXPIRED = "expired"


REASON_TEXT = {
    Reason.WRONG: "the inviter does not know this token",
    Reason.USED: "this token was used already",
    Reason.EXPIRED: "this token has expired",
}


@dataclass
class _Invite:
    secret: bytes
    expires: float
    used: bool = False


class Invitations:
    """The tokens that this daemon has given out. Pure: `now` is seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._invites: OrderedDict[bytes, _Invite] = OrderedDict()

    def invite(self, now: float) -> bytes:
        """The secret of a new token. The oldest open one is dropped when there are too many."""
        secret = secrets.token_bytes(SECRET_BYTES)
        while len(self._open(now)) >= INVITES_MAX:
            del self._invites[self._open(now)[0].secret]
        while len(self._invites) >= INVITES_MAX + SPENT_MAX:
            self._invites.popitem(last=False)
        self._invites[secret] = _Invite(secret, now + INVITE_S)
        return secret

    def _open(self, now: float) -> list[_Invite]:
        return [invite for invite in self._invites.values() if not invite.used and now < invite.expires]

    def inviting(self, now: float) -> bool:
        """Whether any token could still be used."""
        return bool(self._open(now))

    def answering(self, now: float) -> bool:
        """Whether any token could still be used, or its holder should still be told why not."""
        return any(now < invite.expires + INVITE_S for invite in self._invites.values())

    def next_expiry(self, now: float) -> float | None:
        return min((invite.expires for invite in self._open(now)), default=None)

    def spend(self, now: float, inviter: bytes, joiner: bytes, claim: bytes) -> bytes | Reason:
        """Use up the token that `claim` proves, and return its secret; else the reason why not.

        The two byte strings before the claim are the fingerprints. Spent before anything else happens: whoever comes
        second with the same token is refused even if the first one gets no further.
        """
        for invite in self._invites.values():
            if hmac.compare_digest(proof(invite.secret, "join", inviter, joiner), claim):
                if invite.used:
                    return Reason.USED
                if now >= invite.expires:
                    return Reason.EXPIRED
                invite.used = True
                return invite.secret
        return Reason.WRONG


def check_stranger(certificate: bytes, name: str, address: str = "") -> None:
    """ProtocolError unless what a stranger says of itself can be kept: sizes, a name, an address."""
    if not 0 < len(certificate) <= CERTIFICATE_BYTES_MAX or not NAME.fullmatch(name):
        raise ProtocolError("the other side's name or certificate is not acceptable")
    if address:
        try:
            split_address(address)
        except UserError as error:
            raise ProtocolError("the other side's address is not HOST:PORT") from error


async def join(stream: TlsStream, identity: Identity, token: Token, name: str, address: str) -> Welcome:
    """The joiner's half, on a fresh pairing connection. PeerRefused if the token is refused.

    The inviter's fingerprint is compared before a word is said; `address` is where this store listens, or "".
    """
    if stream.peer_fingerprint != token.fingerprint:
        raise PeerRefused(
            "the store at the token's address is not the one that made the token",
            hint="check the address with the host that invited; nothing was sent to this one",
        )
    mine = identity.fingerprint
    claim = proof(token.secret, "join", token.fingerprint, mine)
    await _send(stream, Join(identity.der, name, address, claim))
    answer = await _receive(stream, Welcome | Refused)
    if isinstance(answer, Refused):
        reason = Reason(answer.reason) if answer.reason in set(Reason) else Reason.WRONG
        raise PeerRefused(f"{REASON_TEXT[reason]}", hint="silofs peer invite on the other host makes a new one")
    assert isinstance(answer, Welcome)
    check_stranger(answer.certificate, answer.name)
    expected = proof(token.secret, "welcome", token.fingerprint, mine)
    if fingerprint_of(answer.certificate) != token.fingerprint or not hmac.compare_digest(answer.proof, expected):
        raise ProtocolError("the inviter's answer does not prove the token")
    return answer


async def receive_join(stream: TlsStream) -> Join:
    """The joiner's message, bounded and checked; whether its proof holds is for `Invitations.spend`."""
    message = await _receive(stream, Join)
    assert isinstance(message, Join)
    check_stranger(message.certificate, message.name, message.address)
    return message


async def refuse(stream: TlsStream, reason: Reason) -> None:
    await _send(stream, Refused(reason.value))


async def welcome(stream: TlsStream, identity: Identity, name: str, secret: bytes, joiner: bytes) -> None:
    mine = identity.fingerprint
    await _send(stream, Welcome(identity.der, name, proof(secret, "welcome", mine, joiner)))


async def _send(stream: TlsStream, message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode(message)
    await stream.send_all(len(body).to_bytes(4, "big") + body)


async def _receive(stream: TlsStream, kind: object) -> object:
    held = bytearray()
    while len(held) < 4 or len(held) < 4 + int.from_bytes(held[:4], "big"):
        if len(held) >= 4 and int.from_bytes(held[:4], "big") > FRAME_BYTES_MAX:
            raise ProtocolError("a pairing message is too long")
        data = await stream.receive_some(FRAME_BYTES_MAX)
        if not data:
            raise ProtocolError("the pairing connection ended early")
        held += data
        await trio.lowlevel.checkpoint_if_cancelled()
    try:
        return msgspec.msgpack.decode(bytes(held[4 : 4 + int.from_bytes(held[:4], "big")]), type=kind)
    except msgspec.MsgspecError as error:
        raise ProtocolError("a pairing message cannot be read") from error
