"""``FaithfulnessReport``: everything that was measured about one circuit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from tl_sparse import compat
from tl_sparse.faithfulness.config import PARTS, EvaluationConfig
from tl_sparse.faithfulness.figures import overview_figure
from tl_sparse.faithfulness.measure import Measure, PartResult
from tl_sparse.faithfulness.page import report_page
from tl_sparse.faithfulness.verdict import Check, Thresholds, checks, verdict
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json
from tl_sparse.views.display import frame_html
from tl_sparse.views.page import page_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCHEMA_VERSION = 1
COLUMN_TYPES = ("float64", "float32", "int64", "Int64", "bool", "boolean", "object", "str")
NUMBERS = ("value", "low", "high", "null", "null_low", "null_high")


@dataclass(frozen=True, eq=False)
class FaithfulnessReport:
    """What the suite found about one circuit, with every per-prompt value."""

    task: str
    """Name of the task."""
    model_name: str
    """Class of the model."""
    model_fingerprint: str
    """SHA-256 of the model's tensors."""
    n_units: int
    """Units of the circuit: nodes, heads or features."""
    n_universe: int
    """Units that it was chosen from."""
    n_edges: int | None
    """Its edges; None where there are none to count."""
    target_loss: float | None
    """The loss that it had to reach when it was found; None if unknown."""
    prompts: tuple[str, ...]
    """The test prompts; rows 2i and 2i+1 are a pair."""
    parts: tuple[PartResult, ...]
    """What every part found."""
    config: EvaluationConfig
    """How thoroughly it was tested."""
    thresholds: Thresholds
    """What the verdict asks for."""
    versions: Mapping[str, str]
    """Versions of the libraries that it was measured with."""

    def part(self, letter: str) -> PartResult:
        """A part's result.

        Raises:
            KeyError: that part was not run.
        """
        for part in self.parts:
            if part.part == letter:
                return part
        run = ", ".join(f"{p.part} ({PARTS[p.part]})" for p in self.parts)
        raise KeyError(f"part {letter!r} was not run; these were: {run}")

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """Every question of the verdict, and its answer."""
        return checks(self.parts, self.thresholds)

    @property
    def verdict(self) -> str:
        """What these numbers allow to be said about the circuit, and what they do not."""
        return verdict(self.checks, len(self.prompts))

    @property
    def seconds(self) -> float:
        """How long all parts took."""
        return sum(part.seconds for part in self.parts)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per number: part, name, variant, value, interval, null."""
        return pd.concat([part.to_dataframe() for part in self.parts], ignore_index=True)

    def checks_frame(self) -> pd.DataFrame:
        """A row per check: part, check, outcome, reason."""
        return pd.DataFrame(
            [(c.criterion.part, c.criterion.key, c.outcome, c.reason) for c in self.checks],
            columns=["part", "check", "outcome", "reason"],
        )

    def examples(self) -> pd.DataFrame:
        """A row per number and prompt: part, name, variant, prompt, value.

        Numbers that are not made from prompts (of seeds, draws, units) have their place instead.
        """
        frames = []
        for m in (m for part in self.parts for m in part.measures if m.examples is not None):
            assert m.examples is not None
            # what is made from prompts has an interval
            of_prompts = len(m.examples) == len(self.prompts) and math.isfinite(m.low)
            which = self.prompts if of_prompts else [str(i) for i in range(len(m.examples))]
            frame = pd.DataFrame({"prompt": which, "value": m.examples.numpy()})
            frames.append(frame.assign(part=m.part, name=m.name, variant=m.variant))
        columns = ["part", "name", "variant", "prompt", "value"]
        if not frames:
            return pd.DataFrame(columns=columns)
        return pd.concat(frames, ignore_index=True)[columns]

    def patching_result(self, part: str, name: str) -> Any:
        """A metric's per-prompt values, a row per variant, as TransformerLens' ``PatchingResult``.

        Its bootstrap and permutation tests then apply. The baseline of part A's ``loss`` is the
        full model's loss. TransformerLens takes prompts to be independent; our intervals draw the
        two prompts of a pair together.

        Raises:
            NotImplementedError: the installed TransformerLens is older than 4.
            KeyError: the part has no such metric with a value per prompt.
        """
        found = self.part(part)
        whole = len(self.prompts)
        rows = {
            m.variant: m.examples
            for m in found.measures
            if m.name == name and m.examples is not None and len(m.examples) == whole
        }
        if not rows:
            names = sorted({m.name for m in found.measures if m.examples is not None})
            raise KeyError(f"part {part} has no {name!r} by prompt; it has {', '.join(names)}")
        baseline = None
        if (part, name) == ("A", "loss"):
            baseline = found.measure("model_loss").examples
        return compat.patching_result(
            torch.stack(list(rows.values())), pd.DataFrame({"variant": list(rows)}), name, baseline
        )

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Name and value of what was tested, and how."""
        known = (
            ("components", f"{self.n_units:,} of {self.n_universe:,}"),
            ("edges", "" if self.n_edges is None else f"{self.n_edges:,}"),
            ("target loss", "" if self.target_loss is None else f"{self.target_loss:g} nats"),
            ("held-out prompts", f"{len(self.prompts):,}"),
            ("model", f"{self.model_name} {self.model_fingerprint[:12]}"),
            ("seed", str(self.config.seed)),
            ("seconds", f"{self.seconds:.0f}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        )
        return tuple((name, value) for name, value in known if value)

    def to_plotly(self) -> go.Figure:
        """Every number with an interval, and its null beside it."""
        return overview_figure(self.task, self.to_dataframe())

    def write_page(self, path: str | Path) -> Path:
        """Write the report as one self-contained page; returns its path."""
        page = report_page(self.task, self.verdict, self.facts, self.checks, self.parts)
        write_atomic(Path(path), page_html(page))
        return Path(path)

    def __repr__(self) -> str:
        passed = sum(check.outcome == "passed" for check in self.checks)
        return (
            f"FaithfulnessReport({self.task!r}, {self.n_units} of {self.n_universe} units, "
            f"{passed} of {len(self.checks)} checks passed)"
        )

    def _repr_html_(self) -> str:
        return frame_html(f"Faithfulness: {self.task}", self.verdict.splitlines()[0],
                          self.checks_frame())  # fmt: skip

    # ----------------------------------------------------------------------------------------------
    # on disk

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file, all or nothing; :meth:`load` restores it exactly."""
        record = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in SCALARS},
            "versions": dict(self.versions),
            "config": asdict(self.config),
            "thresholds": asdict(self.thresholds),
            "parts": [part_record(part) for part in self.parts],
        }
        write_atomic(Path(path), json.dumps(record, indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> FaithfulnessReport:
        """Read a saved report.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no report, or one of another schema version.
        """
        record = read_json(Path(path))
        if record.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has report schema_version {record.get('schema_version')!r}; this version "
                f"of tl_sparse reads {SCHEMA_VERSION}"
            )
        try:
            return cls(
                **{name: record[name] for name in SCALARS if name != "prompts"},
                prompts=tuple(map(str, record["prompts"])),
                versions={str(k): str(v) for k, v in record["versions"].items()},
                config=dataclass_from_json(EvaluationConfig, record["config"]),
                thresholds=dataclass_from_json(Thresholds, record["thresholds"]),
                parts=tuple(map(part_of, record["parts"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no faithfulness report: {error}") from error


SCALARS = (
    "task", "model_name", "model_fingerprint", "n_units", "n_universe", "n_edges", "target_loss",
    "prompts",
)  # fmt: skip


def part_record(part: PartResult) -> dict[str, Any]:
    """A part as plain values; what is not a number is None or a word."""
    return {
        "part": part.part,
        "seconds": plain(part.seconds),
        "notes": list(part.notes),
        "tables": {
            name: {
                column: {"type": str(values.dtype), "values": [plain(v) for v in values.tolist()]}
                for column, values in table.items()
            }
            for name, table in part.tables.items()
        },
        "measures": [
            {
                "name": m.name,
                "variant": m.variant,
                "null_name": m.null_name,
                **{name: plain(getattr(m, name)) for name in NUMBERS},
                "examples": None if m.examples is None else [plain(v) for v in m.examples.tolist()],
            }
            for m in part.measures
        ],
    }


def part_of(record: Mapping[str, Any]) -> PartResult:
    """A part from plain values."""
    letter = str(record["part"])
    if letter not in PARTS:
        raise KeyError(f"unknown part {letter!r}")
    measures = []
    for m in record["measures"]:
        values = None if m["examples"] is None else torch.tensor([real(v) for v in m["examples"]])
        numbers = {name: real(m[name]) for name in NUMBERS}
        measures.append(
            Measure(
                letter, str(m["name"]), str(m["variant"]), **numbers,
                null_name=str(m["null_name"]), examples=values,
            )
        )  # fmt: skip
    tables = {
        str(name): pd.DataFrame({str(c): series_of(values) for c, values in table.items()})
        for name, table in record["tables"].items()
    }
    return PartResult(
        letter, tuple(measures), tables, tuple(map(str, record["notes"])), real(record["seconds"])
    )


def series_of(record: Mapping[str, Any]) -> pd.Series:
    """A table's column from plain values."""
    kind, values = record["type"], record["values"]
    if kind not in COLUMN_TYPES:
        raise ValueError(f"unknown column type {kind!r}; known: {', '.join(COLUMN_TYPES)}")
    return pd.Series([real(v) for v in values] if "float" in kind else values, dtype=kind)


def plain(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: these are written as words."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return None if value is pd.NA else value


def real(value: Any) -> float:
    """A number as it was before :func:`plain`."""
    return float(value)
