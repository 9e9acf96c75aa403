"""Planted models with traps: what their circuits do, by direct runs, without the suite."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tl_sparse import ground_truth
from tl_sparse.ablation import resample_sources
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.circuits import Circuit, circuit_edges
from tl_sparse.ground_truth import traps
from tl_sparse.ground_truth.false_circuits import without
from tl_sparse.ground_truth.quoted_text import quote_task, quoted_tokenizer, running_text
from tl_sparse.ground_truth.wiring import HeadPart, NeuronPart, Plan, build

NAMES = ("averaging", "backup", "cancelling", "steered", "loud_answer", "gated")


@pytest.fixture(scope="module")
def models():
    return ground_truth.ground_truth_models()


def logit_diffs(model, keep, values=None, pairs=16):
    """Margins of held-out prompts under node masks."""
    batch = model.task.batch(pairs, split="held_out", seed=1)
    values = model.means.values if values is None else values
    return masked_logit_diffs(model.model, batch, model.index, torch.stack(list(keep)), values)


def share(model, keep):
    """f of each mask: what it keeps of the full model's mean logit_diff."""
    whole = torch.ones_like(model.kept)
    means = logit_diffs(model, [whole, ~whole, *keep]).mean(1)
    return (means[2:] - means[1]) / (means[0] - means[1])


def each_removed(model, nodes):
    """The mask without each of its nodes in turn."""
    rows = nodes.repeat(int(nodes.sum()), 1)
    rows[range(len(rows)), torch.nonzero(nodes).flatten()] = False
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_between_its_nodes_are_the_edges_that_were_written(models, name):
    model = models[name]
    order = list(model.edges.columns[:-1])
    found = circuit_edges(model.model, model.index, model.kept).sort_values(order)
    written = model.edges.sort_values(order)
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), written.reset_index(drop=True), check_exact=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_true_circuit_is_sufficient_and_necessary(models, name):
    model = models[name]
    whole = torch.ones_like(model.kept)
    losses = F.softplus(-logit_diffs(model, [whole, model.kept])).mean(1)
    assert (losses < 0.02).all()
    circuit, rest = share(model, [model.kept, ~model.kept])
    assert circuit == pytest.approx(1.0, abs=0.02)
    assert rest == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_every_node_of_the_true_circuit_gives_part_of_the_answer(models, name):
    """But for the gated model's constant query, which mean ablation cannot see."""
    model = models[name]
    lost = share(model, [model.kept]) - share(model, each_removed(model, model.kept))
    needed = lost > 0.02
    unseen = [role for role, found in zip(model.nodes["role"], needed, strict=True) if not found]
    assert unseen == (["query of: copies the first word's class"] if name == "gated" else [])


@pytest.mark.parametrize("name", NAMES)
def test_no_random_part_of_the_rest_matters(models, name):
    model = models[name]
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(24, 1, generator=generator)
    kept = model.kept | (torch.rand(24, model.index.n_nodes, generator=generator) < chance)
    assert F.softplus(-logit_diffs(model, kept)).mean(1).max() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_the_distractors_are_active(models, name):
    model = models[name]
    batch = model.task.batch(16, split="train", seed=0)
    _, cache = model.model.run_with_cache(batch.tokens)
    for hook, piece in model.index.slices.items():
        varies = cache[hook].flatten(0, 1).flatten(1).std(0) > 0.01
        assert varies[~model.kept[piece]].float().mean() > 0.6, hook


def test_a_circuit_of_any_nodes_can_be_had(models):
    model = models["loud_answer"]
    circuit = model.circuit()
    assert isinstance(circuit, Circuit)
    assert (circuit.n_nodes, circuit.n_edges) == (9, len(model.edges))
    assert circuit.accuracy == 1.0
    assert circuit.loss < 0.02
    assert circuit.task == model.task.name
    nothing = model.circuit(torch.zeros_like(model.kept))
    assert nothing.n_nodes == 0
    assert nothing.loss > 0.6
    with pytest.raises(ValueError, match=f"one entry for each of {model.index.n_nodes} nodes"):
        model.circuit(model.kept[1:])


