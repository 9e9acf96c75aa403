"""Influence pruning and aggregation, on graphs written down by hand."""

import pandas as pd
import pytest

from tl_sparse.tracing.graph import NODE_COLUMNS, TracedGraph


def graph_of(
    nodes: dict[str, str],
    edges: list[tuple[str, str, float]],
    scores: dict[str, float] | None = None,
) -> TracedGraph:
    rows = []
    for name, kind in nodes.items():
        site, pos, index = [*name.split("/"), "0", "0"][:3]
        score = (scores or {}).get(name, 1.0)
        rows.append([name, kind, site, 0, int(pos), -1, int(index), "", 1.0, score, score])
    targets = list(dict.fromkeys(target for _, target, _ in edges))
    return TracedGraph(
        (1, 2), ("a", "b"), "root", 1.0, pd.DataFrame(rows, columns=list(NODE_COLUMNS)),
        pd.DataFrame([[s, t, w, w] for s, t, w in edges],
                     columns=["source", "target", "weight", "attribution"]),
        {}, pd.DataFrame({"target": targets}), settings={"edges": "direct"},
    )  # fmt: skip


NODES = {"root": "root", "1.mlp/0/1": "feature", "1.mlp/0/2": "feature", "0.mlp/0/3": "feature",
         "token/0": "token", "0.mlp.error/0": "error"}  # fmt: skip
EDGES = [
    ("1.mlp/0/1", "root", 6.0), ("1.mlp/0/2", "root", -2.0), ("0.mlp.error/0", "root", 2.0),
    ("0.mlp/0/3", "1.mlp/0/1", 3.0), ("token/0", "1.mlp/0/1", 1.0), ("token/0", "1.mlp/0/2", 5.0),
    ("token/0", "0.mlp/0/3", 1.0), ("0.mlp.error/0", "0.mlp/0/3", -1.0),
]  # fmt: skip


def test_influence_is_the_sum_over_paths_of_absolute_shares() -> None:
    from tl_sparse.tracing.influence import graph_scores, influence

    graph = graph_of(NODES, EDGES)
    found = influence(graph)
    values = dict(zip(found.ids, found.node, strict=True))
    assert values["1.mlp/0/1"] == pytest.approx(0.6)
    assert values["1.mlp/0/2"] == pytest.approx(0.2)
    assert values["0.mlp/0/3"] == pytest.approx(0.6 * 0.75)
    assert values["token/0"] == pytest.approx(0.6 * 0.25 + 0.2 + 0.45 / 2)
    assert values["0.mlp.error/0"] == pytest.approx(0.2 + 0.45 / 2)
    scores = graph_scores(graph)
    assert scores["replacement"] == pytest.approx(0.575 / (0.575 + 0.425))
    # root misses a fifth, 0.mlp/0/3 a half; weights 1, .6, .2, .45
    assert scores["completeness"] == pytest.approx((0.8 + 0.6 + 0.2 + 0.225) / 2.25)


def test_pruning_keeps_what_most_influence_goes_through() -> None:
    from tl_sparse.tracing import prune_by_influence

    graph = graph_of(NODES, EDGES)
    assert list(prune_by_influence(graph, 1, 1).nodes["id"]) == list(graph.nodes["id"])
    pruned = prune_by_influence(graph, nodes=0.6, edges=1)
    # of 0.6, 0.45, 0.425, 0.2 the first two make up 62 %
    assert set(pruned.nodes["id"]) == {"root", "1.mlp/0/1", "0.mlp/0/3", "token/0"}
    assert set(zip(pruned.edges["source"], pruned.edges["target"], strict=True)) == {
        ("1.mlp/0/1", "root"), ("0.mlp/0/3", "1.mlp/0/1"), ("token/0", "1.mlp/0/1"),
        ("token/0", "0.mlp/0/3"),
    }  # fmt: skip
    few = prune_by_influence(graph, nodes=0.6, edges=0.5)
    assert len(few.edges) < len(pruned.edges)
    with pytest.raises(ValueError, match="share"):
        prune_by_influence(graph, 2)


def test_features_over_prompts() -> None:
    from tl_sparse.tracing import aggregate

    one = graph_of({"root": "root", "0.mlp/0/3": "feature", "0.mlp/1/3": "feature"}, [],
                   {"0.mlp/0/3": 2.0, "0.mlp/1/3": -0.5})  # fmt: skip
    two = graph_of({"root": "root", "0.mlp/1/3": "feature", "1.mlp/0/1": "feature"}, [],
                   {"0.mlp/1/3": -4.0, "1.mlp/0/1": 1.0})  # fmt: skip
    found = aggregate([one, two])
    rows = found.table.set_index(["site", "index"])
    assert rows.loc[("0.mlp", 3), "mean"] == pytest.approx((1.5 - 4) / 2)
    assert rows.loc[("0.mlp", 3), "mean_abs"] == pytest.approx((1.5 + 4) / 2)
    assert rows.loc[("0.mlp", 3), "frequency"] == 1
    assert rows.loc[("0.mlp", 3), "sign"] == 0.5
    assert rows.loc[("1.mlp", 1), "frequency"] == 0.5
    assert found.features(frequency=0.8) == [("0.mlp", 3)]
    assert found.features(frequency=0.8, mean=0.5) == [("0.mlp", 3), ("1.mlp", 1)]
    by_role = aggregate([one, two], {"subject": [0, 1]}).table
    subject = by_role[by_role["role"] == "subject"].set_index("index")["mean"]
    assert subject[3] == pytest.approx((2 - 4) / 2)
    with pytest.raises(ValueError, match="positions"):
        aggregate([one, two], {"subject": [0]})
