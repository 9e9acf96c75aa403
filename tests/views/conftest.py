"""A hand-made circuit and a generator of random ones: plain tables, no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from tl_sparse.views import CircuitTable


D_HEAD = 8
MATRICES = {
    ("attn_in", "attn_q"): "W_Q",
    ("attn_in", "attn_k"): "W_K",
    ("attn_in", "attn_v"): "W_V",
    ("attn_v", "attn_out"): "W_O",
    ("mlp_in", "mlp_neuron"): "W_in",
    ("mlp_neuron", "mlp_out"): "W_out",
}


FACTS: dict[str, Any] = {
    "task": "single_double_quote", "model_name": "toy", "seed": 3, "loss": 0.1432,
    "loss_calibrated": 0.121, "target_loss": 0.15, "accuracy": 0.972,
}  # fmt: skip


def make_circuit(
    nodes: list[tuple[int, str, int]],
    edges: list[tuple[int, str, int, str, int, float]],
    **facts: Any,
) -> CircuitTable:
    from tl_sparse.views import CircuitTable

    table = pd.DataFrame(nodes, columns=["layer", "site", "channel"])
    in_head = table["site"].isin(["attn_q", "attn_k", "attn_v"])
    table["head"] = (table["channel"] // D_HEAD).astype("Int64").where(in_head)
    table["head_channel"] = (table["channel"] % D_HEAD).astype("Int64").where(in_head)
    table["hook"] = "blocks." + table["layer"].astype(str) + ".hook"
    table["tau"], table["mean"] = 0.25, -1.5
    rows = [(*edge[:5], MATRICES[edge[1], edge[3]], edge[5]) for edge in edges]
    columns = ["layer", "source_site", "source", "target_site", "target", "matrix", "weight"]
    links = pd.DataFrame(rows, columns=columns)
    return CircuitTable(nodes=table, edges=links.astype({"weight": float}), **(FACTS | facts))


def random_circuit(n_nodes: int, n_edges: int, n_layers: int = 2, seed: int = 0) -> CircuitTable:
    rng = np.random.default_rng(seed)
    sites = sorted({site for pair in MATRICES for site in pair})
    per_row = n_nodes // (n_layers * len(sites))
    nodes = [
        (layer, site, int(channel))
        for layer in range(n_layers)
        for site in sites
        for channel in rng.choice(4 * per_row, per_row, replace=False)
    ]
    table = pd.DataFrame(nodes, columns=["layer", "site", "channel"])
    pairs = [
        (layer, source, x, target, y)
        for source, target in MATRICES
        for layer, x, y in table[table["site"] == source][["layer", "channel"]]
        .merge(table[table["site"] == target][["layer", "channel"]], on="layer")
        .itertuples(index=False)
    ]
    chosen = rng.choice(len(pairs), min(n_edges, len(pairs)), replace=False)
    return make_circuit(nodes, [(*pairs[i], rng.normal()) for i in chosen])


@pytest.fixture
def circuit_of() -> Callable[..., CircuitTable]:
    return make_circuit


@pytest.fixture
def random_circuit_of() -> Callable[..., CircuitTable]:
    return random_circuit


@pytest.fixture
def quote_circuit() -> CircuitTable:
    """The shape of the paper's quote circuit (Gao et al. 2025, figure 39)."""
    return make_circuit(
        [
            (0, "mlp_in", 205), (0, "mlp_in", 207), (0, "mlp_neuron", 863),
            (0, "mlp_neuron", 2790), (0, "mlp_out", 460), (0, "mlp_out", 985),
            (10, "attn_in", 460), (10, "attn_in", 985), (10, "attn_q", 657),
            (10, "attn_k", 657), (10, "attn_v", 656), (10, "attn_out", 83),
        ],
        [
            (0, "mlp_in", 205, "mlp_neuron", 2790, -0.2),
            (0, "mlp_in", 207, "mlp_neuron", 863, -0.14),
            (0, "mlp_neuron", 863, "mlp_out", 460, 0.18),
            (0, "mlp_neuron", 863, "mlp_out", 985, -0.15),
            (0, "mlp_neuron", 2790, "mlp_out", 460, -0.23),
            (0, "mlp_neuron", 2790, "mlp_out", 985, -0.15),
            (10, "attn_in", 985, "attn_k", 657, 1.56),
            (10, "attn_in", 460, "attn_v", 656, -2.5),
            (10, "attn_v", 656, "attn_out", 83, 0.8),
        ],
    )  # fmt: skip


@pytest.fixture
def empty_circuit(quote_circuit: CircuitTable) -> CircuitTable:
    return replace(quote_circuit, nodes=quote_circuit.nodes[:0], edges=quote_circuit.edges[:0])


NO_HEAD = pd.array([None], dtype="Int64")


@pytest.fixture
def heads() -> CircuitTable:
    """Whole heads of three layers, without edges."""
    from tl_sparse.views import CircuitTable

    found = [(0, 1), (0, 3), (1, 0), (4, 3), (4, 11)]
    nodes = pd.DataFrame(found, columns=["layer", "head"]).astype({"head": "Int64"})
    nodes["site"], nodes["channel"] = "hook_z", nodes["head"].astype(int) * D_HEAD
    nodes["head_channel"] = NO_HEAD.repeat(len(nodes))
    nodes["hook"] = [f"blocks.{layer}.attn.hook_z" for layer in nodes["layer"]]
    edges = make_circuit([], []).edges
    return CircuitTable(task="names", nodes=nodes, edges=edges)


@pytest.fixture
def features() -> CircuitTable:
    """Channels of three hooks, which stand in for sites, and edges between them."""
    from tl_sparse.views import CircuitTable

    hooks = ("blocks.0.hook_resid_post", "blocks.2.mlp.hook_post",
             "blocks.2.hook_resid_post.hook_sae_acts")  # fmt: skip
    found = [(hooks[0], 14000), (hooks[0], 7), (hooks[1], 9), (hooks[1], 10), (hooks[1], 11),
             (hooks[2], 5)]  # fmt: skip
    nodes = pd.DataFrame(found, columns=["site", "channel"]).assign(layer=0)
    nodes["hook"] = nodes["site"]
    nodes["head"] = nodes["head_channel"] = NO_HEAD.repeat(len(nodes))
    ends = [(hooks[0], 14000, hooks[1], 9, 1.0), (hooks[0], 14000, hooks[1], 11, 1.0),
            (hooks[0], 7, hooks[1], 10, -0.5), (hooks[1], 10, hooks[2], 5, 0.5)]  # fmt: skip
    edges = pd.DataFrame(
        ends, columns=["source_site", "source", "target_site", "target", "weight"]
    ).assign(layer=0, matrix="effect")
    return CircuitTable(task="features", nodes=nodes, edges=edges)
