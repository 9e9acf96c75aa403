"""From the tensors of a trace to the tables of each prompt's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_sparse.nodes.tokens import token_texts
from tl_sparse.tasks.padding import real_positions
from tl_sparse.tracing.attribution import Attribution
from tl_sparse.tracing.edges import Row
from tl_sparse.tracing.graph import EDGE_COLUMNS, NODE_COLUMNS
from tl_sparse.tracing.roots import FeatureRoot, Root, position
from tl_sparse.tracing.spliced_run import SplicedRun

LEAF_KINDS = ("error", "bias", "token", "position")


@dataclass(frozen=True, eq=False, repr=False)
class PromptNodes:
    """Nodes of one prompt's graph, and where they are among the tensors."""

    table: pd.DataFrame
    """:attr:`TracedGraph.nodes`."""
    entries: Mapping[str, Tensor]
    """Site → numbers of the kept nodes among its active ones."""
    ids: Mapping[str, np.ndarray]
    """Site → their ids."""
    leaves: Mapping[tuple[str, str], Bool[Tensor, " pos"]]
    """(kind, name) of a leaf → the positions at which it is a node."""

    @property
    def attribution(self) -> dict[str, float]:
        """Id → attribution."""
        return dict(zip(self.table["id"], self.table["attribution"], strict=True))

    @property
    def activation(self) -> dict[str, float]:
        """Id → activation."""
        return dict(zip(self.table["id"], self.table["activation"], strict=True))


def prompt_words(run: SplicedRun, prompt: int) -> tuple[str, ...]:
    """The prompt's tokens as texts; their numbers where there is no tokenizer."""
    ids = run.tokens[prompt, : int(run.last[prompt]) + 1].cpu()
    texts = token_texts(getattr(run.splice.model, "tokenizer", None), ids)
    return tuple(str(i) if t is None else t for i, t in zip(ids.tolist(), texts, strict=True))


def prompt_nodes(run: SplicedRun, found: Attribution, root: Root, prompt: int) -> PromptNodes:
    """A prompt's nodes: the root, kept features and scores, and leaves that count as much."""
    words = prompt_words(run, prompt)
    splice = run.splice
    pos = int(position(run, getattr(root, "pos", getattr(root, "query", -1)))[prompt])
    value = float(found.values[prompt].detach())
    site = getattr(root, "site", "")
    layer = splice.layer(site) if site else int(getattr(root, "layer", splice.n_layers))
    tables = [
        pd.DataFrame(
            [[root.name(prompt), "root", site, layer, pos, int(getattr(root, "head", -1)),
              root.index if isinstance(root, FeatureRoot) else -1, words[pos], value, 1.0, value]],
            columns=list(NODE_COLUMNS),
        )
    ]  # fmt: skip
    entries, ids = {}, {}
    smallest = np.inf
    for name, (_, nodes) in run.nodes.items():
        mine = found.kept[name] & (nodes.prompt == prompt) & (found.gradient[name] != 0)
        chosen = mine.nonzero().flatten()
        numbers = [x[chosen].detach().cpu().double().numpy() for x in
                   (nodes.activation, found.gradient[name], found.score[name])]  # fmt: skip
        where = _where(run, name, chosen)
        table = pd.DataFrame(where | dict(zip(NODE_COLUMNS[8:], numbers, strict=True)))
        table["token"] = [words[i] for i in table["pos"]]
        entries[name], ids[name] = chosen, table["id"].to_numpy()
        if len(table):
            smallest = min(smallest, float(np.abs(numbers[2]).min()))
            tables.append(table[list(NODE_COLUMNS)])
    leaves = {}
    real = real_positions(run.tokens.shape[1], run.last)[prompt]
    for (kind, name), part in found.leaves.items():
        mine = _counted(run, part[prompt], prompt, smallest) & real
        leaves[kind, name] = mine
        tables.append(_leaf_table(run, kind, name, part[prompt], mine, words))
    whole = pd.concat([table for table in tables if len(table)], ignore_index=True)
    return PromptNodes(whole, entries, ids, leaves)


def _where(run: SplicedRun, name: str, chosen: Tensor) -> dict[str, Any]:
    """Identity columns of some of a site's nodes."""
    if name in run.sites:
        active, layer = run.sites[name].active, run.splice.layer(name)
        pos, index = (x[chosen].cpu().numpy() for x in (active.pos, active.feature))
        head, kind = np.full(len(pos), -1), "feature"
        ids = [f"{name}/{p}/{i}" for p, i in zip(pos, index, strict=True)]
    else:
        layer, kind, shape = int(name.partition(".")[0]), "score", run.scores[name][0].shape
        where = torch.unravel_index(chosen, shape)
        _, head, pos, index = (x.cpu().numpy() for x in where)
        ids = [f"{name}.{h}/{q}/{k}" for h, q, k in zip(head, pos, index, strict=True)]
    return {"id": np.array(ids, dtype=object), "kind": kind, "site": name, "layer": layer,
            "pos": pos, "head": head, "index": index}  # fmt: skip


def _counted(run: SplicedRun, part: Tensor, prompt: int, smallest: float) -> Tensor:
    """Where a leaf is a node: as the gate would judge it; where that only ranks, if it counts as
    much as the smallest node that was kept."""
    gate = run.state.gate
    size = {"positive": part, "negative": -part, "absolute": part.abs()}[gate.sign]
    bound = smallest if gate.mode in ("top_k", "quantile") else float(run.state.tau[prompt])
    return (size > bound) & (part != 0)


