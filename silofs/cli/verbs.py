"""The table of verbs, and the options that all of them take."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from silofs import __version__
from silofs.cli.output import App, default_store
from silofs.errors import Exit, Interrupted, UserError

T = TypeVar("T")

# verb or group -> (module, attribute). What is not in here is not built, and is not shown as if it were.
VERBS = {
    "init": "volumes",
    "mount": "mounting",
    "umount": "mounting",
    "restart": "mounting",
    "create": "volumes",
    "import": "images",
    "export": "exports",
    "ls": "volumes",
    "info": "volumes",
    "df": "volumes",
    "du": "volumes",
    "snapshot": "volumes",
    "clone": "volumes",
    "rollback": "volumes",
    "diff": "diffs",
    "freeze": "freezing",
    "thaw": "freezing",
    "rm": "volumes",
    "rename": "volumes",
    "resize": "volumes",
    "check": "volumes",
    "peer": "peers",
    "migrate": "migrations",
    "migration": "migrations",
    "doctor": "mounting",
    "status": "mounting",
    "top": "watching",
    "metrics": "watching",
    "version": "mounting",
}

_current = "silofs"


class Lazy(click.Group):
    """A group whose verbs are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = VERBS.get(cmd_name)
        if module is None:
            return None
        found = getattr(importlib.import_module(f"silofs.cli.{module}"), f"{cmd_name}_command")
        assert isinstance(found, click.Command)
        return found


def common(verb: str) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Give a verb's function the options that all verbs take; it gets an `App` and returns an exit code or None."""

    def wrap(function: Callable[..., int | None]) -> Callable[..., int]:
        @click.option("--store", type=click.Path(path_type=Path), metavar="DIR", help="The store's directory.")
        @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
        @click.option("-q", "--quiet", is_flag=True, help="Print data and errors only.")
        @click.option("--no-progress", is_flag=True, help="Draw no progress line.")
        @click.option("--debug", is_flag=True, help="Print a traceback with an error.")
        @click.pass_context
        @functools.wraps(function)
        def run(
            ctx: click.Context,
            /,
            store: Path | None,
            as_json: bool,
            quiet: bool,
            no_progress: bool,
            debug: bool,
            **rest: Any,
        ) -> int:
            global _current
            _current = verb
            above = ctx.find_root().params
            app = App(
                verb,
                store or above.get("store") or default_store(),
                json=as_json or bool(above.get("as_json")),
                quiet=quiet or bool(above.get("quiet")),
                no_progress=no_progress or bool(above.get("no_progress")),
                debug=debug or bool(above.get("debug")),
            )
            try:
                return function(app, **rest) or Exit.OK
            finally:
                app.clear()

        return run

    return wrap


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="silofs %(version)s")
@click.option("--store", type=click.Path(path_type=Path), metavar="DIR", help="The store's directory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print data and errors only.")
@click.option("--no-progress", is_flag=True, help="Draw no progress line.")
@click.option("--debug", is_flag=True, help="Print a traceback with an error.")
def silofs(**_: object) -> None:
    """Disk images with instant clones and snapshots that move between hosts while their VM runs.

    The store is --store, else $SILOFS_STORE, else /var/lib/silofs (root) or $XDG_DATA_HOME/silofs.
    """


def main(args: Sequence[str]) -> int:
    """Run click without its own error handling. Returns the exit code; raises UserError for a wrong command line."""
    try:
        code = silofs.main(list(args), prog_name="silofs", standalone_mode=False)
    except click.UsageError as error:
        _note(error.ctx)
        path = error.ctx.command_path if error.ctx is not None else "silofs"
        raise UserError(error.format_message().rstrip("."), hint=f"{path} --help shows how it is written") from error
    except click.Abort as error:
        raise Interrupted("interrupted", hint="nothing is left half done: run the same command again") from error
    except click.ClickException as error:
        raise UserError(error.format_message()) from error
    return code if isinstance(code, int) else Exit.OK


def _note(ctx: click.Context | None) -> None:
    global _current
    if ctx is not None:
        names = ctx.command_path.split()[1:]
        _current = "_".join(names) if names else "silofs"


def current_verb() -> str:
    """The verb that runs or ran last, for the schema of an error."""
    return _current
