import math
from dataclasses import dataclass

import pytest

from tl_sparse.studies.interpretability import geometric_mean, interpretability


@dataclass(frozen=True)
class Sized:
    task: str
    n_nodes: int
    n_edges: int
    target_loss: float = 0.15
    model_fingerprint: str = "a"
    loss: float = 0.1


def circuits(model="a", target=0.15, **edges):
    return [Sized(t, 2 * n, n, target, model) for t, n in edges.items()]


# --------------------------------------------------------------------------------------------------
# one model


def test_the_metric_is_the_geometric_mean_of_edges_over_tasks():
    result = interpretability(circuits(a=2, b=8, c=32))
    assert result.edges == pytest.approx(8.0)  # (2 * 8 * 32) ** (1 / 3)
    assert result.nodes == pytest.approx(16.0)
    assert result.tasks == ("a", "b", "c")
    assert list(result.to_dataframe()["edges"]) == [2, 8, 32]


def test_a_circuit_without_edges_is_named_and_not_in_the_mean():
    result = interpretability(circuits(a=2, b=8, else_elif=0))
    assert result.edges == pytest.approx(4.0)
    assert result.tasks == ("a", "b")
    row = result.rows.set_index("task").loc["else_elif"]
    assert not row["counted"]
    assert row["why_not"] == "no edges"
    assert "Not counted: else_elif (no edges)" in result.note
    assert "else_elif" in result._repr_html_()


def test_only_circuits_without_edges_give_no_number():
    result = interpretability(circuits(a=0))
    assert math.isnan(result.edges)
    assert result.summary["why_not"].tolist() == ["no task is counted"]


def test_circuits_of_several_seeds_count_as_one_task():
    # without that the task a would weigh twice: (2 * 8 * 32) ** (1 / 3) = 8
    result = interpretability([*circuits(a=2), *circuits(a=8), *circuits(b=16)])
    assert result.edges == pytest.approx(8.0)
    assert result.rows.set_index("task").loc["a", "edges"] == pytest.approx(4.0)
    one_sided = interpretability([*circuits(a=2), *circuits(a=2), *circuits(b=32)])
    assert one_sided.edges == pytest.approx(8.0)


# --------------------------------------------------------------------------------------------------
# several models


def test_models_are_compared_on_their_common_tasks():
    result = interpretability({"x": circuits(a=2, b=2), "y": circuits("b", a=32, c=1000)})
    assert result.tasks == ("a",)
    assert list(result.summary["edges"]) == pytest.approx([2.0, 32.0])
    assert result.ratio("y", "x") == pytest.approx(16.0)
    assert result.ratio("y", "x", "nodes") == pytest.approx(16.0)
    assert "the tasks that all 2 models solve: a." in result.note
    assert "b (no circuit in y)" in result.note
    assert "c (no circuit in x)" in result.note


def test_a_task_without_edges_in_one_model_is_counted_for_none():
    result = interpretability({"x": circuits(a=2, e=0), "y": circuits("b", a=32, e=7)})
    assert result.tasks == ("a",)
    assert list(result.summary["edges"]) == pytest.approx([2.0, 32.0])
    assert "e (no edges in x)" in result.note


def test_own_tasks_are_each_models_and_have_no_ratio():
    result = interpretability(
        {"x": circuits(a=2, b=8), "y": circuits("b", a=0, c=5)}, tasks="own"
    )  # fmt: skip
    assert list(result.summary["edges"]) == pytest.approx([4.0, 5.0])
    with pytest.raises(ValueError, match="tasks of its own"):
        result.ratio("x", "y")
    assert "which differ" in result.note


def test_named_tasks_leave_a_model_that_lacks_one_without_a_number():
    found = {"x": circuits(a=2, b=8), "y": circuits("b", a=3), "z": circuits("c", a=1, b=1, c=9)}
    result = interpretability(found, tasks=["a", "b"])
    summary = result.summary.set_index("model")
    assert summary.loc["x", "edges"] == pytest.approx(4.0)
    assert math.isnan(summary.loc["y", "edges"])
    assert summary.loc["y", "why_not"] == "it has no circuit for b"
    assert summary.loc["z", "edges"] == pytest.approx(1.0)
    assert "No number for y: it has no circuit for b." in result.note
    assert "c (not asked for)" in result.note


def test_a_model_without_circuits_leaves_no_common_task_and_says_so():
    result = interpretability({"x": circuits(a=2), "y": []})
    assert result.summary["edges"].isna().all()
    assert result.summary["why_not"].tolist() == ["no task is counted", "it has no circuit"]
    assert "there is none" in result.note


def test_rows_keep_the_order_of_the_models_even_if_a_task_is_called_like_one():
    result = interpretability({"y": circuits("b", x=1, y=2), "x": circuits(x=3, y=4)})
    assert list(result.rows["model"]) == ["y", "y", "x", "x"]
    assert list(result.rows["task"]) == ["x", "y", "x", "y"]


# --------------------------------------------------------------------------------------------------
# refusals


def test_circuits_pruned_to_different_losses_are_not_mixed():
    with pytest.raises(ValueError, match=r"different losses \(0.05, 0.15\)"):
        interpretability([*circuits(a=2), *circuits(target=0.05, b=2)])


def test_circuits_of_two_models_under_one_name_are_refused():
    with pytest.raises(ValueError, match="belong to different models"):
        interpretability([*circuits(a=2), *circuits("b", b=2)])


def test_no_circuits_and_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="nothing to take a mean of"):
        interpretability([])
    with pytest.raises(ValueError, match="no model has a circuit for z; there are circuits for a"):
        interpretability(circuits(a=2), tasks=["z"])
    with pytest.raises(ValueError, match="choose common, own or a list"):
        interpretability(circuits(a=2), tasks="all")


def test_metric_of_several_models_must_be_read_by_model():
    result = interpretability({"x": circuits(a=2), "y": circuits("b", a=3)})
    with pytest.raises(ValueError, match="2 models"):
        _ = result.edges
    with pytest.raises(KeyError, match="there are x, y"):
        result.ratio("x", "z")


def test_geometric_mean_of_nothing_is_nan_and_with_a_zero_is_zero():
    assert math.isnan(geometric_mean([]))
    assert geometric_mean([0.0, 5.0]) == 0.0
    assert geometric_mean([4.0, 9.0]) == pytest.approx(6.0)
