"""Does the suite tell true circuits from false ones, where the truth is known by construction?

Rows are circuits of planted models: true ones, of nodes and (of compiled programs) of heads, and
six false ones, each built to look well on most metrics. Columns are the parts of the suite: a cell
says how many of the part's checks passed, and names those that did not. ``told`` says whether a
false circuit fails the checks that it was built to fail, and which others it fails; of a true
circuit, whether it passes all. Prints a markdown table and writes ground_truth.json.

    OMP_NUM_THREADS=1 python benchmarks/ground_truth.py --parts ABCDEI
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tl_sparse import ground_truth
from tl_sparse.circuits import Circuit, circuit_of_heads
from tl_sparse.faithfulness import EvaluationConfig
from tl_sparse.faithfulness.evaluate import evaluate
from tl_sparse.faithfulness.report import FaithfulnessReport
from tl_sparse.ground_truth.compiled_programs import PROGRAMS


@dataclass(frozen=True)
class Row:
    """A circuit to test."""

    name: str
    planted: ground_truth.GroundTruthModel
    circuit: Circuit
    caught_by: tuple[str, ...] = ()


def rows(seed: int) -> list[Row]:
    """All circuits."""
    models = ground_truth.ground_truth_models(seed)
    found = [Row(f"{name}", model, model.circuit()) for name, model in models.items()]
    closing = ground_truth.quote_closing(distractors=27, seed=seed)
    found.append(Row("quote_closing", closing, closing.circuit()))
    busy = ground_truth.bystanders(seed)
    found.append(Row("bystanders", busy, busy.circuit()))
    for name in PROGRAMS:
        program = ground_truth.compiled(name, seed)
        heads = circuit_of_heads(program.model, program.task.name, program.heads, program.text)
        found.append(Row(f"{name}, heads", program, heads))
    found += [
        Row(f"**{false.name}** in {false.model}", false.truth, false.circuit(), false.caught_by)
        for false in ground_truth.false_circuits(seed, models)
    ]
    return found


CHECKS = (
    "sufficiency", "necessity", "completeness", "minimality", "partial_ablation", "norms",
    "node_values", "attention_patterns", "component_effects", "cumulative_restoration",
)  # fmt: skip


def passed(report: FaithfulnessReport) -> str:
    """How many of the measured criteria passed, and which did not."""
    asked = [one for one in report.criteria if one.outcome != "not measured"]
    wrong = [one for one in asked if one.outcome != "passed"]
    names = [
        one.criterion.key + ("" if one.outcome == "failed" else f" ({one.outcome})")
        for one in wrong
    ]
    text = f"{len(asked) - len(wrong)}/{len(asked)}"
    return ": ".join([text, ", ".join(names)]) if names else text


def judged(row: Row, report: FaithfulnessReport) -> str:
    """Whether the suite says of a circuit what is known of it."""
    wrong = {
        one.criterion.key: one.outcome
        for one in report.criteria
        if one.outcome not in ("passed", "not measured")
    }
    if not row.caught_by:
        return "not all passed" if wrong else "passes all"
    caught = all(wrong.get(key) == "failed" for key in row.caught_by)
    elsewhere = sorted(set(wrong) - set(row.caught_by))
    text = f"fails {', '.join(row.caught_by)}" if caught else "**not caught**"
    return text + (f"; also {', '.join(elsewhere)}" if elsewhere else " alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", nargs="+", default=list(CHECKS))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", default="ground_truth.json")
    args = parser.parse_args()
    config = EvaluationConfig(checks=tuple(args.checks), pairs=args.pairs, seed=args.seed)
    header = ["circuit", "components", "loss", "f", "criteria passed", "told"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    records = []
    for row in rows(args.seed):
        if args.only not in row.name:
            continue
        start = time.perf_counter()
        report = evaluate(
            row.planted.model, row.circuit, row.planted.task, config, tokens=row.planted.text,
            progress=False,
        )  # fmt: skip
        own = {
            name: report.check("sufficiency").measure(name, "as_pruned").value
            for name in ("loss", "f")
        }
        line = [row.name, str(report.n_components), *(f"{own[name]:.2f}" for name in ("loss", "f"))]
        line += [passed(report), judged(row, report)]
        print("| " + " | ".join(line) + " |", flush=True)
        records.append(
            dict(zip(header, line, strict=True))
            | {"seconds": time.perf_counter() - start}
            | {
                "failed": [
                    c.reason for c in report.criteria if c.outcome in ("failed", "uncertain")
                ]
            }
        )
    machine = {
        "torch": torch.__version__, "python": platform.python_version(),
        "threads": torch.get_num_threads(), "arguments": vars(args),
    }  # fmt: skip
    Path(args.out).write_text(json.dumps({"machine": machine, "rows": records}, indent=1))


if __name__ == "__main__":
    main()
