"""``trace``: the hierarchical attribution graph of a prompt, and of many prompts in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, overload

import pandas as pd
import torch

from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.progress import progress_bar
from tl_sparse.tracing.attribution import Attribution, attribute
from tl_sparse.tracing.edges import Edges, head_rows, rows, targets_of
from tl_sparse.tracing.gate import Gate
from tl_sparse.tracing.graph import TracedGraph
from tl_sparse.tracing.roots import LogitDiff, Root, token_names
from tl_sparse.tracing.run import run
from tl_sparse.tracing.splice import Splice
from tl_sparse.tracing.spliced_run import SplicedRun
from tl_sparse.tracing.tables import (
    PromptNodes,
    edge_tables,
    head_table,
    prompt_nodes,
    prompt_words,
    star_edges,
)
from tl_sparse.views.display import frame_html

EDGES = ("star", "direct", "through", "none")


@dataclass(frozen=True, eq=False, repr=False)
class TracedGraphs(Sequence[TracedGraph]):
    """The graphs of some prompts."""

    graphs: tuple[TracedGraph, ...]
    """One for each prompt."""

    @overload
    def __getitem__(self, index: int) -> TracedGraph: ...
    @overload
    def __getitem__(self, index: slice) -> TracedGraphs: ...
    def __getitem__(self, index: int | slice) -> TracedGraph | TracedGraphs:
        """One graph, or some."""
        if isinstance(index, slice):
            return TracedGraphs(self.graphs[index])
        return self.graphs[index]

    def __len__(self) -> int:
        """How many."""
        return len(self.graphs)

    def __iter__(self) -> Iterator[TracedGraph]:
        """The graphs."""
        return iter(self.graphs)

    def to_dataframe(self) -> pd.DataFrame:
        """All nodes, with the number of their prompt."""
        tables = [graph.nodes.assign(prompt=i) for i, graph in enumerate(self.graphs)]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def summary(self) -> pd.DataFrame:
        """A row per prompt: root, value, features, edges, and the sum of parts by kind."""
        return pd.DataFrame(
            [
                {"root": g.root, "value": g.value, "features": len(g.features),
                 "edges": len(g.edges)} | dict(g.mass)
                for g in self.graphs
            ]
        )  # fmt: skip

    @property
    def line(self) -> str:
        """The facts in one line."""
        sizes = [len(graph.features) for graph in self.graphs]
        mean = sum(sizes) / max(1, len(sizes))
        return f"{len(self)} prompts, {mean:.1f} features each"

    def __repr__(self) -> str:
        return f"TracedGraphs({self.line})"

    def _repr_html_(self) -> str:
        return frame_html("Traced graphs", self.line, self.summary().head(20))


def trace(
    splice: Splice,
    prompt: PromptsLike | Prompts,
    root: Root | None = None,
    gate: Gate | None = None,
    *,
    edges: Edges = "direct",
    heads: bool = False,
    rows_at_once: int = 32,
) -> TracedGraph:
    """The graph of one prompt; the arguments are those of :func:`trace_each`.

    Raises:
        ValueError: there are more prompts; and what trace_each raises.
    """
    prompts = prompts_of(splice.model, prompt)
    if len(prompts) != 1:
        raise ValueError(f"trace takes one prompt, not {len(prompts)}; trace_each takes many")
    return trace_each(
        splice, prompts, root, gate, edges=edges, heads=heads, rows_at_once=rows_at_once
    )[0]


def trace_each(
    splice: Splice,
    prompts: PromptsLike | Prompts,
    root: Root | None = None,
    gate: Gate | None = None,
    *,
    edges: Edges = "direct",
    heads: bool = False,
    rows_at_once: int = 32,
    batch_size: int = 16,
    progress: bool = False,
) -> TracedGraphs:
    """Trace a root in every prompt: hierarchical attribution, one backward pass for a batch.

    Args:
        splice: The model and its dictionaries.
        prompts: Texts, tokens, or a task's batch.
        root: What is traced; by default the logit difference of the answers, if prompts have them.
            One root for all prompts; tokens may differ between them.
        gate: Where gradients stop; by default the paper's, score > 0.1.
        edges: ``star``: from every node to the root. ``direct``: what each kept node, and each
            leaf, adds to every other without another node between; with everything frozen a row
            sums to the target's activation. ``through``: paths may pass features that were not
            kept. ``none``.
        heads: Whether edges into an attention dictionary's features are divided by heads.
        rows_at_once: Edge targets of a prompt in one backward pass; memory grows with it.
        batch_size: Prompts in one pass.
        progress: Whether a bar is shown.

    Raises:
        NotLinear: the splice is strict, and the parts do not sum to the root.
        ValueError: a root that a prompt does not have, an unknown option.
    """
    if edges not in EDGES:
        raise ValueError(f"edges={edges!r}; choose from {', '.join(EDGES)}")
    given = prompts_of(splice.model, prompts)
    gate = Gate() if gate is None else gate
    if root is None:
        if given.correct is None or given.incorrect is None:
            raise ValueError(
                "no root: give one, as Logit(token), or prompts with answers (a task's batch)"
            )
        correct, incorrect = given.correct.tolist(), given.incorrect.tolist()
        model = splice.model
        root = LogitDiff(token_names(model, correct), token_names(model, incorrect))
    graphs: list[TracedGraph] = []
    starts = range(0, len(given), batch_size)
    for first in progress_bar(starts, desc="tracing", disable=not progress, leave=False):
        number = torch.arange(first, min(first + batch_size, len(given)))
        part = given.rows(number.to(given.last.device))
        graphs += batch_graphs(
            splice, part, root_of(root, number.tolist(), len(given)), gate, edges, heads,
            rows_at_once,
        )  # fmt: skip
    return TracedGraphs(tuple(graphs))


def root_of(root: Root, chosen: Sequence[int], n_prompts: int) -> Root:
    """The root of some of the prompts, where it has a token for each."""
    change: dict[str, Any] = {}
    for field in fields(root):
        value = getattr(root, field.name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != n_prompts:
                raise ValueError(f"root: {len(value)} tokens for {n_prompts} prompts")
            change[field.name] = [value[i] for i in chosen]
    return replace(root, **change) if change else root


def batch_graphs(
    splice: Splice,
    prompts: Prompts,
    root: Root,
    gate: Gate,
    edges: Edges,
    heads: bool,
    rows_at_once: int,
) -> list[TracedGraph]:
    """Graphs of prompts that fit into one pass."""
    points = list(root.hooks(splice))
    attention = attention_sites(splice) if heads else {}
    points += [f"blocks.{layer}.attn.hook_z" for layer in attention.values()]
    spliced = run(splice, prompts.tokens, prompts.last, gate, points)
    found = attribute(spliced, root)
    nodes = [prompt_nodes(spliced, found, root, i) for i in range(len(prompts))]
    names = [root.name(i) for i in range(len(prompts))]
    tables: list[tuple[pd.DataFrame, pd.DataFrame]]
    if edges in ("direct", "through"):
        targets = [targets_of(spliced, found, i) for i in range(len(prompts))]
        through = edges == "through"
        every = rows(spliced, found, targets, through, rows_at_once)
        tables = edge_tables(spliced, every, nodes, names, through)
    else:
        tables = [
            (star_edges(mine, name) if edges == "star" else pd.DataFrame(), pd.DataFrame())
            for mine, name in zip(nodes, names, strict=True)
        ]
    settings, values = settings_of(splice, gate, edges), found.values.detach()
    graphs = []
    for i, (mine, (edge_table, row_table)) in enumerate(zip(nodes, tables, strict=True)):
        tokens = prompts.tokens[i, : int(prompts.last[i]) + 1].tolist()
        mass = {kind: float(part[i]) for kind, part in found.mass.items()}
        graphs.append(TracedGraph(
            tuple(tokens), prompt_words(spliced, i), names[i], float(values[i]), mine.table,
            edge_table, mass, row_table, by_head(spliced, found, attention, mine, rows_at_once),
            settings | {"threshold": float(spliced.state.tau[i])},
        ))  # fmt: skip
    return graphs


def attention_sites(splice: Splice) -> dict[str, int]:
    """Dictionaries of what attention writes → their layers."""
    return {
        d.name: splice.layer(d.name)
        for d in splice.dictionaries
        if d.hook_out.endswith("hook_attn_out") and not d.transcoder
    }


def by_head(
    spliced: SplicedRun,
    found: Attribution,
    attention: dict[str, int],
    nodes: PromptNodes,
    rows_at_once: int,
) -> pd.DataFrame:
    """Edges of one prompt into attention dictionaries' features, by head."""
    n_heads = int(spliced.splice.model.cfg.n_heads)  # type: ignore[union-attr, arg-type]
    size = max(1, rows_at_once // n_heads)
    tables = []
    for name, layer in attention.items():
        entries, ids = nodes.entries[name], nodes.ids[name]
        before = spliced.sites[name].features.before
        for first in range(0, len(entries), size):
            some = entries[first : first + size]
            parts = head_rows(spliced, layer, before, some)
            tables.append(head_table(parts, ids[first : first + size], nodes))
    kept = [table for table in tables if len(table)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()


def settings_of(splice: Splice, gate: Gate, edges: str) -> dict[str, Any]:
    """How something is traced, in plain values."""
    return asdict(gate) | {
        "edges": edges, "mlp": splice.mlp, "freeze": asdict(splice.freeze),
        "score_nodes": splice.score_nodes, "raw_scores": splice.raw_scores,
        "sites": list(splice.sites),
    }  # fmt: skip
