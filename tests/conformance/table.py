"""The conformance table: ``python -m tests.conformance.table RECORD.json ... > OUT.md``.

Each record is what the suite wrote on one TransformerLens version (``--conformance-json``).
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.conformance.models import OPTIONS

SYMBOLS = {"unchanged": "●", "right": "◐", "refused": "○", "skipped": "–", "WRONG": "WRONG"}

SECTIONS = (
    "The model", "ActivationCache", "transformer_lens.patching", "transformer_lens.tools",
    "Elsewhere in TransformerLens", "Other tools",
)  # fmt: skip
FIRST_WORDS = {"ActivationCache": 1, "patching": 2, "tools": 3}
FIRST_WORDS |= dict.fromkeys(("evals", "head_detector", "SVDInterpreter", "train", "utils"), 4)
FIRST_WORDS |= dict.fromkeys(("circuitsvis", "nnsight", "EAP", "SAELens", "auto", "circuit"), 5)

HEAD = """\
# What runs on a sparse model

Made by `make conformance` from the tests in `tests/conformance/`: each row is something that
TransformerLens offers or a tool does with it, each column a model option, each cell what the tests
have shown. Where TransformerLens has a model of its own with the same weights
({expressible}), values are compared with that one, to 1e-5;
elsewhere they satisfy an identity or equal a computation by hand.

- ● **unchanged**: code written for TransformerLens runs as it stands.
- ◐ **right**: an assumption of TransformerLens does not hold on this model; the same call gives the
  right answer. The note says what it is.
- ○ **refused**: the call raises, saying why. So does the note.
- – no test covers it with this option, or the installed TransformerLens does not have it.

Rows are for TransformerLens {versions}, unless they name a version.
`paper` is the architecture of Gao et al. 2025: AbsTopK at eight sites, sinks, a bigram table,
concatenated positions and heads wider than the stream, all at once.
"""


def main(paths: Iterable[str]) -> str:
    """The table for these records.

    Raises:
        ValueError: a test failed without saying what it shows, or two tests disagree on a cell.
    """
    records = [json.loads(Path(path).read_text()) for path in paths]
    for record in records:
        if record["failed_without_a_claim"]:
            failed = ", ".join(record["failed_without_a_claim"])
            raise ValueError(f"tests that failed without a claim to be put down as wrong: {failed}")
    rows: dict[str, list[Any]] = defaultdict(list)
    for record in records:  # several environments may have the same TransformerLens
        rows[record["transformer_lens"]] += record["rows"]
    return render({version: cells_of(rows[version]) for version in sorted(rows, key=in_order)})


def cells_of(rows: Iterable[Mapping[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """utility → option → {"outcome", "why"}.

    A failed test makes a cell WRONG whatever others say of it, and a skipped one says nothing where
    others ran. Otherwise all tests of a cell must say the same.
    """
    cells: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        utility, option = row["utility"], row["option"]
        new = {key: row[key] for key in ("outcome", "why")} | {"test": row["test"]}
        old = cells[utility].get(option)
        if old is None or old["outcome"] == "skipped" or new["outcome"] == "WRONG":
            cells[utility][option] = new
        elif new["outcome"] not in ("skipped", old["outcome"]) and old["outcome"] != "WRONG":
            raise ValueError(
                f"{utility} on {option}: {old['test']} says {old['outcome']}, "
                f"{new['test']} {new['outcome']}; give what differs a name of its own"
            )
    return cells


def render(versions: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one section per module, one row per utility (and version, where they differ)."""
    notes: dict[str, int] = {}
    sections: dict[str, list[str]] = defaultdict(list)
    utilities = {utility for cells in versions.values() for utility in cells}
    for utility in sorted(utilities, key=lambda u: (SECTIONS.index(section_of(u)), u)):
        by_row: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for version, cells in versions.items():
            row = tuple(cell(cells.get(utility, {}), option, notes) for option in OPTIONS)
            by_row[row].append(short(version))
        lacking = [row for row in by_row if set(row) == {SYMBOLS["skipped"]}]
        for row, which in by_row.items():
            if row in lacking and len(by_row) > 1:
                continue  # a version without it needs no row of its own
            only = "" if len(which) == len(versions) else f" ({', '.join(which)})"
            name = utility.replace("|", r"\|")
            sections[section_of(utility)].append(f"| `{name}`{only} | {' | '.join(row)} |")
    names = [short(version) for version in versions]
    versions = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    text = [HEAD.format(versions=versions, expressible=expressible_options())]
    header = f"| | {' | '.join(OPTIONS)} |\n|---|{':-:|' * len(OPTIONS)}"
    for section, rows in sections.items():
        text += [f"## {section}\n", header, *rows, ""]
    if notes:
        text += ["## Notes\n", *(f"{number}. {why}." for why, number in notes.items()), ""]
    return "\n".join(text)


def cell(cells: Mapping[str, Mapping[str, str]], option: str, notes: dict[str, int]) -> str:
    """One cell: a symbol and the number of its note."""
    found = cells.get(option) or cells.get("any")
    if found is None:
        return SYMBOLS["skipped"]
    symbol = SYMBOLS[found["outcome"]]
    if found["outcome"] not in ("right", "refused"):
        return symbol
    number = notes.setdefault(found["why"].rstrip("."), len(notes) + 1)
    return f"{symbol} {number}"


def section_of(utility: str) -> str:
    """The heading that a utility stands under, by its first word."""
    return SECTIONS[FIRST_WORDS.get(re.split(r"\W", utility)[0], 0)]


def in_order(version: str) -> list[int]:
    """A version's numbers, to sort by."""
    return [int(part) for part in version.split(".") if part.isdigit()]


def short(version: str) -> str:
    """4.3 for 4.3.0."""
    return ".".join(version.split(".")[:2])


def expressible_options() -> str:
    from tests.conformance.models import EXPRESSIBLE

    return ", ".join(f"`{option}`" for option in EXPRESSIBLE) + ", and `sinks` before 4"


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1:]))
