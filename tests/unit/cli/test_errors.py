"""docs/errors.md is the table of errors.py; docs/cli.md names every verb that there is and no other."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from silofs import errors
from silofs.cli.verbs import VERBS, Lazy, silofs
from silofs.errors import Exit, SiloError

DOCS = Path(__file__).parents[3] / "docs"


def classes(base: type[SiloError] = SiloError) -> Iterator[type[SiloError]]:
    yield base
    for sub in base.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from classes(sub)


def row(kind: type[SiloError]) -> str:
    retry = "yes" if kind.retry else "no"
    name = errno.errorcode[kind.errno]
    return f"| `{kind.__name__}` | `{kind.code}` | {name} | {kind.exit_code} | {retry} | {kind.default_hint or '–'} |"


def test_the_page_has_a_row_for_every_class() -> None:
    rows = [line for line in (DOCS / "errors.md").read_text().splitlines() if line.startswith("| `")]
    assert rows == [row(kind) for kind in classes()]


def test_codes_lead_back_to_their_class() -> None:
    for kind in classes():
        assert kind.code == errors.error_of(kind.code).code
        assert issubclass(kind, errors.error_of(kind.code))
    assert errors.error_of("of a later version") is SiloError


def test_exit_codes_are_those_of_the_contract() -> None:
    allowed = {value for name, value in vars(Exit).items() if name.isupper()}
    assert allowed == {0, 1, 2, 3, 4, 10, 11, 12, 13, 75, 130}
    assert {kind.exit_code for kind in classes()} <= allowed - {Exit.OK, Exit.WARNINGS}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_text_and_a_section(verb: str) -> None:
    group = silofs
    assert isinstance(group, Lazy)
    command = group.get_command(None, verb)  # type: ignore[arg-type]
    assert command is not None
    assert command.get_short_help_str()
    assert re.search(rf"^`silofs {verb}\b", (DOCS / "cli.md").read_text(), re.MULTILINE), verb


def test_the_page_names_no_verb_that_is_not_built() -> None:
    named = set(re.findall(r"^`silofs ([a-z]+)", (DOCS / "cli.md").read_text(), re.MULTILINE))
    assert named == set(VERBS)
