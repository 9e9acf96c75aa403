"""The command about heads: which heads of a model are of a task's circuit, from a few prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tl_sparse.circuits import page_circuit
from tl_sparse.cli.inputs import Overwrite, check_out, say
from tl_sparse.compat import pretrained
from tl_sparse.heads import (
    DiscreteSAE,
    IdentifiedHeads,
    contrastive,
    contrastive_from_jsonl,
    contrastive_task,
    extract_head_outputs,
    identify,
    score_edges,
)
from tl_sparse.heads.codes import CodeKind
from tl_sparse.heads.component import Kind
from tl_sparse.heads.discrete_sae import Mode
from tl_sparse.heads.scores import Score
from tl_sparse.model.by_name import is_openai, model_of
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.hub import CONFIG, bundled_models
from tl_sparse.storage.json_files import read_json
from tl_sparse.views import Chart, Page, Section, Table, page_html


@dataclass(frozen=True)
class Heads:
    """Name the heads of a task's circuit: those whose codes tell positive from negative prompts."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model, the name of a bundled or a released one, or any model's name in
    TransformerLens or on the Hub, such as gpt2."""
    out: str
    """Folder for heads.csv, heads.html (map and circuit), edges.csv, settings.json, the circuit."""
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""
    task: str = "ioi"
    """ioi, greater_than, docstring, induction, pronoun, or a task of tl-sparse tasks."""
    file: str | None = None
    """Your own prompts instead: a line of JSON a pair, with the keys positive and negative, and if
    wanted answers and roles."""
    prompts: int = 250
    """Prompts of each kind; of a file all."""
    position: str = "mean"
    """Where outputs are read: mean, last, max, or a role, such as S2 of ioi."""
    nodes: tuple[Kind, ...] = ("head",)
    """What gets codes."""
    mode: Mode = "corrected"
    """The autoencoder as published, or corrected."""
    codes: CodeKind = "argmax"
    """What of its units is the code."""
    n_codes: int = 200
    """Its units."""
    lam: float = 0.02
    """Weight of their L1 norm."""
    epochs: int = 500
    """Steps of training; 0 leaves the encoder random."""
    n_train: int = 10
    """Prompts that it is trained on."""
    score: Score | Literal["edge_votes"] = "mi"
    """What differs between positive and negative prompts."""
    fdr: float = 0.05
    """False discovery rate of the named heads."""
    top: int | None = None
    """Name so many heads instead."""
    edges: bool = False
    """Whether pairs of heads are scored too."""
    edge_shuffles: int = 0
    """Shuffles of the labels by which pairs are named, such as 200; 0 names none."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 32
    """Prompts of a forward pass."""
    seed: int = 0
    """Seed of prompts, training and shuffles."""

    def run(self) -> None:
        """Name them, and write what was found."""
        made = ("heads.csv", "heads.html", "edges.csv", "settings.json", "circuit")
        check_out(self.out, made, self.overwrite)
        model: Any = model_of(self.model) if is_ours(self.model) else pretrained(self.model)
        if self.file is None:
            dataset = contrastive(self.task, model, self.prompts, seed=self.seed)
        else:
            dataset = contrastive_from_jsonl(self.file, model)
        outputs = extract_head_outputs(
            model, dataset, self.position, self.nodes, batch_size=self.batch_size, progress=True
        )
        sae = DiscreteSAE.fit(
            outputs, self.mode, n_codes=self.n_codes, lam=self.lam, epochs=self.epochs,
            n_train=self.n_train, seed=self.seed, progress=True,
        )  # fmt: skip
        codes = sae.codes(outputs, self.codes)
        found = identify(codes, score=self.score, fdr=self.fdr, seed=self.seed)
        chosen = found.named if self.top is None else found.top(self.top)
        pairs = circuit = None
        if self.edges or self.edge_shuffles:
            pairs = score_edges(codes, permutations=self.edge_shuffles, seed=self.seed)
        page = page_of(found, repr(dataset))
        if chosen and all(c.kind == "head" for c in chosen):
            circuit = found.circuit(model, dataset, chosen)
            task = None if self.file else contrastive_task(self.task, model.tokenizer)
            page = replace(page, circuits=(page_circuit(circuit, model, task),))
        settings = vars(self) | {"heads": [str(c) for c in chosen], "seconds": found.seconds}
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "heads.html", page_html(page))
        write_atomic(out / "heads.csv", found.to_dataframe().to_csv(index=False))
        write_atomic(out / "settings.json", json.dumps(settings, indent=1))
        if pairs is not None:
            write_atomic(out / "edges.csv", pairs.to_dataframe().to_csv(index=False))
        if circuit is not None:
            circuit.save(out / "circuit")
        names = ", ".join(str(c) for c in chosen) or "none"
        rule = f"at FDR {self.fdr:g}" if self.top is None else "highest"
        say(f"{len(chosen)} of {len(codes.components)} components {rule}: {names}")
        say(f"{dataset!r}\nTable, map and circuit: {out.resolve()}")


def is_ours(name: str) -> bool:
    """Whether it is a model of this package or of OpenAI's release, and not TransformerLens' own or
    one of the Hub's."""
    if is_openai(name) or name in bundled_models():
        return True
    config = Path(name) / CONFIG
    return config.is_file() and "schema_version" in read_json(config)


def page_of(found: IdentifiedHeads, dataset: str) -> Page:
    """The map of the heads, and their table."""
    named = ", ".join(map(str, found.named)) or "none"
    summary = f"Above chance at a false discovery rate of {found.fdr:g}: {named}."
    return Page(
        f"Heads of {found.name}", summary,
        (("codes", found.method), ("score", found.score), ("prompts", dataset),
         ("shuffles", f"{found.permutations:,}"), ("seconds", f"{found.seconds:.1f}")),
        (Section("Map", (Chart(found.to_plotly()),)),
         Section("Heads", (Table(found.to_dataframe(), max_rows=60),))),
    )  # fmt: skip
