"""The command about features: which of a model's dictionaries' features a logit is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tl_sparse.cli.inputs import (
    Overwrite,
    check_out,
    model_with_tokenizer,
    say,
    task_of,
    text_of,
)
from tl_sparse.data import CorpusConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.nodes.prompts import Prompts, prompts_of
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tracing import (
    Dictionary,
    Gate,
    LLMAnnotator,
    Logit,
    LogitDiff,
    RuleAnnotator,
    Splice,
    TracedGraphs,
    annotate,
    attribution_graph,
    feature_cards,
    load_dictionaries,
    read_dictionary,
    save_attribution_graph,
    save_graph,
    trace_each,
)
from tl_sparse.tracing.edges import Edges
from tl_sparse.tracing.gate import Mode, Sign
from tl_sparse.tracing.page import page_graph
from tl_sparse.tracing.roots import Root
from tl_sparse.views import Page, Section, Table, page_html

DRAWN = "attribution_graphs"


@dataclass(frozen=True)
class Trace:
    """Trace a logit, or the difference of two, back to the features of a model's dictionaries."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of a saved model, or the name of a bundled or a released one."""
    out: str
    """Folder for the graphs (graph-0.json and so on), nodes.csv, edges.csv, trace.html,
    settings.json, and attribution_graphs/, which circuit-tracer's and Neuronpedia's pages draw."""
    overwrite: Overwrite = False
    """Replace what OUT has of an earlier run."""
    dictionaries: tuple[str, ...] = ()
    """A folder of saved dictionaries, or files and folders of other packages' (SAELens,
    circuit-tracer, Gemma Scope, OpenMOSS, Dunefsky et al.); by default those that ship with the
    model."""
    task: str | None = None
    """A task of tl-sparse tasks: the root is the logit difference of its answers."""
    text: str | None = None
    """A prompt of your own instead."""
    token: str | None = None
    """The token whose logit is traced after the text; by default the likeliest."""
    versus: str | None = None
    """A token whose logit is subtracted."""
    prompts: int = 2
    """Prompts of the task, which come in pairs."""
    tau: float = 0.1
    """Where gradients stop: at features with a score of no more than this (see mode)."""
    mode: Mode = "absolute"
    """What tau is: in logits, a share of the root (relative), a quantile, so many features of each
    dictionary (top_k), or so many in all (budget)."""
    sign: Sign = "positive"
    """Which scores pass."""
    edges: Edges = "direct"
    """Which edges are computed."""
    label: Literal["rule", "llm", "none"] = "rule"
    """Who labels features: a rule, or a language model (with llm and, for an endpoint that is not
    OpenAI's, base_url; its key is in the environment variable OPENAI_API_KEY)."""
    llm: str | None = None
    """The language model's name at the endpoint."""
    base_url: str | None = None
    """Address of an OpenAI-compatible endpoint."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text whose examples features are labelled by."""
    sequences: Annotated[int, tyro.conf.arg(aliases=["-s"])] = 128
    """Sequences of it."""
    seed: int = 0
    """Seed of the task's prompts."""

    def run(self) -> None:
        """Trace, label, and write."""
        if (self.task is None) == (self.text is None):
            raise ValueError("give task= or text=, one of the two")
        if self.label == "llm" and self.llm is None:
            raise ValueError("label=llm needs llm=, the language model's name at the endpoint")
        if self.prompts < 1:
            raise ValueError(f"prompts={self.prompts} must be at least 1")
        made = ("graph-0.json", "nodes.csv", "edges.csv", "trace.html", "settings.json", DRAWN)
        check_out(self.out, made, self.overwrite)
        model = model_with_tokenizer(self.model)
        dictionaries = self.loaded(model)
        splice = Splice(model, dictionaries)
        prompts, root = self.asked(model)
        gate = Gate(self.tau, self.mode, self.sign)
        graphs = trace_each(splice, prompts, root, gate, edges=self.edges, progress=True)
        notes = self.labelled(model, splice, graphs)
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        for number, (graph, texts) in enumerate(zip(graphs, notes, strict=True)):
            save_graph(graph, out / f"graph-{number}.json")
            scan = Path(self.model).name.lower()
            save_attribution_graph(
                attribution_graph(graph, f"graph-{number}", scan, texts), out / DRAWN
            )
        table = graphs.to_dataframe()
        table["label"] = [notes[p].get(i, "") for p, i in zip(table["prompt"], table["id"],
                                                              strict=True)]  # fmt: skip
        write_atomic(out / "nodes.csv", table.to_csv(index=False))
        edges = [graph.edges.assign(prompt=i) for i, graph in enumerate(graphs)]
        write_atomic(out / "edges.csv", "\n".join(
            each.to_csv(index=False, header=i == 0).strip() for i, each in enumerate(edges)) + "\n"
        )  # fmt: skip
        write_atomic(out / "trace.html", page_html(page_of(self.model, graphs, notes)))
        settings = vars(self) | {"corpus": vars(self.corpus), "graphs": len(graphs)}
        write_atomic(out / "settings.json", json.dumps(settings, indent=1, default=list))
        for graph in graphs:
            say(graph.line)
        say(f"Graphs, tables and page: {out.resolve()}")

    def loaded(self, model: SparseTransformer) -> tuple[Dictionary, ...]:
        """The dictionaries that were named."""
        if not self.dictionaries:
            return load_dictionaries(self.model, model)
        found: list[Dictionary] = []
        for name in self.dictionaries:
            if (Path(name) / "dictionaries.json").is_file() or not Path(name).exists():
                found += load_dictionaries(name, model)
            else:
                found.append(read_dictionary(name))
        return tuple(found)

    def asked(self, model: SparseTransformer) -> tuple[Prompts, Root | None]:
        """The prompts, and what is traced in them."""
        if self.task is not None:
            pairs = -(-self.prompts // 2)
            batch = task_of(model, self.task).batch(pairs, split="held_out", seed=self.seed)
            whole = prompts_of(model, batch)
            return whole.rows(whole.last.new_tensor(range(self.prompts))), None
        prompts = prompts_of(model, str(self.text))
        token: str | int | None = self.token
        if token is None:
            token = int(model(prompts.tokens)[0, -1].argmax())
        return prompts, Logit(token) if self.versus is None else LogitDiff(token, self.versus)

    def labelled(
        self, model: SparseTransformer, splice: Splice, graphs: TracedGraphs
    ) -> list[dict[str, str]]:
        """For each graph: node id → label, if any are asked for."""
        if self.label == "none":
            return [{} for _ in graphs]
        rows = graphs.to_dataframe()
        rows = rows[rows["kind"] == "feature"]
        chosen = sorted({(str(s), int(i)) for s, i in zip(rows["site"], rows["index"],
                                                          strict=True)})  # fmt: skip
        tokens = text_of(model, self.corpus, self.sequences)
        cards = feature_cards(model, tuple(splice.dictionaries), chosen, tokens)
        who: RuleAnnotator | LLMAnnotator = RuleAnnotator(share=1.0)
        if self.llm is not None and self.label == "llm":
            who = LLMAnnotator(self.llm, self.base_url, Path(self.out) / "answers")
        found = [annotate(graph, cards, who, task=self.task or "") for graph in graphs]
        return [{i: label.text for i, label in each.labels.items()} for each in found]


def page_of(model: str, graphs: TracedGraphs, notes: list[dict[str, str]]) -> Page:
    """Each prompt's nodes, the largest first, and where the root's value comes from."""
    sections = [Section("Prompts", (Table(graphs.summary()),))]
    for number, (graph, texts) in enumerate(zip(graphs, notes, strict=True)):
        order = graph.nodes["attribution"].abs().sort_values(ascending=False).index
        columns = ["id", "kind", "token", "activation", "attribution"]
        table = graph.nodes.loc[order, columns]
        table["label"] = [texts.get(i, "") for i in table["id"]]
        name = f"Prompt {number}: {''.join(graph.words)!r:.120}"
        sections.append(Section(name, (Table(table.reset_index(drop=True), max_rows=80),)))
    first = graphs[0].settings
    return Page(
        f"Traced features of {model}", f"{graphs.line}.",
        (("gate", f"{first.get('sign')} scores, {first.get('mode')} {first.get('tau')}"),
         ("edges", str(first.get("edges"))),
         ("dictionaries", ", ".join(map(str, first.get("sites", []))))),
        tuple(sections),
        circuits=tuple(
            replace(page_graph(graph, texts), title=f"prompt {i}")
            for i, (graph, texts) in enumerate(zip(graphs, notes, strict=True))
        ),
    )  # fmt: skip
