"""Verbs that show what a daemon does: `silofs metrics` for machines, `silofs top` for people."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from silofs import limits
from silofs.cli.output import App, emit
from silofs.cli.runner import call, holder_says
from silofs.cli.sizes import parse_duration
from silofs.cli.verbs import common
from silofs.errors import Exit, TryAgain, UserError
from silofs.times import rfc3339

Figures = dict[str, Any]


def _figures(store: Path) -> Figures:
    return call(store, "statistics", {}, offline=False)


@click.command("metrics", short_help="Print metrics for Prometheus.")
@common("metrics")
def metrics_command(app: App) -> int:
    """Print what Prometheus collects, in its text format. Exit code 75 while the daemon is away, with silofs_up 0."""
    from silofs import metrics

    code = Exit.OK
    try:
        figures = _figures(app.store)
    except TryAgain:
        held = holder_says(app.store)
        if held is None:
            raise
        figures, code = {"daemon": held}, Exit.TRY_AGAIN
        app.warn("the daemon does not answer; I/O on the mount waits for it")
    found = metrics.families(figures)
    app.result({"metrics": metrics.fields(found)}, lambda: metrics.text(found))
    return code


@click.command("top", short_help="Show what the volumes do, live.")
@click.option("--interval", default="1s", show_default=True, metavar="TIME", help="Between two refreshes.")
@click.option("--once", is_flag=True, help="Print one plain table, over one interval.")
@common("top")
def top_command(app: App, interval: str, once: bool) -> None:
    """Show what is read and written, by volume. Live on a terminal, until q; else one plain table over one interval."""
    from silofs.cli import rates, screen

    seconds = parse_duration(interval)
    if not limits.TOP_INTERVAL_MIN_S <= seconds <= limits.TOP_INTERVAL_MAX_S:
        least, most = limits.TOP_INTERVAL_MIN_S, limits.TOP_INTERVAL_MAX_S
        raise UserError(f"an interval of {interval} makes no sense", hint=f"from {least:g} to {most:g} seconds")
    before = _figures(app.store)  # what is wrong from the start is said here, and not on a screen that goes away

    def refresh() -> dict[str, Any]:
        nonlocal before
        after = _figures(app.store)
        found = rates.between(before, after)
        before = after
        return {"time": rfc3339(time.time_ns()), **found}

    def refresh_or_why() -> dict[str, Any] | str:
        try:
            return refresh()
        except TryAgain as error:  # a daemon that is being replaced is what somebody who watches wants to see
            return error.message

    if app.json and not once:
        while True:
            time.sleep(seconds)
            match refresh_or_why():
                case str(why):
                    app.warn(why)
                case found:
                    emit({"schema": app.schema, **found})
    elif once or not screen.usable():
        time.sleep(seconds)
        fields = refresh()
        app.result(fields, lambda: rates.text(fields))
    else:
        screen.live(str(app.store), seconds, refresh_or_why)
