"""A strict reader of Prometheus' text exposition format, version 0.0.4: what it takes, every scraper takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
HELP = re.compile(rf"# HELP ({NAME}) (.+)")
TYPE = re.compile(rf"# TYPE ({NAME}) (counter|gauge)")
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(,|$)')
VALUE = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[-+][0-9]+)?")
ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Key = tuple[tuple[str, str], ...]


@dataclass
class Family:
    kind: str
    help: str
    samples: dict[Key, float] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, which all samples have in common."""
        (names,) = {tuple(name for name, _ in key) for key in self.samples}
        return names

    def value(self, **labels: str) -> float:
        """Of the one sample with these labels, and perhaps others."""
        (found,) = [value for key, value in self.samples.items() if labels.items() <= dict(key).items()]
        return found


def parse(text: str) -> dict[str, Family]:
    """By name; AssertionError for anything that is not exactly in order: HELP, TYPE and then samples, each once."""
    assert text.endswith("\n"), "the last line is not ended"
    found: dict[str, Family] = {}
    lines = iter(text[:-1].split("\n"))
    name = ""
    for line in lines:
        if line.startswith("#"):
            explained = HELP.fullmatch(line)
            assert explained, line
            typed = TYPE.fullmatch(next(lines))
            name = explained[1]
            assert typed and typed[1] == name, line
            assert name not in found, f"{name} comes twice"
            found[name] = Family(typed[2], explained[2])
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] == name, f"{line} is not below its TYPE"
        assert VALUE.fullmatch(sample[3]), line
        key = _labels(sample[2])
        assert key not in found[name].samples, f"{line} comes twice"
        found[name].samples[key] = float(sample[3])
    for name, family in found.items():
        assert family.samples, f"{name} has no sample"
        assert (family.kind == "counter") == name.endswith("_total"), name
        assert family.labels is not None
    return found


def _labels(inside: str | None) -> Key:
    if inside is None:
        return ()
    labels, at = [], 0
    while at < len(inside):
        label = LABEL.match(inside, at)
        assert label, inside
        labels.append((label[1], re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], label[2])))
        at = label.end()
        assert label[3] == "" or at < len(inside), inside
    assert len(dict(labels)) == len(labels), inside
    return tuple(labels)


def golden() -> dict[str, str]:
    """What is promised: by name, the kind and the labels."""
    lines = (Path(__file__).parent / "golden" / "metrics.txt").read_text().splitlines()
    return {name: rest for name, _, rest in (line.partition(" ") for line in lines)}


def described(found: dict[str, Family]) -> dict[str, str]:
    """As `golden`, of what was found."""
    return {name: " ".join((family.kind, *family.labels)) for name, family in found.items()}


def fallen(before: dict[str, Family], after: dict[str, Family]) -> list[str]:
    """Counters that are lower, or missing though what they count is still told of."""
    found = []
    for name, family in before.items():
        if family.kind != "counter":
            continue
        for key, value in family.samples.items():
            now = after[name].samples.get(key) if name in after else None
            if now is None and "volume" in dict(key):
                continue  # removed or renamed
            if now is None or now < value:
                found.append(f"{name}{dict(key)}: {value}, then {now}")
    return found