def _leaf_table(
    run: SplicedRun, kind: str, name: str, part: Tensor, mine: Tensor, words: Sequence[str]
) -> pd.DataFrame:
    pos = mine.nonzero().flatten()
    scores = part[pos].detach().cpu().double().numpy()
    numbers = pos.cpu().numpy()
    layer = run.splice.n_layers if name == "logits" else run.splice.layer(name)
    layer = 0 if name in ("token", "position", "bigram") else layer
    return pd.DataFrame(
        {"id": [leaf_id(kind, name, p) for p in pos.tolist()], "kind": kind, "site": name,
         "layer": layer, "pos": numbers, "head": -1, "index": -1,
         "token": [words[i] for i in numbers], "activation": 1.0, "gradient": scores,
         "attribution": scores}
    )[list(NODE_COLUMNS)]  # fmt: skip


def leaf_id(kind: str, name: str, pos: int) -> str:
    """Id of a leaf's node."""
    return f"{kind}/{pos}" if name == kind else f"{name}.{kind}/{pos}"


def star_edges(nodes: PromptNodes, root: str) -> pd.DataFrame:
    """An edge from every node to the root."""
    rest = nodes.table.iloc[1:]
    return pd.DataFrame(
        {"source": rest["id"].to_numpy(), "target": root, "weight": rest["attribution"].to_numpy(),
         "attribution": rest["attribution"].to_numpy()}
    )  # fmt: skip


def edge_tables(
    run: SplicedRun,
    rows: Iterable[Row],
    nodes: Sequence[PromptNodes],
    names: Sequence[str],
    through: bool,
) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """For each prompt its edges, and the row sums by kind of source."""
    found: list[list[tuple[str, np.ndarray, np.ndarray, float]]] = [[] for _ in nodes]
    sums: list[list[dict[str, Any]]] = [[] for _ in nodes]
    attribution = [of.attribution for of in nodes]
    activation = [of.activation for of in nodes]
    own = [
        {name: site.candidates.prompt == prompt for name, site in run.sites.items()}
        for prompt in range(len(nodes))
    ]
    for row in rows:
        prompt = row.target.prompt
        mine, target = nodes[prompt], _target_id(run, row, names[prompt])
        sources, weights = [], []
        total = {"feature": 0.0, "other_feature": 0.0}
        for name, weight in row.nodes.items():
            kept = weight[mine.entries[name]].detach().cpu().double().numpy()
            sources.append(mine.ids[name])
            weights.append(kept)
            if name in run.sites:
                total["feature"] += float(kept.sum())
                if not through or run.sites[name].first:
                    every = float(weight[own[prompt][name]].sum())
                    total["other_feature"] += every - float(kept.sum())
        for (kind, name), part in row.leaves.items():
            total[kind] = total.get(kind, 0.0) + float(part.sum())
            pos = mine.leaves[kind, name].nonzero().flatten()
            sources.append(np.array([leaf_id(kind, name, p) for p in pos.tolist()], dtype=object))
            weights.append(part[pos].detach().cpu().double().numpy())
        source, added = np.concatenate(sources), np.concatenate(weights)
        there = added != 0
        size = activation[prompt][target]
        scale = attribution[prompt][target] / size if size else 0.0
        found[prompt].append((target, source[there], added[there], scale))
        sums[prompt].append({"target": target, "activation": size} | total)
    return [(_edges(mine), pd.DataFrame(of)) for mine, of in zip(found, sums, strict=True)]


def _edges(rows: Sequence[tuple[str, np.ndarray, np.ndarray, float]]) -> pd.DataFrame:
    """One table of the rows of (target, sources, weights, attribution per weight)."""
    if not rows:
        return pd.DataFrame(columns=list(EDGE_COLUMNS))
    sizes = [len(source) for _, source, _, _ in rows]
    weight = np.concatenate([w for _, _, w, _ in rows])
    scale = np.repeat([s for *_, s in rows], sizes)
    target = np.repeat(np.array([t for t, *_ in rows], dtype=object), sizes)
    source = np.concatenate([s for _, s, _, _ in rows])
    columns = (source, target, weight, weight * scale)
    return pd.DataFrame(dict(zip(EDGE_COLUMNS, columns, strict=True)))


def _target_id(run: SplicedRun, row: Row, root: str) -> str:
    if row.target.site == "":
        return root
    active, entry = run.sites[row.target.site].active, row.target.entry
    return f"{row.target.site}/{int(active.pos[entry])}/{int(active.feature[entry])}"


def head_table(
    parts: Mapping[str, Tensor], targets: np.ndarray, nodes: PromptNodes
) -> pd.DataFrame:
    """A row per edge into features of one attention dictionary and head."""
    tables = []
    for name, part in parts.items():
        weights = part[..., nodes.entries[name]].detach().cpu().double().numpy()
        row, head, source = (weights != 0).nonzero()
        tables.append(pd.DataFrame(
            {"source": nodes.ids[name][source], "target": targets[row],
             "head": head, "weight": weights[row, head, source]}
        ))  # fmt: skip
    columns = ["source", "target", "head", "weight"]
    found = [table for table in tables if len(table)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)