def test_a_circuit_of_a_planted_model_can_be_stored(models, tmp_path):
    model = models["averaging"]
    model.circuit().save(tmp_path / "circuit")
    assert torch.equal(Circuit.load(tmp_path / "circuit", model.model).kept, model.kept)


def test_heads_and_mlps_are_those_of_the_nodes(models):
    backup = models["backup"]
    assert [layer for layer, _ in backup.heads] == [0, 1]
    assert backup.mlps == ()
    assert models["steered"].mlps == (0, 1)
    model = ground_truth.quote_closing(27)
    query = model.nodes[model.nodes["site"] == "attn_q"]["channel"].item()
    assert model.heads == ((1, query // 4),)


def test_the_gates_mean_is_far_from_every_value_of_it(models):
    model = models["gated"]
    (gate,) = model.nodes[model.nodes["role"] == "writes gate"].itertuples()
    _, cache = model.model.run_with_cache(model.text)
    values = cache[gate.hook][:, 1:, gate.channel]  # nothing is copied to the first token
    assert (values.abs() > 0.9).all()
    assert model.means.values[gate.Index].abs() < 0.2


def test_mean_ablation_needs_the_gate_and_resampling_does_not(models):
    model = models["gated"]
    gate = {"writes gate", "reads gate", "reads first", "reads class"}
    head = {role for role in model.nodes["role"] if "first word" in role}
    kept = without(model, gate | head)
    assert share(model, [kept])[0] < 0.2
    donors = resample_sources(model.model, model.text[:32])
    resampled = logit_diffs(model, [kept, model.kept], values=donors)
    assert (resampled > 3).all()


def test_zero_ablation_needs_the_constant_query_and_mean_ablation_does_not(models):
    model = models["gated"]
    kept = without(model, {"query of: copies the first word's class"})
    assert share(model, [kept])[0] > 0.99
    zeros = torch.zeros_like(model.means.values)
    whole, circuit = logit_diffs(model, [model.kept, kept], values=zeros).mean(1)
    assert whole > 4
    assert circuit < 2


def test_the_seed_decides_the_model_to_the_bit_and_nothing_else_does(models):
    state = torch.get_rng_state()
    again, other = traps.backup(0), traps.backup(1)
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = (m.model.state_dict() for m in (models["backup"], again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(other.kept, again.kept)


def test_a_plan_that_does_not_fit_is_refused():
    tokenizer = quoted_tokenizer()
    task, text = quote_task(tokenizer), running_text(tokenizer, 4, 0)

    def made(plan, **sizes):
        return build(plan, task, text, description="", **sizes)

    head = HeadPart(0, "h", ({"a": 1.0},) * 5, ({"a": 1.0},) * 5, ({"a": 1.0},), ({"b": 1.0},))
    neuron = NeuronPart(0, "n", {"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="d_head=5, not 4"):
        made(Plan(1, {}, {}, (head,)))
    with pytest.raises(ValueError, match="layer 0 of the plan needs heads=2, not 1"):
        made(Plan(1, {}, {}, (head, head)), heads=1, d_head=8)
    with pytest.raises(ValueError, match="'n' is in layer 0 of 0"):
        made(Plan(0, {}, {}, (), (neuron,)))
    with pytest.raises(ValueError, match="neurons=3, not 2"):
        made(Plan(1, {}, {}, (), (neuron,) * 3), neurons=2)
    with pytest.raises(ValueError, match="'zebra' is no token"):
        made(Plan(1, {"zebra": {"a": 1.0}}, {}, (), (neuron,)))


def test_where_abstopk_chooses_what_it_drops_is_part_of_the_mechanism():
    """The quote-closing circuit is one under mean ablation, and not under resampling.

    Its query is there at full stops alone because AbsTopK drops it elsewhere. What decides that is
    what all other queries read, and that is not among its 12 nodes.
    """
    model = ground_truth.quote_closing(27)
    donors = resample_sources(model.model, model.text[:32])
    others = model.kept.clone()
    others[model.index.slices["blocks.1.attn.hook_act_in"]] = True
    whole, circuit, more = logit_diffs(
        model, [torch.ones_like(model.kept), model.kept, others], values=donors
    ).mean(1)
    assert circuit < whole / 2
    assert more == pytest.approx(float(whole), rel=0.1)
    assert share(model, [model.kept])[0] > 0.95
