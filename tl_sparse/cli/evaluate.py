"""The command ``tl-sparse evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tl_sparse.circuits import Circuit, page_circuit
from tl_sparse.cli.inputs import (
    Overwrite,
    check_out,
    circuit_folder,
    model_with_tokenizer,
    say,
    task_of,
    text_of,
)
from tl_sparse.data import CorpusConfig
from tl_sparse.faithfulness import EvaluationConfig, evaluate
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tasks import names

FILES = ("report.json", "report.html", "numbers.csv", "criteria.csv")


@dataclass(frozen=True)
class Evaluate:
    """Test whether a circuit is faithful: checks, each with its nulls, and a verdict."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model, or the name of a bundled one."""
    circuit: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CIRCUIT")]
    """Folder of a saved circuit, such as OUT/circuit of tl-sparse prune."""
    out: str
    """Folder for report.json, report.html, numbers.csv and criteria.csv."""
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""
    task: str | None = None
    """File of the circuit's task, if it is your own; default the built-in task that it names."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text whose validation part is resampled from; no more is read than needed."""
    sequences: int = 256
    """Sequences of it."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How thoroughly it is tested."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Criterion and threshold, where the verdict asks for another than its own."""

    def run(self) -> None:
        """Evaluate, write the report and say the verdict."""
        check_out(self.out, FILES, self.overwrite)
        model = model_with_tokenizer(self.model)
        circuit = Circuit.load(circuit_folder(self.circuit), model)
        if self.task is None and circuit.task not in names():
            raise ValueError(
                f"the circuit's task {circuit.task!r} is your own: name its file with --task"
            )
        task = task_of(model, self.task or circuit.task)
        text = text_of(model, self.corpus, self.sequences)
        report = evaluate(
            model, circuit, task, self.evaluation, tokens=text, thresholds=self.thresholds
        )
        shown = page_circuit(circuit, model, task, title="the circuit that was tested")
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        report.save(out / "report.json")
        write_atomic(out / "numbers.csv", report.to_dataframe().to_csv(index=False))
        write_atomic(out / "criteria.csv", report.criteria_frame().to_csv(index=False))
        page = report.write_page(out / "report.html", (shown,))
        say(f"{report.verdict}\nReport: {page}")
