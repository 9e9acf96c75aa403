"""``FaithfulnessReport``: everything that was measured about one circuit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from tl_sparse import compat
from tl_sparse.faithfulness.checks import check_names
from tl_sparse.faithfulness.config import EvaluationConfig
from tl_sparse.faithfulness.figures import overview_figure
from tl_sparse.faithfulness.measure import CheckResult, Measure
from tl_sparse.faithfulness.page import report_page
from tl_sparse.faithfulness.verdict import CriterionResult, judged, thresholds_of, verdict
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.json_dataclass import dataclass_from_json
from tl_sparse.storage.json_files import read_json, real
from tl_sparse.views.display import frame_html
from tl_sparse.views.page import page_html
from tl_sparse.views.page_circuit import PageCircuit

if TYPE_CHECKING:
    import plotly.graph_objects as go

SCHEMA_VERSION = 3
COLUMN_TYPES: Mapping[str, tuple[type, ...]] = {
    "float64": (float, int, str), "float32": (float, int, str),  # words where they are not finite
    "int64": (int,), "Int64": (int, NoneType), "bool": (bool,), "boolean": (bool, NoneType),
    "object": (str, int, float, bool, NoneType), "str": (str, NoneType),
}  # fmt: skip
"""pandas' types that a table's columns may have, and those of their values in JSON."""
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
    n_components: int
    """Components of the circuit: nodes, heads or features."""
    n_universe: int
    """Components that it was chosen from."""
    n_edges: int | None
    """Its edges; None where there are none to count."""
    target_loss: float | None
    """The loss that it had to reach when it was found; None if unknown."""
    prompts: tuple[str, ...]
    """The test prompts; rows 2i and 2i+1 are a pair."""
    origin_known: bool
    """Whether it is known on which prompts the circuit was found: then none of the test prompts is
    one of them."""
    results: tuple[CheckResult, ...]
    """What every check found."""
    config: EvaluationConfig
    """How thoroughly it was tested."""
    thresholds: Mapping[str, float]
    """Criterion → threshold: what the verdict asks for."""
    versions: Mapping[str, str]
    """Versions of the libraries that it was measured with."""

    def check(self, name: str) -> CheckResult:
        """A check's result.

        Raises:
            KeyError: that check was not run.
        """
        for result in self.results:
            if result.check == name:
                return result
        run = ", ".join(result.check for result in self.results)
        raise KeyError(f"check {name!r} was not run; these were: {run}")

    @cached_property
    def criteria(self) -> tuple[CriterionResult, ...]:
        """Every question of the verdict, and its answer."""
        return judged(self.results, self.thresholds)

    @property
    def verdict(self) -> str:
        """What these numbers allow to be said about the circuit, and what they do not."""
        return verdict(self.criteria, len(self.prompts), self.origin_known)

    @property
    def seconds(self) -> float:
        """How long all checks took."""
        return sum(result.seconds for result in self.results)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per number: check, name, variant, value, interval, null."""
        # one more without numbers, so that a report of no checks has the columns too
        frames = [result.to_dataframe() for result in (*self.results, CheckResult())]
        return pd.concat(frames, ignore_index=True)

    def criteria_frame(self) -> pd.DataFrame:
        """A row per criterion: check, criterion, outcome, reason."""
        return pd.DataFrame(
            [(one.check, one.criterion.key, one.outcome, one.reason) for one in self.criteria],
            columns=["check", "criterion", "outcome", "reason"],
        )

    def examples(self) -> pd.DataFrame:
        """A row per number and prompt: check, name, variant, prompt, value.

        Numbers of other prompts than ``prompts`` have their own; those that are not made from
        prompts (of seeds, draws, components) have their place instead.
        """
        frames = []
        for check, m in ((r.check, m) for r in self.results for m in r.measures):
            if m.examples is None:
                continue
            which = m.prompts or [str(i) for i in range(len(m.examples))]
            frame = pd.DataFrame({"prompt": which, "value": m.examples.numpy()})
            frames.append(frame.assign(check=check, name=m.name, variant=m.variant))
        columns = ["check", "name", "variant", "prompt", "value"]
        if not frames:
            return pd.DataFrame(columns=columns)
        return pd.concat(frames, ignore_index=True)[columns]

    def patching_result(self, check: str, name: str) -> Any:
        """A metric's values on the test prompts, a row per variant, as TransformerLens'
        ``PatchingResult``.

        Its bootstrap and permutation tests then apply. The baseline of the ``loss`` of
        ``sufficiency`` is the full model's loss. TransformerLens takes prompts to be independent;
        our intervals draw the two prompts of a pair together.

        Raises:
            NotImplementedError: the installed TransformerLens is older than 4.
            KeyError: the check has no such metric with a value for each test prompt.
        """
        found = self.check(check)
        of_tested = [m for m in found.measures if m.prompts and m.prompts == self.prompts]
        rows = {m.variant: m.examples for m in of_tested if m.name == name}
        if not rows:
            names = ", ".join(sorted({m.name for m in of_tested})) or "none"
            raise KeyError(f"{check} has no {name!r} for each test prompt; it has: {names}")
        baseline = None
        if (check, name) == ("sufficiency", "loss"):
            baseline = found.measure("model_loss").examples
        return compat.patching_result(
            torch.stack([x for x in rows.values() if x is not None]),
            pd.DataFrame({"variant": list(rows)}),
            name,
            baseline,
        )

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Name and value of what was tested, and how."""
        known = (
            ("components", f"{self.n_components:,} of {self.n_universe:,}"),
            ("edges", "" if self.n_edges is None else f"{self.n_edges:,}"),
            ("target loss", "" if self.target_loss is None else f"{self.target_loss:g} nats"),
            ("held-out prompts", f"{len(self.prompts):,}"),
            ("prompts it was found on", "" if self.origin_known else "not known"),
            ("model", f"{self.model_name} {self.model_fingerprint[:12]}"),
            ("seed", str(self.config.seed)),
            ("seconds", f"{self.seconds:.0f}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        )
        return tuple((name, value) for name, value in known if value)

    def to_plotly(self) -> go.Figure:
        """Every number with an interval, and its null beside it."""
        return overview_figure(self.task, self.to_dataframe())

    def write_page(self, path: str | Path, circuits: Sequence[PageCircuit] = ()) -> Path:
        """Write the report as one self-contained page; returns its path.

        Below the report stand circuits to click through, from ``circuits.page_circuit``, such as
        the one that was tested.
        """
        page = report_page(self.task, self.verdict, self.facts, self.criteria, self.results)
        write_atomic(Path(path), page_html(replace(page, circuits=tuple(circuits))))
        return Path(path)

    def __repr__(self) -> str:
        passed = sum(one.outcome == "passed" for one in self.criteria)
        return (
            f"FaithfulnessReport({self.task!r}, {self.n_components} of {self.n_universe} "
            f"components, {passed} of {len(self.criteria)} criteria passed)"
        )

    def _repr_html_(self) -> str:
        return frame_html(f"Faithfulness: {self.task}", self.verdict.splitlines()[0],
                          self.criteria_frame())  # fmt: skip

    # ----------------------------------------------------------------------------------------------
    # on disk

    def save(self, path: str | Path) -> None:
        """Write everything to one JSON file atomically; :meth:`load` restores it exactly."""
        record = {
            "schema_version": SCHEMA_VERSION,
            **{name: plain(getattr(self, name)) for name in SCALARS},
            "versions": dict(self.versions),
            "config": asdict(self.config),
            "thresholds": {name: plain(value) for name, value in self.thresholds.items()},
            "results": [result_record(result, self.prompts) for result in self.results],
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
            stored: ReportRecord = dataclass_from_json(ReportRecord, record)
            results = tuple(result_of(result, stored.prompts) for result in stored.results)
            if len({result.check for result in results}) < len(results):
                raise ValueError("a check is there twice")
            return cls(
                **{name: getattr(stored, name) for name in SCALARS if name != "target_loss"},
                target_loss=None if stored.target_loss is None else real(stored.target_loss),
                versions=stored.versions,
                config=stored.config,
                thresholds=thresholds_of({k: real(v) for k, v in stored.thresholds.items()}),
                results=results,
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} holds no faithfulness report: {error}") from error


@dataclass(frozen=True)
class ReportRecord:
    """What a report's file holds."""

    schema_version: int
    task: str
    model_name: str
    model_fingerprint: str
    n_components: int
    n_universe: int
    n_edges: int | None
    target_loss: Any
    prompts: tuple[str, ...]
    origin_known: bool
    versions: Mapping[str, str]
    config: EvaluationConfig
    thresholds: Mapping[str, Any]
    """Numbers, or words where they are not finite."""
    results: tuple[Any, ...]
    """Each what a :class:`ResultRecord` holds."""

    def __post_init__(self) -> None:
        if not 0 <= self.n_components <= self.n_universe:
            raise ValueError(f"n_components={self.n_components} of {self.n_universe}")
        if self.n_edges is not None and self.n_edges < 0:
            raise ValueError(f"n_edges={self.n_edges} must not be negative")


