"""Steering curves: on a model whose chain of nodes is planted, and against single runs."""

from dataclasses import replace

import pytest
import torch

from tl_sparse.bridges import BridgedPair, Bridges, published_curves, steering_curves
from tl_sparse.node import Node
from tl_sparse.nodes.prompts import prompts_of


@pytest.fixture
def chained(planted):
    """A model of 64 channels in which channel 0 alone decides, bridged to itself."""
    model, _ = planted(d_model=64, d_head=4, n_heads=2)
    return BridgedPair(model, model, Bridges.identity(model))


@pytest.fixture
def curves(chained, marks):
    return steering_curves(
        chained, marks.batch(6, split="held_out", seed=0), ["0.attn.act_in:0", "0.attn.act_in:9"],
        strengths=(0.25, 1.0), draws=3, task="single_double_quote",
    )  # fmt: skip


def mean(curves, kind, of, strength):
    frame = curves.to_dataframe()
    rows = frame[(frame["kind"] == kind) & (frame["of"] == of) & (frame["strength"] == strength)]
    assert len(rows)
    return float(rows["p_other_of_two"].mean())


def test_the_planted_node_turns_every_answer_and_its_controls_none(curves):
    node = "0.attn.act_in:0"
    assert mean(curves, "node", node, 1.0) > 0.95
    frame = curves.to_dataframe()
    controls = frame[(frame["of"] == node) & (frame["kind"] != "node")]
    assert set(controls["kind"]) == {"random direction", "shuffled bridge", "other channel"}
    assert controls["p_other_of_two"].max() < 0.1
    assert frame[frame["kind"] == "node"].set_index(["nodes", "strength"])["flipped"].to_dict() == {
        (node, 0.25): 0.0, (node, 1.0): 1.0, ("0.attn.act_in:9", 0.25): 0.0,
        ("0.attn.act_in:9", 1.0): 0.0,
    }  # fmt: skip
    assert mean(curves, "together", "together", 1.0) > 0.95


def test_controls_are_as_long_as_what_they_control(curves):
    sizes = curves.curves.set_index(["kind", "of"])["size"]
    for kind in ("random direction", "shuffled bridge"):
        assert sizes[kind, "0.attn.act_in:0"].tolist() == pytest.approx(
            [float(sizes["node", "0.attn.act_in:0"])] * 3, rel=1e-4
        )


def test_a_curves_numbers_are_those_of_single_runs_under_steers_hooks(chained, marks, curves):
    batch = marks.batch(6, split="held_out", seed=0)
    hooks = chained.steer("0.attn.act_in:0", None, batch, 0.25)
    for steered, expected in ((hooks, curves.p_other[0, 0]), ([], curves.base_other)):
        logits = chained.dense.run_with_hooks(batch.tokens, fwd_hooks=steered)
        p = logits[torch.arange(12), batch.last].softmax(-1)
        found = p.gather(1, batch.incorrect_token[:, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_the_other_channel_is_the_unsteered_one_whose_change_is_closest_in_size(small_model):
    model = small_model("plain")
    pair = BridgedPair(model, model, Bridges.identity(model))
    tokens = torch.randint(3, 30, (4, 6), generator=torch.Generator().manual_seed(1))
    prompts = replace(
        prompts_of(model, tokens), correct=tokens[:, 0], incorrect=tokens[:, 1], paired=True
    )
    found = steering_curves(pair, prompts, "1.mlp.act_in:4", strengths=(1.0,), draws=1,
                            exclude=["1.mlp.act_in:2"])  # fmt: skip
    _, cache = model.run_with_cache(tokens)
    x = cache["blocks.1.mlp.hook_act_in"]
    sizes = (x[[1, 0, 3, 2]] - x).abs().mean((0, 1))
    apart = {c: abs(float(sizes[c] - sizes[4])) for c in range(16) if c not in (2, 4)}
    row = found.curves[found.curves["kind"] == "other channel"].iloc[0]
    assert Node(row["nodes"]) == Node(1, "mlp_in", min(apart, key=apart.get))


def test_tables_pictures_and_the_line_say_the_same(curves):
    examples = curves.examples()
    assert len(examples) == len(curves.curves) * 2 * 12
    whole = curves.to_dataframe()
    again = examples.groupby([*curves.curves.columns, "strength"], sort=False)["p_other"]
    assert again.mean().tolist() == pytest.approx(whole["p_other"].tolist(), rel=1e-5)
    names = {trace.name for trace in curves.to_plotly(of_two=False).data}
    assert {"0.attn.act_in:0", "all of these", "Gao et al., Figure 9 (all tokens)",
            "random direction", "shuffled bridge, of all"} <= names  # fmt: skip
    assert "at strength 1" in repr(curves)
    assert "by 0.attn.act_in:0" in repr(curves)
    assert "0.attn.act_in:0" in curves._repr_html_()


def test_the_papers_curves_are_data():
    frame = published_curves()
    quotes = frame[frame["task"] == "single_double_quote"].set_index("strength")["p_other"]
    assert quotes[0.1] == 0.77
    whiles = frame[frame["task"] == "while_return_true"].set_index("strength")["p_other"]
    assert whiles[1.0] == 0.161
    assert bool((frame.groupby("task")["p_other"].diff().dropna() >= 0).all())


def test_without_controls_there_are_none(chained, marks):
    batch = marks.batch(2, split="held_out", seed=0)
    found = steering_curves(chained, batch, "0.attn.act_in:0", strengths=(1.0,), draws=0)
    assert found.curves["kind"].tolist() == ["node"]
    assert "controls" not in repr(found)


def test_what_cannot_be_steered_is_refused(chained, marks):
    batch = marks.batch(2, split="held_out", seed=0)
    with pytest.raises(ValueError, match="finite numbers, at least one"):
        steering_curves(chained, batch, "0.attn.act_in:0", strengths=())
    with pytest.raises(ValueError, match="no answers: give a task's batch"):
        steering_curves(
            chained, batch.tokens, "0.attn.act_in:0", counterfactual=batch.tokens.flip(0)
        )
