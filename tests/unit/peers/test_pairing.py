"""Tokens: one word, one use, ten minutes, proved and never sent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from silofs.errors import UserError
from silofs.limits import INVITE_S
from silofs.peers.pairing import INVITES_MAX, SPENT_MAX, Invitations, Reason, Token, proof, split_address

INVITER, JOINER, OTHER = b"i" * 32, b"j" * 32, b"o" * 32


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16), st.integers(0, 65535))
def test_a_token_is_one_printable_word_and_comes_back(fingerprint, secret, port):
    token = Token(f"host-1.example:{port}", fingerprint, secret)
    word = token.word()
    assert word.isalnum() and word.isascii()
    assert Token.parse(f"  {word.upper()}\n") == token


@given(st.text(max_size=200))
def test_what_is_no_token_is_refused(text):
    with pytest.raises(UserError):
        Token.parse(text)


def test_a_token_that_was_cut_or_mistyped_is_refused():
    word = Token("10.0.0.1:7011", INVITER, b"s" * 16).word()
    wrong = word[:20] + ("a" if word[20] != "a" else "b") + word[21:]
    for bad in (word[:-1], word[:-8], wrong, word + "a"):
        with pytest.raises(UserError):
            Token.parse(bad)


@pytest.mark.parametrize("address", ["host", ":1", "host:", "host:70000", "ho st:1", "h\n:1", "x" * 300 + ":1"])
def test_addresses_are_checked(address):
    with pytest.raises(UserError):
        split_address(address)


def test_ipv6_addresses():
    assert split_address("[::1]:7011") == ("::1", 7011)


def test_a_token_works_once():
    invitations = Invitations()
    secret = invitations.invite(now=0.0)
    claim = proof(secret, "join", INVITER, JOINER)
    assert invitations.inviting(now=1.0)
    assert invitations.spend(1.0, INVITER, JOINER, claim) == secret
    assert invitations.spend(2.0, INVITER, JOINER, claim) is Reason.USED
    assert not invitations.inviting(now=2.0)


def test_a_token_expires():
    invitations = Invitations()
    secret = invitations.invite(now=100.0)
    claim = proof(secret, "join", INVITER, JOINER)
    assert invitations.next_expiry(now=100.0) == 100.0 + INVITE_S
    assert invitations.spend(100.0 + INVITE_S, INVITER, JOINER, claim) is Reason.EXPIRED
    assert not invitations.inviting(now=100.0 + INVITE_S)


def test_a_wrong_secret_or_another_certificate_is_refused_and_spends_nothing():
    invitations = Invitations()
    secret = invitations.invite(now=0.0)
    claim = proof(secret, "join", INVITER, JOINER)
    assert invitations.spend(1.0, INVITER, JOINER, proof(b"x" * 16, "join", INVITER, JOINER)) is Reason.WRONG
    assert invitations.spend(1.0, INVITER, OTHER, claim) is Reason.WRONG
    assert invitations.spend(1.0, INVITER, JOINER, proof(secret, "welcome", INVITER, JOINER)) is Reason.WRONG
    assert invitations.spend(1.0, INVITER, JOINER, claim) == secret


def test_tokens_are_bounded():
    invitations = Invitations()
    secrets = [invitations.invite(now=float(n)) for n in range(INVITES_MAX + 3)]
    assert len(set(secrets)) == len(secrets)
    assert invitations.spend(20.0, INVITER, JOINER, proof(secrets[0], "join", INVITER, JOINER)) is Reason.WRONG
    for n in range(SPENT_MAX * 3):
        invitations.invite(now=INVITE_S * (n + 2))
    assert len(invitations._invites) <= INVITES_MAX + SPENT_MAX
