"""`silofs`: the entry point. Finds the verb, runs it, and turns what it raises into one exit code (docs/cli.md).

`silofs --version` is answered before click is imported; every verb's module is imported when that verb is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from silofs import __version__
from silofs.errors import Exit, Interrupted, NoSuchThing, NotAuthorised, SiloError, StoreFull, UserError


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"silofs {__version__}")
        return Exit.OK
    flags = args[: args.index("--")] if "--" in args else args
    as_json, debug = "--json" in flags, "--debug" in flags
    verb = "silofs"
    try:
        from silofs.cli import output, verbs

        try:
            code = verbs.main(args)
            with output.writing():
                if sys.stdout is not None:
                    sys.stdout.flush()
            return code
        except BaseException:
            verb = verbs.current_verb()
            raise
    except (KeyboardInterrupt, SiloError, OSError) as error:
        if debug:
            _traceback()
        if isinstance(error, BrokenPipeError):
            from silofs.cli.output import close_stdout

            close_stdout()
            return Exit.FAILED
        return _report(_as_silo_error(error), verb=verb, as_json=as_json)
    except Exception as error:
        if debug:
            _traceback()
        hint = "this is a bug of silofs: run it again with --debug and report what it prints"
        return _report(SiloError(f"{type(error).__name__}: {error}", hint=hint), verb=verb, as_json=as_json)


def _as_silo_error(error: BaseException) -> SiloError:
    """What the operating system or the keyboard raised, as one of ours."""
    if isinstance(error, SiloError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted", hint="nothing is left half done: run the same command again")
    assert isinstance(error, OSError)
    text = error.strerror or str(error)
    message = f"{error.filename}: {text}" if error.filename is not None else text
    if isinstance(error, FileNotFoundError):
        return NoSuchThing(message, hint="check the path")
    if isinstance(error, PermissionError):
        return NotAuthorised(message, hint="run it as the user that the store belongs to")
    if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
        return UserError(message, hint="check the path")
    if error.errno == 28:  # ENOSPC
        return StoreFull(message)
    return SiloError(message, hint="see the system's log for the device's errors")


def _report(error: SiloError, *, verb: str, as_json: bool) -> int:
    from silofs.cli.output import OutputLost, close_stdout, report_error

    try:
        report_error(error, verb=verb, as_json=as_json and not isinstance(error, OutputLost))
    except BrokenPipeError:
        close_stdout()
    except OutputLost:
        report_error(error, verb=verb, as_json=False)
    return error.exit_code


def _traceback() -> None:
    import traceback

    traceback.print_exc()


if __name__ == "__main__":
    sys.exit(run())
