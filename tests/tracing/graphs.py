"""A traced graph by hand: two features, an error, a token and a bias above which a logit stands."""

import pandas as pd

from tl_sparse.tracing.graph import EDGE_COLUMNS, NODE_COLUMNS, TracedGraph

ROOT = "logit(' x') at 2"
NODES = [
    [ROOT, "root", "", 2, 2, -1, -1, " b", 5.0, 1.0, 5.0],
    ["1.mlp/2/7", "feature", "1.mlp", 1, 2, -1, 7, " b", 2.0, 2.0, 4.0],
    ["0.attn/1/3", "feature", "0.attn", 0, 1, -1, 3, " a", 1.5, -1.0, -1.5],
    ["embed/1/3", "feature", "embed", -1, 1, -1, 3, " a", 1.0, 1.5, 1.5],
    ["1.mlp/2/error", "error", "1.mlp", 1, 2, -1, -1, " b", 0.3, float("nan"), 0.5],
    ["token/1", "token", "", -1, 1, -1, -1, " a", 1.0, 0.25, 0.25],
    ["bias/2", "bias", "", -1, 2, -1, -1, " b", 1.0, 0.25, 0.25],
]
EDGES = [
    ["1.mlp/2/7", ROOT, 4.0, 4.0],
    ["0.attn/1/3", "1.mlp/2/7", -0.75, -1.5],
    ["embed/1/3", "0.attn/1/3", 1.5, 1.5],
    ["1.mlp/2/error", ROOT, 0.5, 0.5],
]


def hand_graph() -> TracedGraph:
    return TracedGraph(
        prompt=(2, 5, 9), words=("<bos>", " a", " b"), root=ROOT, value=5.0,
        nodes=pd.DataFrame(NODES, columns=list(NODE_COLUMNS)),
        edges=pd.DataFrame(EDGES, columns=list(EDGE_COLUMNS)),
        mass={"error": 0.5, "token": 0.25, "bias": 0.25, "cut": 4.0},
        rows=pd.DataFrame({"target": ["1.mlp/2/7"], "activation": [2.0], "feature": [-0.75]}),
        heads=pd.DataFrame({"source": ["embed/1/3"], "target": ["0.attn/1/3"], "head": [1],
                            "weight": [1.5]}),
        settings={"tau": 0.1, "edges": "direct", "nested": {"a": [1]}},
    )  # fmt: skip
