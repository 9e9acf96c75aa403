import pandas as pd
import pytest

from tl_sparse.views.graph_table import GraphTable, graph_layout

NODES = pd.DataFrame(
    [("a", "1", 0, 0), ("b", "2", 0, 0), ("c", "3", 5, 2)],
    columns=["id", "label", "row", "column"],
)
EDGES = pd.DataFrame([("a", "c", 1.0)], columns=["source", "target", "weight"])


def test_nodes_stand_side_by_side_in_their_column_and_rows_in_order():
    layout = graph_layout(GraphTable("t", NODES, EDGES, columns=("x", "y", "z")))
    assert layout.nodes["x"].tolist() == [0.5, 1.5, 2.5]
    assert layout.nodes["y"].tolist() == [0.0, 0.0, 1.0]
    assert layout.columns["label"].tolist() == ["x", "z"]
    assert layout.columns["x"].tolist() == [1.0, 2.5]
    assert (layout.width, layout.height) == (3.0, 1.0)
    assert layout.edges[["source_place", "target_place"]].values.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("nodes", "edges", "words"),
    [
        (NODES.drop(columns="row"), EDGES, "nodes lack row"),
        (pd.concat([NODES, NODES]), EDGES, "node a is given twice"),
        (NODES, EDGES.assign(target="d"), "edge target d is no node"),
        (NODES, EDGES.assign(weight=float("nan")), "weight must be finite"),
    ],
)
def test_tables_that_are_no_graph_are_refused(nodes, edges, words):
    with pytest.raises(ValueError, match=words):
        graph_layout(GraphTable("t", nodes, edges))


def test_a_graph_without_nodes_is_drawn():
    layout = graph_layout(GraphTable("t", NODES[:0], EDGES[:0]))
    assert (layout.width, layout.height) == (1.0, 0.0)
