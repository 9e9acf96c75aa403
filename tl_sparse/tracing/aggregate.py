"""Circuits of a data set: what graphs of many prompts have in common.

Source: Marks et al. 2024 (arXiv 2403.19647) for sums over positions; by the tokens' roles, where
prompts have them, as Wang et al. 2022 name positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tl_sparse.tracing.graph import TracedGraph
from tl_sparse.views.display import frame_html


@dataclass(frozen=True, eq=False, repr=False)
class FeatureSummary:
    """Features over the graphs of some prompts."""

    table: pd.DataFrame
    """A row per feature (and role), the largest mean first: site, index, role (where roles are
    given), mean and mean_abs (attribution, of a prompt's positions summed, over all prompts),
    frequency (share of the prompts in whose graph it is), sign (share of these in which its
    attribution has the more frequent sign)."""
    values: pd.DataFrame
    """A row per feature (and role), a column per prompt: attribution; 0 where it is not in the
    graph."""
    n_prompts: int
    """Prompts."""

    def features(self, frequency: float = 0.5, mean: float | None = None) -> list[tuple[str, int]]:
        """(site, index) of the features of the global circuit: in at least this share of the
        graphs, or with a mean attribution of at least ``mean`` in absolute value."""
        rows = self.table["frequency"] >= frequency
        if mean is not None:
            rows = rows | (self.table["mean"].abs() >= mean)
        chosen = self.table[rows]
        pairs = zip(chosen["site"], map(int, chosen["index"]), strict=True)
        return list(dict.fromkeys(pairs))

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table

    @property
    def line(self) -> str:
        """The facts in one line."""
        often = int((self.table["frequency"] >= 0.5).sum())
        return f"{len(self.table)} rows over {self.n_prompts} prompts, {often} in half of them"

    def __repr__(self) -> str:
        return f"FeatureSummary({self.line})"

    def _repr_html_(self) -> str:
        return frame_html("Features of many prompts", self.line, self.table.head(30))


def aggregate(
    graphs: Sequence[TracedGraph], roles: Mapping[str, Sequence[int]] | None = None
) -> FeatureSummary:
    """What graphs have in common, feature by feature.

    Args:
        graphs: One for each prompt.
        roles: Role → its position in each prompt (``{"subject": [2, 3, ...]}``); features are then
            told apart by it, and "" stands for every other position.

    Raises:
        ValueError: no graphs, or a role without a position for each.
    """
    if not len(graphs):
        raise ValueError("no graphs")
    for role, places in (roles or {}).items():
        if len(places) != len(graphs):
            raise ValueError(f"role {role!r} has {len(places)} positions for {len(graphs)} graphs")
    tables = []
    for number, graph in enumerate(graphs):
        table = graph.features[["site", "index", "pos", "attribution"]].assign(prompt=number)
        names = {int(places[number]): role for role, places in (roles or {}).items()}
        table["role"] = table["pos"].map(lambda pos, names=names: names.get(int(pos), ""))
        tables.append(table)
    nodes = pd.concat(tables, ignore_index=True)
    keys = ["site", "index", *(["role"] if roles else [])]
    sums = nodes.groupby([*keys, "prompt"])["attribution"].sum().unstack("prompt")
    sums = sums.reindex(columns=range(len(graphs)))
    there = sums.notna()
    values = sums.fillna(0.0).astype(float)
    positive = ((values > 0) & there).sum(axis=1)
    signed = np.maximum(positive, there.sum(axis=1) - positive) / there.sum(axis=1)
    table = pd.DataFrame(
        {"mean": values.mean(axis=1), "mean_abs": values.abs().mean(axis=1),
         "frequency": there.mean(axis=1), "sign": signed}
    )  # fmt: skip
    order = table["mean"].abs().sort_values(ascending=False, kind="stable").index
    return FeatureSummary(table.loc[order].reset_index(), values.loc[order], len(graphs))
