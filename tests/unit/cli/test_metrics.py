"""`silofs metrics`: what a daemon says is printed as text and as JSON."""

from __future__ import annotations

from typing import Any

from silofs.control import Call
from tests.exposition import golden, parse
from tests.unit.cli.commands import Silofs, daemon
from tests.unit.test_metrics import figures


def test_what_a_daemon_says_is_printed(silofs: Silofs) -> None:
    async def statistics(args: dict[str, Any], call: Call) -> dict[str, Any]:
        return figures()

    with daemon(silofs.store, {"statistics": statistics}):
        done = silofs("metrics")
        assert (done.code, done.err) == (0, "")
        assert parse(done.out).keys() == golden().keys()
        as_json = silofs.ok("metrics")
    assert (as_json["schema"], as_json["metrics"].keys()) == ("silofs.metrics/1", golden().keys())


def test_without_a_daemon_nothing_is_printed(silofs: Silofs) -> None:
    assert silofs.fails(1, "metrics")["code"] == "no_daemon"


def test_a_daemon_of_an_earlier_program_is_named_as_the_cause(silofs: Silofs) -> None:
    with daemon(silofs.store):
        assert "silofs version" in silofs.fails(2, "metrics")["hint"]
