import math

import pytest
import torch

from tl_sparse.ablation import ablation_hooks
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.faithfulness import necessity
from tl_sparse.faithfulness.controls import (
    CONTROLS,
    NEAREST,
    control_components,
    degrees,
    displacement,
    nearest_values,
)
from tl_sparse.sites import NodeIndex


def counts(index, mask):
    return [int(mask[piece].sum()) for piece in index.slices.values()]


def control(kind, index, kept, alike, generator):
    """A random set with as many nodes of every hook as ``kept``."""
    widths = torch.tensor([piece.stop - piece.start for piece in index.slices.values()])
    group = torch.arange(len(widths)).repeat_interleave(widths)
    return control_components(kind, group, kept, alike, generator)


def test_the_planted_chain_is_necessary_and_random_nodes_are_not(chain):
    model, task, circuit = chain
    found = necessity(model, circuit, task, n_controls=6, pairs=16)
    assert found.model_loss < 0.1
    assert found.loss > 0.6
    assert found.mean_loss("outside") < 0.2
    assert found.n_nodes == 6
    frame = found.to_dataframe()
    assert frame["kind"].value_counts().to_dict() == {
        "none": 1, "circuit": 1, "outside": 6, "anywhere": 6, "matched": 6, "degree": 6,
    }  # fmt: skip
    assert frame.loc[frame["kind"] == "circuit", "shared"].tolist() == [6]
    assert (frame.loc[frame["kind"].isin(["outside", "matched", "degree"]), "shared"] == 0).all()
    assert (frame.loc[frame["kind"] != "none", "n_nodes"] == 6).all()


def test_losses_are_those_of_ablating_exactly_the_circuit(chain):
    model, task, circuit = chain
    found = necessity(model, circuit, task, n_controls=1, pairs=8, seed=3)
    batch = task.batch(8, split="held_out", seed=3)
    hooks = ablation_hooks(circuit.index, ~circuit.kept, circuit.means.values)
    with torch.no_grad():
        for kind, under in (("circuit", hooks), ("none", [])):
            logit_diffs = task_logit_diffs(model, batch, under)
            row = found.losses[found.sets["kind"] == kind][0]
            torch.testing.assert_close(row, torch.nn.functional.softplus(-logit_diffs))
    assert found.prompts == batch.prompts


def test_other_values_than_the_means_may_be_given(chain):
    model, task, circuit = chain
    zeros = torch.zeros(circuit.index.n_nodes)
    found = necessity(model, circuit, task, n_controls=1, pairs=8, values=zeros)
    hooks = ablation_hooks(circuit.index, ~circuit.kept, zeros)
    with torch.no_grad():
        logit_diffs = task_logit_diffs(model, task.batch(8, split="held_out", seed=0), hooks)
    assert found.loss == pytest.approx(float(torch.nn.functional.softplus(-logit_diffs).mean()))


@pytest.mark.parametrize("kind", CONTROLS)
def test_controls_have_the_circuits_numbers_everywhere(chain, kind):
    _, _, circuit = chain
    generator = torch.Generator().manual_seed(0)
    moved = torch.rand(circuit.index.n_nodes)
    drawn = [control(kind, circuit.index, circuit.kept, moved, generator) for _ in range(10)]
    assert all(counts(circuit.index, m) == counts(circuit.index, circuit.kept) for m in drawn)
    assert len({tuple(m.tolist()) for m in drawn}) > 1
    shared = [int((m & circuit.kept).sum()) for m in drawn]
    assert (max(shared) > 0) == (kind == "anywhere")


@pytest.mark.parametrize("kind", ["outside", "matched", "degree"])
def test_a_site_with_few_nodes_outside_gives_all_it_has(chain, kind):
    _, _, circuit = chain
    kept = circuit.kept.clone()
    first = next(iter(circuit.index.slices.values()))
    kept[first.start : first.stop - 2] = True
    drawn = control(kind, circuit.index, kept, torch.rand(len(kept)), torch.Generator())
    assert torch.nonzero(drawn[first]).flatten().tolist() == [
        first.stop - first.start - 2, first.stop - first.start - 1,
    ]  # fmt: skip


def test_matched_nodes_move_as_much_as_the_circuits(small_model):
    index = NodeIndex.of(small_model(), ("mlp_neuron",))
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    kept[3] = True
    moved = torch.zeros(index.n_nodes)
    moved[3] = 5.0
    near = torch.arange(8, 8 + NEAREST)
    moved[near] = torch.linspace(4.0, 6.0, NEAREST)
    generator = torch.Generator().manual_seed(0)
    drawn = [control("matched", index, kept, moved, generator) for _ in range(30)]
    assert {int(torch.nonzero(mask)) for mask in drawn} == set(near.tolist())


def test_equal_values_are_drawn_alike_and_none_twice():
    generator = torch.Generator().manual_seed(0)
    pool = torch.zeros(40)
    drawn = [nearest_values(torch.zeros(3), pool, generator) for _ in range(200)]
    assert all(len(set(one.tolist())) == 3 for one in drawn)
    assert len(torch.cat(drawn).unique()) == 40
    assert len(nearest_values(torch.zeros(9), torch.zeros(4), generator)) == 4


