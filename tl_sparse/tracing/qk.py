"""``trace_qk``: an attention score as a sum over pairs of what is at the query's and at the key's
end.

A score is ``q · k / scale``; with patterns, norms and active sets held, q and k are each a sum of
vectors: one for every feature, error, bias, token and position before. Multiplied out, the score is
the sum over pairs, exactly; rotations, grouped keys and biases are in the vectors.

Source: Ge et al. 2024 (arXiv 2405.13868), §3 (tracing attention scores).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_sparse.nodes.prompts import Prompts, PromptsLike, prompts_of
from tl_sparse.tracing.attribution import leaf_parts
from tl_sparse.tracing.edges import batched_gradients
from tl_sparse.tracing.roots import attention_scale, position, qk_hooks
from tl_sparse.tracing.run import run
from tl_sparse.tracing.splice import NotLinear, Splice
from tl_sparse.tracing.spliced_run import SplicedRun
from tl_sparse.tracing.tables import leaf_id, prompt_words
from tl_sparse.views.display import frame_html

SHOWN = 20


@dataclass(frozen=True, eq=False, repr=False)
class QKTrace:
    """One head's score between two positions of a prompt, by pairs."""

    layer: int
    """Layer."""
    head: int
    """Head."""
    query: int
    """Position of the query."""
    key: int
    """Position of the key."""
    score: float
    """The score, before a cap if the model has one."""
    words: tuple[str, ...]
    """The prompt's tokens."""
    queries: pd.DataFrame
    """A row per part of the query: id, kind, site, pos, index, marginal (the sum of its pairs)."""
    keys: pd.DataFrame
    """The same of the key. Either's marginals sum to the score."""
    pairs: Float[Tensor, "query_part key_part"]
    """What each pair adds to the score."""

    def to_dataframe(self, k: int | None = None) -> pd.DataFrame:
        """Pairs, the largest first: query, key (ids) and contribution; the first ``k``."""
        flat = self.pairs.flatten().abs()
        order = flat.argsort(descending=True, stable=True)[:k]
        row, column = np.unravel_index(order.numpy(), tuple(self.pairs.shape))
        return pd.DataFrame(
            {"query": self.queries["id"].to_numpy()[row], "key": self.keys["id"].to_numpy()[column],
             "contribution": self.pairs.flatten()[order].numpy()}
        )  # fmt: skip

    @property
    def line(self) -> str:
        """The facts in one line."""
        place = f"{self.words[self.query]!r}@{self.query} ← {self.words[self.key]!r}@{self.key}"
        return (
            f"L{self.layer}H{self.head} {place}: score {self.score:.4g}, "
            f"{len(self.queries)} × {len(self.keys)} parts"
        )

    def __repr__(self) -> str:
        return f"QKTrace({self.line})"

    def _repr_html_(self) -> str:
        return frame_html("Attention score by pairs", self.line, self.to_dataframe(SHOWN))


def trace_qk(
    splice: Splice,
    prompt: PromptsLike | Prompts,
    layer: int,
    head: int,
    query: int = -1,
    key: int = 0,
) -> QKTrace:
    """The pairs of one score.

    Args:
        splice: The model and its dictionaries, strict.
        prompt: One prompt.
        layer: The head's layer.
        head: Its number.
        query: Position of the query; negative from the end.
        key: Position of the key.

    Raises:
        NotLinear: the pairs do not sum to the score.
        ValueError: more prompts, a splice that is not strict, no such head or position.
    """
    prompts = prompts_of(splice.model, prompt)
    if len(prompts) != 1:
        raise ValueError(f"trace_qk takes one prompt, not {len(prompts)}")
    if not splice.strict:
        raise ValueError("trace_qk needs a strict splice, in which queries and keys are sums")
    hooks = qk_hooks(splice, layer)
    spliced = run(splice, prompts.tokens, prompts.last, points=hooks)
    at = [int(position(spliced, pos)[0]) for pos in (query, key)]
    if at[1] > at[0]:
        raise ValueError(f"key={key} is after query={query}")
    n_heads = spliced.points[hooks[0]].shape[2]
    if not 0 <= head < n_heads:
        raise ValueError(f"head={head}: layer {layer} has {n_heads} heads")
    sides = []
    for hook, pos in zip(hooks, at, strict=True):
        x = spliced.points[hook]
        sides.append(vector_parts(spliced, x, pos, head * x.shape[2] // n_heads))
    (q_table, q), (k_table, k) = sides
    pairs = q @ k.T / attention_scale(splice.model, layer)
    vectors = [spliced.points[hook].detach().cpu() for hook in hooks]
    groups = vectors[1].shape[2]
    exact = (vectors[0][0, at[0], head] * vectors[1][0, at[1], head * groups // n_heads]).sum()
    score = float(exact) / attention_scale(splice.model, layer)
    within = (1e-9 if pairs.dtype == torch.float64 else 2e-3) * (1 + float(pairs.abs().sum()))
    if not abs(float(pairs.sum()) - score) <= within:
        raise NotLinear(f"the pairs sum to {float(pairs.sum()):.6g}, and the score is {score:.6g}")
    q_table["marginal"], k_table["marginal"] = pairs.sum(1).numpy(), pairs.sum(0).numpy()
    words = prompt_words(spliced, 0)
    return QKTrace(layer, head, at[0], at[1], score, words, q_table, k_table, pairs)


def vector_parts(
    spliced: SplicedRun, x: Float[Tensor, "1 pos head d_head"], pos: int, head: int
) -> tuple[pd.DataFrame, Float[Tensor, "part d_head"]]:
    """What a query or key is the sum of: a table of the parts, and their vectors."""
    width = x.shape[-1]
    cotangent = x.new_zeros(width, *x.shape)
    cotangent[:, 0, pos, head] = torch.eye(width, dtype=x.dtype, device=x.device)
    spliced.state.passing = {}
    at_nodes, at_leaves = batched_gradients(spliced, [x], [cotangent], width)
    tables, vectors = [], []
    for (name, (_, nodes)), gradient in zip(spliced.nodes.items(), at_nodes, strict=True):
        parts = (nodes.activation * gradient).T.detach().cpu()
        chosen = (parts != 0).any(1).nonzero().flatten()
        active = spliced.sites[name].active
        places, index = (v.cpu()[chosen].numpy() for v in (active.pos, active.feature))
        ids = [f"{name}/{p}/{i}" for p, i in zip(places, index, strict=True)]
        tables.append(_part_table(ids, "feature", name, places, index))
        vectors.append(parts[chosen])
    for (kind, name), part in leaf_parts(
        spliced, spliced.inner_leaves, at_leaves, rows=True
    ).items():
        parts = part[:, 0].T.detach().cpu()
        chosen = (parts != 0).any(1).nonzero().flatten()
        places = chosen.numpy()
        ids = [leaf_id(kind, name, p) for p in chosen.tolist()]
        tables.append(_part_table(ids, kind, name, places, np.full(len(places), -1)))
        vectors.append(parts[chosen])
    table = pd.concat([t for t in tables if len(t)], ignore_index=True)
    return table, torch.cat(vectors)


def _part_table(
    ids: list[str], kind: str, site: str, pos: np.ndarray, index: np.ndarray
) -> pd.DataFrame:
    return pd.DataFrame({"id": ids, "kind": kind, "site": site, "pos": pos, "index": index})
