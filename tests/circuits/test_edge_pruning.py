import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import Circuit
from tl_sparse.circuits.edge_pruning import EdgePruningConfig, EdgePruningRun, prune_edges
from tl_sparse.circuits.edge_search import fewest_edges, remove_greedily
from tl_sparse.circuits.pruning_config import PruningConfig
from tl_sparse.circuits.pruning_run import build_circuit, set_up
from tl_sparse.config import ActivationDensity
from tl_sparse.storage.fingerprint import fingerprint

SEARCH = PruningConfig(headroom=0.0, steps=60, batch_pairs=16, selection_pairs=32, report_pairs=24)
EDGES = EdgePruningConfig(steps=60, batch_pairs=16, selection_pairs=32, report_pairs=24)
CHAIN_EDGES = {
    (0, "W_V", 0, 1), (0, "W_O", 1, 1), (1, "W_in", 1, 5), (1, "W_out", 5, 2),
}  # fmt: skip


def circuit_of(model, task, tokens, chain, share, config=SEARCH):
    """The planted chain and a share of all other nodes, as a circuit."""
    run = set_up(model, task, config, means=activation_means(model, tokens))
    index = run.index
    kept = torch.rand(index.n_nodes, generator=torch.Generator().manual_seed(1)) < share
    for layer, site, channel in chain:
        kept[index.slices[index.hook(layer, site)].start + channel] = True
    return build_circuit(run, kept, torch.zeros(index.n_nodes), n_active=int(kept.sum()))


@pytest.fixture
def padded(planted, marks, random_tokens):
    """The planted model, its chain, and a circuit with many nodes beside the chain."""
    model, chain = planted()
    return model, chain, circuit_of(model, marks, random_tokens, chain, 0.5)


def names(edges):
    return set(edges[["layer", "matrix", "source", "target"]].itertuples(index=False, name=None))


def nodes_of(frame):
    return set(frame[["layer", "site", "channel"]].itertuples(index=False, name=None))


@pytest.mark.parametrize("method", ["learned", "greedy"])
def test_both_methods_find_the_planted_edges(padded, marks, method):
    model, chain, circuit = padded
    assert circuit.n_edges > 90
    found = prune_edges(model, circuit, marks, replace(EDGES, method=method), progress=False)
    left = names(found.edges)
    assert left >= CHAIN_EDGES
    assert len(left) <= 6
    assert nodes_of(found.nodes) >= chain
    assert found.n_nodes <= 8
    assert found.n_nodes < circuit.n_nodes
    assert found.config["edge_pruning"]["minimal"]
    assert found.selection_loss <= found.target_loss == SEARCH.target_loss
    assert found.accuracy == 1.0


def test_learned_gates_alone_find_most_of_it(padded, marks):
    model, _, circuit = padded
    found = prune_edges(model, circuit, marks, replace(EDGES, refine=False), progress=False)
    left = names(found.edges)
    assert left >= CHAIN_EDGES
    assert len(left) <= 0.25 * circuit.n_edges
    assert not found.config["edge_pruning"]["minimal"]
    assert found.selection_loss <= found.target_loss


def test_a_transformer_lens_model_loses_edges(dense_planted, marks, random_tokens):
    model, chain = dense_planted
    circuit = circuit_of(model, marks, random_tokens, chain, 0.2)
    before = fingerprint(model)
    found = prune_edges(model, circuit, marks, replace(EDGES, method="greedy"), progress=False)
    left = names(found.edges)
    assert left >= {(0, "W_V", 0, 1), (0, "W_O", 1, 1)}
    assert len(left) <= 4 < circuit.n_edges
    assert fingerprint(model) == before
    batch = marks.batch(EDGES.report_pairs, split="held_out", seed=0)
    with found.applied(model), torch.no_grad():
        torch.testing.assert_close(F.softplus(-task_logit_diffs(model, batch)), found.losses)


def test_abstopk_stays(planted, marks, random_tokens):
    model, chain = planted(activation_density=ActivationDensity.paper(0.5))
    circuit = circuit_of(model, marks, random_tokens, chain, 0.3)
    found = prune_edges(model, circuit, marks, replace(EDGES, method="greedy"), progress=False)
    assert names(found.edges) >= CHAIN_EDGES
    assert found.n_edges < 0.3 * circuit.n_edges
    assert found.selection_loss <= found.target_loss
    batch = marks.batch(EDGES.report_pairs, split="held_out", seed=0)
    with found.applied(model), torch.no_grad():
        assert torch.equal(F.softplus(-task_logit_diffs(model, batch)), found.losses)


@pytest.fixture
def found(planted, marks, random_tokens):
    model, chain = planted()
    circuit = circuit_of(model, marks, random_tokens, chain, 0.25)
    return model, circuit, prune_edges(
        model, circuit, marks, replace(EDGES, method="greedy"), progress=False
    )  # fmt: skip