@dataclass(frozen=True)
class ResultRecord:
    """What a report's file holds of a check."""

    check: str
    seconds: Any
    notes: tuple[str, ...]
    tables: Mapping[str, Any]
    measures: tuple[Any, ...]


@dataclass(frozen=True)
class MeasureRecord:
    """What a report's file holds of a measure; numbers may be words."""

    name: str
    variant: str
    null_name: str
    value: Any
    low: Any
    high: Any
    null: Any
    null_low: Any
    null_high: Any
    examples: Any
    prompts: Any
    """A list, or the word for the report's own prompts."""


SCALARS = (
    "task", "model_name", "model_fingerprint", "n_components", "n_universe", "n_edges",
    "target_loss", "prompts", "origin_known",
)  # fmt: skip
TESTED = "tested"  # stands in a file for the report's own prompts


def result_record(result: CheckResult, tested: tuple[str, ...]) -> dict[str, Any]:
    """A check's result as plain values; what is not a number is None or a word."""
    return {
        "check": result.check,
        "seconds": plain(result.seconds),
        "notes": list(result.notes),
        "tables": {
            name: {
                column: {"type": str(values.dtype), "values": [plain(v) for v in values.tolist()]}
                for column, values in table.items()
            }
            for name, table in result.tables.items()
        },
        "measures": [
            {
                "name": m.name,
                "variant": m.variant,
                "null_name": m.null_name,
                **{name: plain(getattr(m, name)) for name in NUMBERS},
                "examples": None if m.examples is None else [plain(v) for v in m.examples.tolist()],
                "prompts": TESTED if m.prompts and m.prompts == tested else list(m.prompts),
            }
            for m in result.measures
        ],
    }


