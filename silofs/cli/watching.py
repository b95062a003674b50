"""Verbs that show what a daemon does: `silofs metrics` for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from silofs.cli.output import App
from silofs.cli.runner import call, holder_says
from silofs.cli.verbs import common
from silofs.errors import Exit, TryAgain

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