def test_inside_applied_any_tool_sees_the_pruned_circuit(found, marks):
    model, circuit, pruned = found
    batch = marks.batch(EDGES.report_pairs, split="held_out", seed=0)
    with torch.no_grad():
        whole = task_logit_diffs(model, batch)
        with pruned.applied(model):
            model.reset_hooks()  # as many tools do
            inside = task_logit_diffs(model, batch)
            _, cache = model.run_with_cache(batch.tokens)
    assert torch.equal(F.softplus(-inside), pruned.losses)
    assert torch.equal(inside > 0, pruned.correct)
    assert not torch.equal(inside, whole)
    index = circuit.index
    for hook, piece in index.slices.items():
        activation = cache[hook].flatten(2) if cache[hook].ndim == 4 else cache[hook]
        removed = torch.nonzero(~pruned.kept[piece]).flatten()
        expected = circuit.means.values[piece][removed].expand_as(activation[..., removed])
        assert torch.equal(activation[..., removed], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_what_it_was(found, marks, fails):
    model, _, pruned = found
    batch = marks.batch(8, split="held_out", seed=0)
    before = {name: x.detach().clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        logit_diffs = task_logit_diffs(model, batch)
    try:
        with pruned.applied(model) as inside:
            assert inside is model
            assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
            if fails:
                raise RuntimeError("a tool failed")
    except RuntimeError:
        assert fails
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(point.fwd_hooks or point._forward_hooks for point in model.hook_dict.values())
    with torch.no_grad():
        assert torch.equal(task_logit_diffs(model, batch), logit_diffs)
    assert all(p.requires_grad for p in model.parameters())


def test_a_gradient_may_be_taken_inside(found, marks):
    model, _, pruned = found
    batch = marks.batch(8, split="held_out", seed=0)
    with pruned.applied(model):
        task_logit_diffs(model, batch).sum().backward()
    assert model.blocks[1].mlp.W_out.grad.abs().sum() > 0


def test_the_table_tells_kept_removed_and_dropped_apart(found):
    _, circuit, pruned = found
    kept, removed, edges = names(pruned.edges), names(pruned.removed_edges), circuit.edges
    assert kept | removed <= names(edges)
    assert not kept & removed
    assert pruned.edges["score"].notna().all()
    assert pruned.removed_edges["score"].notna().all()
    ends = {
        end: list(zip(edges["layer"], edges[f"{end}_site"], edges[end], strict=True))
        for end in ("source", "target")
    }
    left = nodes_of(pruned.nodes)
    both = [a in left and b in left for a, b in zip(ends["source"], ends["target"], strict=True)]
    assert kept == names(edges[both]) - removed
    assert pruned.n_edges == len(kept)
    assert set(torch.nonzero(pruned.kept).flatten().tolist()) <= set(
        torch.nonzero(circuit.kept).flatten().tolist()
    )


def test_a_pruned_circuit_is_saved_loaded_drawn_and_not_pruned_again(found, marks, tmp_path):
    model, _, pruned = found
    pruned.save(tmp_path / "c")
    loaded = Circuit.load(tmp_path / "c", model)
    pd.testing.assert_frame_equal(loaded.edges, pruned.edges, check_like=True, check_exact=True)
    pd.testing.assert_frame_equal(
        loaded.removed_edges, pruned.removed_edges, check_like=True, check_exact=True
    )
    batch = marks.batch(EDGES.report_pairs, split="held_out", seed=0)
    with loaded.applied(model), torch.no_grad():
        assert torch.equal(F.softplus(-task_logit_diffs(model, batch)), pruned.losses)
    assert loaded.config == pruned.config
    assert "<iframe" in pruned._repr_html_()
    assert f"{pruned.n_edges} edges" in pruned.to_plotly().layout.title.text
    with pytest.raises(ValueError, match="edges of this circuit are removed"):
        prune_edges(model, pruned, marks, EDGES, progress=False)


@pytest.mark.parametrize(
    ("record", "asked", "goal"),
    [({"headroom": 0.4}, None, 0.09), ({"headroom": 0.4}, 0.2, 0.2), ({}, None, 0.15)],
)
def test_edges_are_chosen_to_what_the_nodes_were_chosen_to(padded, marks, record, asked, goal):
    """The headroom of the nodes is not used up; a circuit that names none has none."""
    model, _, circuit = padded
    circuit, config = replace(circuit, config=record), replace(EDGES, target_loss=asked)
    with eval_mode(model):
        run = EdgePruningRun.set_up(model, circuit, marks, config)
    assert run.goal == pytest.approx(goal)
    assert run.target == (asked or circuit.target_loss)


def test_what_is_left_is_minimal(found, marks):
    """Put back or taken away: one edge fewer misses the target."""
    model, circuit, pruned = found
    with torch.no_grad():
        before = task_logit_diffs(model, marks.batch(24, split="held_out", seed=0), circuit.hooks())
    record = pruned.config["edge_pruning"]
    assert record["loss_before"] == pytest.approx(float(F.softplus(-before).mean()), abs=1e-6)
    with eval_mode(model):
        run = EdgePruningRun.set_up(model, circuit, marks, replace(EDGES, method="greedy"))
        gone = names(pruned.removed_edges)
        columns = circuit.edges[["layer", "matrix", "source", "target"]]
        keep = torch.tensor([e not in gone for e in columns.itertuples(index=False, name=None)])
        assert run.loss(keep, pruned.kept) == pytest.approx(pruned.selection_loss)
        for which in torch.nonzero(keep).flatten().tolist():
            fewer = keep.clone()
            fewer[which] = False
            assert run.loss(fewer) > pruned.target_loss


def test_the_same_again(planted, marks, random_tokens):
    model, chain = planted()
    circuit = circuit_of(model, marks, random_tokens, chain, 0.25)
    learned = replace(EDGES, steps=30, refine=False)
    first, second = (prune_edges(model, circuit, marks, learned, progress=False) for _ in range(2))
    assert first.edges.equals(second.edges)
    assert torch.equal(first.losses, second.losses)
    assert first.seconds > 0
    assert f"({len(first.removed_edges)} removed)" in repr(first)


def test_refusals(padded, planted, marks, random_tokens):
    model, _, circuit = padded
    other, _ = planted(act_fn="relu")
    with torch.no_grad():
        other.unembed.W_U.mul_(2)
    with pytest.raises(ValueError, match="belongs to another model"):
        prune_edges(other, circuit, marks, EDGES, progress=False)
    with pytest.raises(ValueError, match="of task marked, not of another"):
        prune_edges(model, circuit, replace(marks, name="another"), EDGES, progress=False)
    with pytest.raises(ValueError, match="no edges"):
        prune_edges(model, replace(circuit, edges=circuit.edges[:0]), marks, EDGES, progress=False)
    low = replace(EDGES, target_loss=1e-7)
    with pytest.raises(ValueError, match="above the target"):
        prune_edges(model, circuit, marks, low, progress=False)
    with pytest.raises(ValueError, match="give target_loss="):
        prune_edges(model, replace(circuit, target_loss=math.nan), marks, EDGES, progress=False)
    resampled = replace(circuit, config={**circuit.config, "ablation": "resample"})
    with pytest.raises(ValueError, match="resample"):
        prune_edges(model, resampled, marks, EDGES, progress=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("lr", 0.0), ("target_loss", -1.0), ("max_passes", 0)],
)
def test_a_config_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        EdgePruningConfig(**{field: value})


# --------------------------------------------------------------------------------------------------
# the search alone, on losses that are known


def test_bisection_keeps_the_fewest_first_edges():
    order = torch.tensor([3, 1, 4, 0, 2])

    def loss_of(keep):
        return 0.0 if bool(keep[[3, 1, 4]].all()) else 1.0

    keep = fewest_edges(order, 6, loss_of, 0.5)
    assert torch.nonzero(keep).flatten().tolist() == [1, 3, 4]
    assert not fewest_edges(order, 6, lambda keep: 0.0, 0.5).any()


def test_greedy_removal_ends_where_none_can_go_alone():
    """Edges 2 and 7 are needed, of 4 and 5 one is, whichever it is; importances mislead."""
    seen = []

    def loss_of(keep):
        seen.append(keep)
        return 0.0 if keep[2] and keep[7] and (keep[4] or keep[5]) else 1.0

    keep, minimal = remove_greedily(
        torch.ones(40, dtype=torch.bool),
        lambda keep: torch.arange(40.0),  # 2 is thought to matter least but for two others
        loss_of, 0.5, max_passes=8, patience=64, progress=False,
    )  # fmt: skip
    assert torch.nonzero(keep).flatten().tolist() == [2, 5, 7]
    assert minimal
    assert len(seen) < 40  # groups, not edges


@pytest.mark.parametrize(("patience", "minimal"), [(3, False), (64, True)])
def test_a_pass_ends_early_after_many_edges_that_could_not_go(patience, minimal):
    """All but the last edge are needed; ranked by their number, it is found only with patience."""
    keep, found = remove_greedily(
        torch.ones(12, dtype=torch.bool), lambda keep: torch.arange(12.0),
        lambda keep: 0.0 if bool(keep[:11].all()) else 1.0, 0.5,
        max_passes=8, patience=patience, progress=False,
    )  # fmt: skip
    assert found == minimal
    assert bool(keep[11]) == (not minimal)


def test_effects_are_estimated_anew_in_every_pass():
    """Edge 1 can go only once edge 0 has gone, which the first estimate puts behind it."""
    estimates = []

    def effect_of(keep):
        estimates.append(keep.clone())
        return torch.tensor([1.0, 0.0, 2.0])

    keep, minimal = remove_greedily(
        torch.ones(3, dtype=torch.bool), effect_of,
        lambda keep: 0.0 if keep[2] and (keep[1] or not keep[0]) else 1.0, 0.5,
        max_passes=8, patience=64, progress=False,
    )  # fmt: skip
    assert keep.tolist() == [False, False, True]
    assert minimal
    assert [each.tolist() for each in estimates[1:]] == [[False, True, True], [False, False, True]]