def result_of(record: Any, tested: tuple[str, ...]) -> CheckResult:
    """A check's result from plain values; ValueError if they are none."""
    stored: ResultRecord = dataclass_from_json(ResultRecord, record)
    if stored.check not in check_names():
        raise ValueError(f"unknown check {stored.check!r:.80}")
    return CheckResult(
        tuple(measure_of(measure, tested) for measure in stored.measures),
        {name: table_of(name, columns) for name, columns in stored.tables.items()},
        stored.notes,
        stored.check,
        real(stored.seconds),
    )


def measure_of(record: Any, tested: tuple[str, ...]) -> Measure:
    """A measure from plain values; ValueError if they are none."""
    stored: MeasureRecord = dataclass_from_json(MeasureRecord, record)
    values = stored.examples
    if values is not None and not isinstance(values, tuple | list):
        raise ValueError(f"examples={values!r:.80} must be a list")
    prompts = tested if stored.prompts == TESTED else stored.prompts
    if not isinstance(prompts, tuple | list) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts={prompts!r:.80} must be a list of texts, or {TESTED!r}")
    return Measure(
        stored.name,
        stored.variant,
        **{name: real(getattr(stored, name)) for name in NUMBERS},
        null_name=stored.null_name,
        examples=None if values is None else torch.tensor([real(v) for v in values]),
        prompts=tuple(prompts),
    )


def table_of(name: str, columns: Any) -> pd.DataFrame:
    """A table from plain values; ValueError if they are none."""
    if not isinstance(columns, dict):
        raise ValueError(f"the table {name!r:.80} must be an object")
    table = {column: series_of(column, values) for column, values in columns.items()}
    if len({len(values) for values in table.values()}) > 1:
        raise ValueError(f"the columns of the table {name!r:.80} are not equally long")
    return pd.DataFrame(table)


def series_of(name: str, record: Any) -> pd.Series:
    """A table's column from plain values; ValueError if they are none."""
    kind, values = (
        (record.get("type"), record.get("values")) if isinstance(record, dict) else (0, 0)
    )
    if not isinstance(kind, str) or kind not in COLUMN_TYPES:
        raise ValueError(f"{kind!r:.80} is no column type; known: {', '.join(COLUMN_TYPES)}")
    if not isinstance(values, list) or not all(type(v) in COLUMN_TYPES[kind] for v in values):
        raise ValueError(f"the column {name!r:.80} must hold {kind}, not {values!r:.80}")
    return pd.Series([real(v) for v in values] if "float" in kind else values, dtype=kind)


def plain(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: these are written as words."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return None if value is pd.NA else value
