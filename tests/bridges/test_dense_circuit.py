"""A sparse circuit in the dense model, and what its nodes carry there."""

import json
import math
import re

import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.bridges import BridgedPair, Bridges, carried_effect, dense_circuit
from tl_sparse.circuits import circuit_of_nodes
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.checks.sufficiency import CHECK

CHAIN = ["0.attn.act_in:0", "0.attn.resid_delta:1", "1.mlp.act_in:1", "1.mlp.resid_delta:2",
         "0.attn_v.1", "1-mlp/5"]  # fmt: skip


@pytest.fixture
def text():
    return torch.randint(3, 30, (24, 10), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def chained(planted, text):
    """A model with a planted chain, bridged to itself, and the chain as its circuit."""
    model, _ = planted(d_model=16, d_head=4, n_heads=2)
    pair = BridgedPair(model, model, Bridges.identity(model))
    return pair, circuit_of_nodes(model, "marked", CHAIN, activation_means(model, text))


@pytest.fixture
def batch(marks):
    return marks.batch(8, split="held_out", seed=0)


def test_of_a_model_bridged_to_itself_it_is_the_same_circuit(chained, text, batch):
    pair, circuit = chained
    found = dense_circuit(pair, circuit, text)
    # the sparse circuit with all that bridges do not reach left alone
    index = circuit.index
    inside = {"attn_q", "attn_k", "attn_v", "mlp_neuron"}
    keep = circuit.kept | torch.tensor(index.nodes()["site"].isin(inside).to_numpy())
    same = circuit_of_nodes(pair.sparse, "marked", keep, circuit.means)
    expected = task_logit_diffs(pair.sparse, batch, same.hooks())
    assert torch.equal(task_logit_diffs(found.model, batch, found.circuit.hooks()), expected)
    assert expected.min().item() > 1
    assert found.without == ("0.attn.v:1", "1.mlp.post_act:5")
    assert found.circuit.n_nodes == 4


def test_its_subspaces_are_those_of_the_kept_channels(chained, text):
    pair, circuit = chained
    frame = dense_circuit(pair, circuit, text, draws=4).subspaces
    kept = frame[frame["nodes"] > 0].set_index("dense_hook")
    assert set(kept.index) == {
        "blocks.0.attn.hook_act_in", "blocks.0.hook_attn_out", "blocks.1.mlp.hook_act_in",
        "blocks.1.hook_mlp_out",
    }  # fmt: skip
    assert (kept["dims"] == 1).all()
    _, cache = pair.sparse.run_with_cache(text)
    x = cache["blocks.1.mlp.hook_act_in"].flatten(0, 1)
    share = float(x.var(0)[1] / x.var(0).sum())
    assert kept.loc["blocks.1.mlp.hook_act_in", "explained"] == pytest.approx(share, rel=1e-4)
    assert (frame.loc[frame["nodes"] == 0, "explained"] == 0).all()


def test_without_errors_a_bridge_that_misses_everything_leaves_nothing(chained, text, batch):
    pair, circuit = chained
    with torch.no_grad():
        for decoder in pair.bridges.decoders:
            decoder.W_dec.zero_()
    found = [dense_circuit(pair, circuit, text, errors=errors) for errors in (True, False)]
    passes, removed = (task_logit_diffs(f.model, batch, f.circuit.hooks()) for f in found)
    torch.testing.assert_close(passes, task_logit_diffs(pair.dense, batch), rtol=1e-3, atol=1e-3)
    # whatever is answered, it is the same for both members of a pair
    torch.testing.assert_close(removed[::2], -removed[1::2], rtol=1e-3, atol=1e-3)


def test_the_suite_judges_it(chained, marks, text):
    pair, circuit = chained
    found = dense_circuit(pair, circuit, text)
    config = EvaluationConfig(
        pairs=4, draws=20, controls=5, subsets=4, constant_steps=2, optimal_controls=1
    )
    test = under_test(found.model, found.circuit, marks, config)
    result = CHECK.run(test)
    assert result.measure("f", "as_pruned").value > 0.9
    assert result.measure("f", "as_pruned").null < 0.2


def test_reads_alone_and_the_words(chained, text):
    pair, circuit = chained
    found = dense_circuit(pair, circuit, text, writes=False)
    assert found.circuit.n_nodes == 2
    assert "0.attn.resid_delta:1" in found.without
    assert "4 nodes at 4 reads and writes" in repr(found)
    assert "blocks.1.hook_mlp_out" in found._repr_html_()
    assert found.to_dataframe() is found.subspaces


def test_circuits_of_other_models_and_without_a_place_are_refused(chained, planted, text, batch):
    pair, circuit = chained
    inside = circuit_of_nodes(pair.sparse, "marked", ["1-mlp/5"], circuit.means)
    with pytest.raises(ValueError, match="no node that the bridges reach"):
        dense_circuit(pair, inside, text)
    other, _ = planted(d_model=24)
    foreign = BridgedPair(other, other, Bridges.identity(other))
    with pytest.raises(ValueError, match="belongs to another model"):
        carried_effect(foreign, circuit, batch, text)


def test_the_chain_carries_all_of_the_effect_in_both_models_alike(chained, text, batch):
    pair, circuit = chained
    found = carried_effect(pair, circuit, batch, text, writes=True, draws=3)
    frame = found.to_dataframe().set_index(["model", "place"])
    pd_equal = frame.loc["dense"] - frame.loc["sparse"]
    assert pd_equal.abs().to_numpy().max() < 1e-4
    for place in ("0.attn_in", "0.attn_out", "1.mlp_in", "1.mlp_out", "all"):
        row = frame.loc[("dense", place)]
        assert row["lost"] > 0.9
        assert abs(row["lost_others"]) < 0.2
        assert abs(row["others"]) < 0.2
    assert frame.loc[("dense", "0.attn_out"), "carried"] > 0.8
    assert frame.loc[("dense", "all"), "nodes"] == 4


def test_shares_are_those_of_runs_with_a_read_set_by_hand(chained, text, batch):
    pair, circuit = chained
    found = carried_effect(pair, circuit, batch, text, draws=2)
    frame = found.to_dataframe().set_index(["model", "place"]).loc[("sparse", "1.mlp_in")]
    hook = "blocks.1.mlp.hook_act_in"
    mean = pair.sparse.run_with_cache(text)[1][hook].mean((0, 1))

    def diff(keep):
        def put(x, hook):
            kept = x.clone()
            x = mean.expand_as(x).clone()
            x[..., keep] = kept[..., keep]
            return x

        return float(task_logit_diffs(pair.sparse, batch, [(hook, put)]).mean())

    everything, nothing = diff(list(range(16))), diff([])
    assert frame["effect"] == pytest.approx(everything - nothing, rel=1e-4)
    share = (diff([1]) - nothing) / (everything - nothing)
    assert frame["carried"] == pytest.approx(share, rel=1e-3)
    lost = (everything - diff([c for c in range(16) if c != 1])) / (everything - nothing)
    assert frame["lost"] == pytest.approx(lost, rel=1e-3)


def test_a_place_that_does_nothing_has_no_shares(chained, text, batch):
    pair, circuit = chained
    also = circuit_of_nodes(pair.sparse, "marked", [*CHAIN, "1.attn.act_in:9"], circuit.means)
    frame = carried_effect(pair, also, batch, text, draws=2).to_dataframe()
    row = frame[(frame["model"] == "dense") & (frame["place"] == "1.attn_in")].iloc[0]
    assert row["effect"] < 0.05
    assert math.isnan(row["carried"])
    assert "carried" in carried_effect(pair, also, batch, text, draws=1)._repr_html_()
    with pytest.raises(ValueError, match="draws=0 must be at least 1"):
        carried_effect(pair, also, batch, text, draws=0)


def test_it_has_a_page_with_the_dense_models_values(chained, text, marks, tmp_path):
    pair, circuit = chained
    found = dense_circuit(pair, circuit, text)
    html = found.write_page(tmp_path / "dense.html", marks, text).read_text(encoding="utf-8")
    (data,) = re.findall('id="tls-data">(.*?)</script>', html)
    (drawn,) = json.loads(data)["circuits"]
    assert drawn["title"] == "in the dense model"
    assert len(drawn["nodes"]) == found.circuit.n_nodes
    assert drawn["examples"]
    assert drawn["texts"]
    assert all("loss if removed" in {n[0] for n in node["numbers"]} for node in drawn["nodes"])
