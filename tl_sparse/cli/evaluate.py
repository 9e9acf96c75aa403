"""The command ``tl-sparse evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tl_sparse.circuits import Circuit
from tl_sparse.cli.circuits import model_with_tokenizer
from tl_sparse.cli.words import say
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.faithfulness import EvaluationConfig, Thresholds, evaluate
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tasks import get


@dataclass(frozen=True)
class Evaluate:
    """Test whether a circuit is faithful: eleven parts, each with its nulls, and a verdict."""

    model: str
    """Folder of a saved model, or the name of a bundled one."""
    circuit: str
    """Folder of a saved circuit, such as OUT/circuit of tl-sparse prune."""
    out: str
    """Folder for report.json, report.html, numbers.csv and checks.csv."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text whose validation part is resampled from; no more is read than needed."""
    sequences: int = 256
    """Sequences of it."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How thoroughly it is tested."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """What the verdict asks for."""

    def run(self) -> None:
        """Evaluate, write the report and say the verdict."""
        if self.sequences < 1:
            raise ValueError(f"sequences={self.sequences} must be at least 1")
        model = model_with_tokenizer(self.model)
        length = model.config.n_ctx
        circuit = Circuit.load(self.circuit, model)
        task = get(circuit.task, model.tokenizer, length)
        text = validation_text(self.corpus, model.tokenizer, self.sequences, length)
        report = evaluate(
            model, circuit, task, self.evaluation, tokens=text, thresholds=self.thresholds
        )
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        report.save(out / "report.json")
        write_atomic(out / "numbers.csv", report.to_dataframe().to_csv(index=False))
        write_atomic(out / "checks.csv", report.checks_frame().to_csv(index=False))
        page = report.write_page(out / "report.html")
        say(f"{report.verdict}\nReport: {page}")