def test_degrees_count_the_nonzero_weights_of_every_node(small_model):
    model = small_model("concat", zeros=0.6)
    index = NodeIndex.of(model, (*NodeIndex.of(model).sites, "embed", "final_resid"))
    found = degrees(model, index)
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    d_head = model.config.d_head
    by_hand = {
        (1, "attn_in", 2): sum(int((w[:, 2] != 0).sum()) for w in (attn.W_Q, attn.W_K, attn.W_V)),
        (1, "attn_in", model.config.d_model + 1): sum(
            int((w[:, 1] != 0).sum()) for w in (attn.W_Q_pos, attn.W_K_pos, attn.W_V_pos)
        ),
        (1, "attn_q", d_head + 1): int((attn.W_Q[1, :, 1] != 0).sum())
        + int((attn.W_Q_pos[1, :, 1] != 0).sum()),
        (1, "attn_v", 0): int((attn.W_V[0, :, 0] != 0).sum())
        + int((attn.W_V_pos[0, :, 0] != 0).sum())
        + int((attn.W_O[0, 0] != 0).sum()),
        (1, "attn_out", 3): int((attn.W_O[..., 3] != 0).sum()),
        (1, "mlp_neuron", 5): int((mlp.W_in[:, 5] != 0).sum())
        + int((mlp.W_in_pos[:, 5] != 0).sum())
        + int((mlp.W_out[5] != 0).sum()),
        (0, "embed", 3): int((model.W_E[:, 3] != 0).sum()),
        (1, "final_resid", 3): int((model.W_U[3] != 0).sum()),
    }
    for (layer, site, channel), degree in by_hand.items():
        piece = index.slices[index.hook(layer, site)]
        assert found[piece.start + channel] == degree, (layer, site, channel)


def test_degree_controls_have_weights_as_the_circuits_nodes_have(small_model):
    index = NodeIndex.of(small_model(), ("mlp_neuron",))
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    kept[0] = True
    alike = torch.ones(index.n_nodes)
    alike[0] = 7.0
    alike[[10, 11, 12, 13, 14]] = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0])
    generator = torch.Generator().manual_seed(1)
    drawn = [control("degree", index, kept, alike, generator) for _ in range(40)]
    assert {int(torch.nonzero(mask)) for mask in drawn} == {10, 11, 12, 13, 14}


def test_degrees_are_of_sites_alone(small_model):
    model = small_model()
    index = NodeIndex.over(model, {"blocks.0.hook_resid_mid": model.config.d_model})
    with pytest.raises(ValueError, match="hook_resid_mid"):
        degrees(model, index)


def test_displacement_is_the_mean_distance_from_the_value(chain):
    model, task, circuit = chain
    batch = task.batch(6, split="held_out", seed=0)
    values = circuit.means.values
    found = displacement(model, circuit.index, values, batch)
    _, cache = model.run_with_cache(batch.tokens)
    real = torch.arange(batch.tokens.shape[1]) <= batch.last[:, None]
    for name, piece in circuit.index.slices.items():
        expected = (cache[name].flatten(2)[real] - values[piece]).abs().mean(0)
        torch.testing.assert_close(found[piece], expected.detach(), atol=1e-5, rtol=1e-4)


def test_tables_and_figure(chain):
    model, task, circuit = chain
    found = necessity(model, circuit, task, n_controls=3, pairs=4)
    examples = found.examples()
    assert len(examples) == 14 * 8
    one = examples[(examples["kind"] == "outside") & (examples["draw"] == 1)]
    assert one["prompt"].tolist() == list(found.prompts)
    row = found.to_dataframe().query("kind == 'outside' and draw == 1").iloc[0]
    assert one["loss"].mean() == pytest.approx(row["loss"])
    assert found.spread("outside") >= 0
    assert math.isnan(found.spread("circuit"))
    figure = found.to_plotly()
    by_name = {trace.name: trace for trace in figure.data}
    assert list(by_name["circuit's nodes"].y) == pytest.approx([found.loss])
    assert list(by_name["circuit's nodes"].x) == [6]
    assert "Necessity" in found._repr_html_()
    with pytest.raises(ValueError, match="none, circuit, outside"):
        found.mean_loss("elsewhere")


def test_a_dense_models_circuit_is_tested_too(dense_planted, marks, circuit_of):
    model, nodes = dense_planted
    circuit = circuit_of(model, marks, nodes)
    found = necessity(model, circuit, marks, n_controls=4, pairs=8)
    assert found.loss > 0.5 > 2 * found.mean_loss("outside")


def test_a_circuit_of_another_model_is_refused(chain, planted):
    model, task, circuit = chain
    with pytest.raises(ValueError, match="belongs to another"):
        necessity(planted(d_mlp=16)[0], circuit, task)
    with pytest.raises(ValueError, match="n_controls=0"):
        necessity(model, circuit, task, n_controls=0)
