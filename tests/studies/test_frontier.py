import math
from importlib import import_module

import pandas as pd
import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.circuits import PruningConfig, circuit_of_nodes, prune
from tl_sparse.studies.frontier import frontier, grouped, token_loss
from tl_sparse.tasks import get
from tl_sparse.views.frontier import frontier_figure

# the package has the function under the name of its module
FRONTIER = import_module("tl_sparse.studies.frontier")
QUICK = PruningConfig(headroom=0.0, steps=40, batch_pairs=8, selection_pairs=16, report_pairs=8)


@pytest.fixture
def tokens(corpus):
    return corpus.validation_sequences(12, 48)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(solver, tokens):
    model = solver()
    logits = model(tokens)
    by_hand = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert token_loss(model, tokens) == pytest.approx(by_hand.item(), rel=1e-5)


def test_models_and_folders_are_pruned_on_what_they_do(solver, tokens, tmp_path):
    solver(extra=9).save_pretrained(tmp_path / "saved")
    models = {"here": solver(), "saved": tmp_path / "saved"}
    found = frontier(models, tokens, config=QUICK, pairs=8, progress=False)
    assert found.interpretability.tasks == ("for_while",)
    assert set(found.circuits) == {"here", "saved"}
    assert [c.task for c in found.circuits["here"]] == ["for_while"]
    rows = found.to_dataframe().set_index("model")
    assert rows.loc["here", "validation_loss"] == pytest.approx(token_loss(models["here"], tokens))
    assert rows.loc["here", "edges"] == found.circuits["here"][0].n_edges
    # the nine weights that only the second model has are between nodes of the MLP
    assert rows.loc["saved", "nonzeros"] == rows.loc["here", "nonzeros"] + 9
    assert list(rows["group"]) == ["here", "saved"]
    again = frontier(
        {"here": models["here"]}, tokens, config=QUICK, circuits={"here": found.circuits["here"]}
    )
    assert again.rows["edges"].tolist() == [rows.loc["here", "edges"]]
    figure = found.to_plotly()
    assert set(figure.data[0].x) == set(rows["validation_loss"])
    assert "for_while" in found._repr_html_()


def test_circuits_of_another_model_do_not_stand_in_for_pruning(solver, tokens):
    means = activation_means(solver(), tokens)
    circuit = circuit_of_nodes(solver(), "for_while", torch.ones(means.index.n_nodes) > 0, means)
    with pytest.raises(ValueError, match="belongs to another model"):
        frontier({"m": solver(extra=9)}, tokens, circuits={"m": [circuit]})


def test_circuits_that_are_not_found_are_told(solver, tokens, monkeypatch):
    def failing(model, jobs, *, means, progress):
        return [ValueError("collapsed") for _ in jobs]

    found = frontier({"a": solver()}, tokens, config=QUICK, pairs=8, progress=False)
    monkeypatch.setattr(FRONTIER, "prune_many", failing)
    with pytest.raises(ValueError, match=r"no circuit was found.*for_while in m: collapsed"):
        frontier({"m": solver()}, tokens, config=QUICK, pairs=8)
    both = frontier({"a": solver(), "b": solver()}, tokens, circuits=dict(found.circuits),
                    config=QUICK, pairs=8)  # fmt: skip
    assert both.failures == {("b", "for_while"): "collapsed"}
    assert both.rows["edges"].isna().all()
    assert "for_while (no circuit in b)" in both.interpretability.note


def test_models_that_do_nothing_in_common_are_not_pruned(solver, tokens, monkeypatch):
    monkeypatch.setattr(FRONTIER, "prune_many", None)
    with pytest.raises(ValueError, match=r"by all models .*a: for_while; idle: none"):
        frontier({"a": solver(), "idle": solver(weight=0.0)}, tokens, config=QUICK, pairs=8)


def test_bad_input_names_the_choices(solver, tokens):
    models = {"m": solver()}
    with pytest.raises(ValueError, match="at least one model"):
        frontier({}, tokens)
    with pytest.raises(ValueError, match="at least one model and one sequence"):
        frontier(models, tokens[:0])
    with pytest.raises(ValueError, match=r"circuits of unknown model\(s\) x; the models are m"):
        frontier(models, tokens, circuits={"x": []})
    with pytest.raises(ValueError, match=r"groups of unknown model\(s\) y"):
        frontier(models, tokens, groups={"y": "a"})
    with pytest.raises(ValueError, match=r"unknown task.* quotes; choose from bracket_brace"):
        frontier(models, tokens, tasks=["quotes"])
    bare = solver()
    bare.set_tokenizer(None)
    with pytest.raises(ValueError, match="'bare' has no tokenizer"):
        frontier({"bare": bare}, tokens)


def test_models_with_other_tokenizers_are_not_compared(solver, tokens):
    import tl_sparse as tls

    models = {"m": solver(), "bundled": tls.SparseTransformer.from_pretrained("python-dense")}
    with pytest.raises(ValueError, match="'bundled' has another tokenizer"):
        frontier(models, tokens, config=QUICK, pairs=2)


def test_groups_have_means_and_spreads_over_their_models():
    rows = pd.DataFrame(
        {
            "group": ["a", "b", "a", "a", "c"],
            "validation_loss": [1.0, 5.0, 2.0, 30.0, 4.0],
            "edges": [10.0, 7.0, 1000.0, math.nan, math.nan],
            "nodes": [4.0, 3.0, 9.0, math.nan, math.nan],
        }
    )
    found = grouped(rows).set_index("group")
    assert list(found.index) == ["a", "b", "c"]
    # the third model of a has no size: it counts neither there nor in the loss
    assert list(found["models"]) == [2, 1, 0]
    assert found.loc["a", "validation_loss"] == 1.5
    assert found.loc["a", "validation_loss_sd"] == pytest.approx(math.sqrt(0.5))
    assert found.loc["c", "validation_loss"] == 4.0
    assert math.isnan(found.loc["c", "edges"])
    assert found.loc["a", "edges"] == pytest.approx(100.0)
    spread = math.log(1000 / 10) / math.sqrt(2)  # of two numbers: their distance over sqrt 2
    assert found.loc["a", "edges_factor"] == pytest.approx(math.exp(spread))
    assert found.loc["a", "nodes"] == pytest.approx(6.0)
    assert found.loc["b", "edges"] == pytest.approx(7.0)
    assert math.isnan(found.loc["b", "edges_factor"])


def test_the_figure_may_show_nodes_and_refuses_other_sizes(solver, tokens):
    model = solver()
    means = activation_means(model, tokens)
    circuit = prune(
        model, get("for_while", model.tokenizer, 48), QUICK, means=means, progress=False
    )
    found = frontier({"m": model}, tokens, circuits={"m": [circuit]})
    assert found.to_plotly("nodes").data[0].y[0] == circuit.n_nodes
    with pytest.raises(ValueError, match="choose from edges, nodes"):
        frontier_figure(found.by_group(), "weights", "")


def test_the_loss_of_a_transformer_lens_model_is_the_mean_cross_entropy(dense_model):
    tokens = torch.randint(3, 30, (70, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 1
    logits = dense_model(tokens, return_type="logits")
    rows = logits[:, :-1].flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(rows, tokens[:, 1:].flatten())
    assert token_loss(dense_model, tokens) == pytest.approx(by_hand.item(), rel=1e-5)
