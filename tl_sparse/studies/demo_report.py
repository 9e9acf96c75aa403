"""The demo's files: report.json, report.csv, one self-contained page, and the circuits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_sparse.circuits import page_circuit
from tl_sparse.compat import transformer_lens_version
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.studies.demo import DemoResult
from tl_sparse.studies.interpretability import geometric_mean
from tl_sparse.views import Bullets, Page, Section, Table, page_html

EXAMPLE_PAIRS = 2
NAMES = ("sparse", "dense")


def write_report(result: DemoResult) -> Path:
    """Write report.json, report.csv, report.html and circuits/; returns the page's path."""
    html = page_html(page(result))
    out = Path(result.config.out)
    out.mkdir(parents=True, exist_ok=True)
    for (task, model), circuit in result.circuits.items():
        circuit.save(out / "circuits" / f"{task}-{model}")
    write_atomic(out / "report.csv", result.rows.to_csv(index=False))
    write_atomic(out / "report.json", json.dumps(summary(result), indent=1, allow_nan=False))
    write_atomic(out / "report.html", html)
    return out / "report.html"


def comparison(rows: pd.DataFrame) -> pd.DataFrame:
    """Per task with both circuits, how many times smaller the sparse one is than the dense one.

    A ratio is NaN where one of the two is empty.
    """
    found = rows[rows["model"].isin(NAMES)]
    if "nodes" not in found:
        return pd.DataFrame(columns=["task", "node_ratio", "edge_ratio"])
    wide = found.pivot(index="task", columns="model", values=["nodes", "edges"])
    wide = wide.reindex(columns=pd.MultiIndex.from_product([["nodes", "edges"], NAMES]))
    wide = wide.dropna().where(wide > 0)
    return pd.DataFrame(
        {
            "node_ratio": wide["nodes", "dense"] / wide["nodes", "sparse"],
            "edge_ratio": wide["edges", "dense"] / wide["edges", "sparse"],
        }
    ).reset_index()


def mean_ratio(ratios: pd.Series) -> float | None:
    """Geometric mean of the ratios that are known; None of none."""
    mean = geometric_mean(ratios.dropna())
    return None if math.isnan(mean) else mean


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain values, exactly; None where one is missing."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def summary(result: DemoResult) -> dict[str, Any]:
    """Everything measured, as plain values."""
    ratios = comparison(result.rows)
    sparse, dense = result.models
    return {
        "tl_sparse_version": version("tl-sparse"),
        "transformer_lens_version": transformer_lens_version(),
        "torch_version": torch.__version__,
        "config": asdict(result.config),
        "corpus": {"fingerprint": result.corpus.fingerprint, **asdict(result.corpus.stats)},
        "models": {
            m.name: {
                "config": m.model.config.to_dict(),
                "validation_loss": m.validation_loss,
                "training_seconds": m.seconds,
                "nonzero_weights": sum(m.l0.values()),
                "task_losses": {name: r.loss for name, r in m.tasks.items()},
                "task_accuracies": {name: r.accuracy for name, r in m.tasks.items()},
            }
            for m in result.models
        },
        "validation_loss_difference": sparse.validation_loss - dense.validation_loss,
        "ratios": records(ratios),
        "geometric_mean_node_ratio": mean_ratio(ratios["node_ratio"]),
        "geometric_mean_edge_ratio": mean_ratio(ratios["edge_ratio"]),
        "failures": [
            {"task": task, "model": model, "reason": reason}
            for (task, model), reason in result.failures.items()
        ],
        "rows": records(result.rows),
    }


def page(result: DemoResult) -> Page:
    """The report page's content."""
    sparse, dense = result.models
    ratios = comparison(result.rows)
    said = [
        f"{row.task}: {times(row.edge_ratio, 'edges')} and {times(row.node_ratio, 'nodes')}"
        for row in ratios.itertuples()
    ]
    blocks = [matrix for matrix in weight_matrices(sparse.model) if matrix.role == "block"]
    kept = sum(sparse.l0[matrix.name] for matrix in blocks) / sum(m.numel for m in blocks)
    target = result.config.target_loss
    text = (
        f"Two small transformers were trained on the Python of this machine: a sparse one, of "
        f"whose block weights {1 - kept:.1%} are exactly zero, and a dense one. Both were pruned "
        f"to the nodes that a task needs for a loss of {target}, every other node set to its mean. "
        + (f"The sparse model's circuits have, by task: {'; '.join(said)}." if said else
           "No task has a circuit of both models, so there is nothing to compare.")
    )  # fmt: skip
    gap = abs(sparse.validation_loss - dense.validation_loss)
    facts = (
        ("validation loss, sparse", f"{sparse.validation_loss:.3f} nats per token"),
        ("validation loss, dense", f"{dense.validation_loss:.3f} nats per token"),
        ("nonzero weights, sparse", f"{sum(sparse.l0.values()):,}"),
        ("nonzero weights, dense", f"{sum(dense.l0.values()):,}"),
        ("training tokens", f"{result.corpus.stats.tokens_train:,} available"),
        ("seed", str(result.config.seed)),
        ("versions", f"tl_sparse {version('tl-sparse')}, TransformerLens "
                     f"{transformer_lens_version()}, torch {torch.__version__}"),
    )  # fmt: skip
    notes = [
        "A sparse matrix has fewer edges by construction. random_edges is how many edges random "
        "node sets of the same size have in the same model; nodes are reported beside edges.",
        "The magnitude-pruned rows are the dense model with only its largest weights kept, at the "
        "sparse model's density: whether it still solves the task, and what its circuit then has.",
        f"Losses are two-way cross-entropies over the task's answers on held-out templates and "
        f"names; chance is {math.log(2):.3f}. The number of nodes was chosen on other prompts "
        "(selection_loss).",
        "A circuit that does the task is not thereby how the model does it: mean ablation of the "
        "rest is one test of faithfulness among many.",
        "One seed. Differences of a few nodes or edges mean nothing.",
    ]
    if gap > 0.05:
        notes.insert(
            0, f"The validation losses differ by {gap:.3f} nats: the models are not matched."
        )
    if target > result.asked_loss:
        notes.insert(
            0,
            f"No task is done by both models to a loss of {result.asked_loss}, as was asked: "
            f"this is what they do to {target}.",
        )
    notes += [f"No circuit for {t}, {m}: {why}." for (t, m), why in result.failures.items()]
    by_name = {m.name: m for m in result.models}
    return Page(
        title="Circuits of a sparse and a dense transformer",
        summary=text,
        facts=facts,
        sections=(
            Section("Results", () if result.rows.empty else (Table(result.rows),)),
            Section("Read with care", (Bullets(tuple(notes)),)),
        ),
        circuits=tuple(
            page_circuit(circuit, by_name[model].model, title=model, pairs=EXAMPLE_PAIRS)
            for (_, model), circuit in result.circuits.items()
        ),
    )


def times(ratio: float, what: str) -> str:
    """A ratio in words."""
    if math.isnan(ratio):
        return f"no ratio of {what}, as one circuit has none"
    return f"{ratio:.1f} times fewer {what}"
