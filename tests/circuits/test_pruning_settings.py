"""What pruning may be told: tied channels, excluded nodes, other replacements, frozen norms, and
the embedding and the final stream as sites."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import (
    ablation_hooks,
    activation_means,
    norm_hooks,
    resample_sources,
)
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import (
    Circuit,
    PruningConfig,
    PruningFailed,
    compile_circuit,
    prune,
    prune_many,
)
from tl_sparse.circuits.backward_elimination import backward_elimination
from tl_sparse.circuits.mask_training import train_masks
from tl_sparse.circuits.pruning import choose_nodes
from tl_sparse.circuits.pruning_run import set_up, set_up_many
from tl_sparse.sites import SITE_NAMES

SEARCH = PruningConfig(
    headroom=0.0, steps=24, batch_pairs=8, selection_pairs=16, report_pairs=16, lr=0.06
)


def named(circuit):
    return set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))


def loss_of(model, batch, hooks=()):
    with torch.no_grad():
        return float(F.softplus(-task_logit_diffs(model, batch, hooks)).mean())


def kept_of(index, nodes):
    kept = torch.zeros(index.n_nodes, dtype=torch.bool)
    for layer, site, channel in nodes:
        kept[index.slices[index.hook(layer, site)].start + channel] = True
    return kept


# --------------------------------------------------------------------------------------------------
# tied query and key channels


@pytest.fixture
def attentive(planted):
    """The chain's first head attends to the mark alone, by key channel 2: its query is constant."""
    model, chain = planted()
    with torch.no_grad():
        embed = model.embed.W_E
        embed[:, 5] = 0
        embed[[5, 6], 5] = 12.0
        attn = model.blocks[0].attn
        attn.W_Q[0, 3, 2] = 3.0
        attn.W_K[0, 5, 2] = 3.0
        model.unembed.W_U.mul_(0.3)  # now that the mark is not diluted; if it is, too little
    return model, chain | {(0, "attn_in", 5), (0, "attn_k", 2)}


def test_a_key_brings_its_query_if_they_are_tied(attentive, marks, random_tokens):
    model, chain = attentive
    means = activation_means(model, random_tokens)
    query = (0, "attn_q", 2)
    for tie_qk, expected in ((False, chain), (True, chain | {query})):
        search = replace(SEARCH, tie_qk=tie_qk)
        circuit = prune(model, marks, search, means=means, progress=False)
        assert named(circuit) == expected
        assert circuit.selection_loss <= 0.15
        assert circuit.config["tie_qk"] == tie_qk
        sizes = circuit.size_curve
        assert sizes["n_nodes"].iloc[-1] == int((circuit.tau >= 0).sum())


def test_tied_channels_are_chosen_and_removed_together(attentive, marks, random_tokens):
    model, chain = attentive
    means = activation_means(model, random_tokens)
    run = set_up(model, marks, replace(SEARCH, tie_qk=True), means=means)
    index = run.index
    q, k = (index.slices[index.hook(0, name)] for name in ("attn_q", "attn_k"))
    tau = torch.full((index.n_nodes,), -1.0)
    tau[kept_of(index, chain)] = 0.2
    tau[q], tau[k] = torch.linspace(0.9, 0.1, 8), torch.linspace(0.9, 0.1, 8)
    kept, curve = choose_nodes(run, tau)
    assert torch.equal(kept[q], kept[k])
    assert int(kept[q].sum()) > 1
    assert int(kept.sum()) in curve["n_nodes"].tolist()
    after = backward_elimination(run, kept)
    assert torch.equal(after, kept_of(index, chain | {(0, "attn_q", 2)}))


def test_an_excluded_query_takes_its_key_along(attentive, marks, random_tokens):
    model, chain = attentive
    means = activation_means(model, random_tokens)
    exclude = kept_of(means.index, [(0, "attn_q", 2)])
    circuit = prune(model, marks, SEARCH, means=means, exclude=exclude, progress=False)
    assert named(circuit) == chain
    search = replace(SEARCH, tie_qk=True, steps=5, on_collapse="fail")
    with pytest.raises(PruningFailed):
        prune(model, marks, search, means=means, exclude=exclude, progress=False)


# --------------------------------------------------------------------------------------------------
# excluded nodes


def test_excluded_nodes_are_never_kept(planted, marks, random_tokens):
    """Not even by a search that would keep nearly everything."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    exclude = (torch.rand(means.index.n_nodes) < 0.5) & ~kept_of(means.index, chain)
    config = replace(SEARCH, steps=1, lr=1e-4, refine=False)
    jobs = [(marks, replace(config, seed=seed)) for seed in range(2)]
    found = prune_many(model, jobs, means=means, exclude=exclude, progress=False)
    for circuit in found:
        assert isinstance(circuit, Circuit)
        assert len(chain) < circuit.n_nodes <= circuit.n_active <= int((~exclude).sum())
        assert not (circuit.kept & exclude).any()
        assert (circuit.tau[exclude] == -1).all()


def test_without_a_node_that_is_needed_there_is_no_circuit(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    exclude = kept_of(means.index, [(1, "mlp_neuron", 5)])
    for on_collapse in ("fail", "eliminate"):
        search = replace(SEARCH, steps=2, on_collapse=on_collapse)
        with pytest.raises(PruningFailed, match="the mask collapsed"):
            prune(model, marks, search, means=means, exclude=exclude, progress=False)


# --------------------------------------------------------------------------------------------------
# replacements


@pytest.mark.parametrize("ablation", ["zero", "task_mean"])
def test_other_values_in_the_place_of_means(planted, marks, random_tokens, ablation):
    model, chain = planted()
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, ablation=ablation)
    circuit = prune(model, marks, search, means=means, progress=False)
    assert named(circuit) == chain
    run = set_up(model, marks, search, means=means)
    assert torch.equal(circuit.means.values, run.values)
    assert (circuit.means.values - means.values).abs().max() > 0.05
    hooks = circuit.hooks()
    assert circuit.loss == pytest.approx(loss_of(model, run.report, hooks), abs=1e-6)
    by_hand = ablation_hooks(circuit.index, circuit.kept, run.values)
    assert loss_of(model, run.report, hooks) == loss_of(model, run.report, by_hand)


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_removed_nodes_are_resampled(request, planted, marks, random_tokens, kind):
    model, chain = planted() if kind == "ours" else request.getfixturevalue("dense_planted")
    means = activation_means(model, random_tokens)
    donors = resample_sources(model, random_tokens)
    search = replace(SEARCH, ablation="resample")
    circuit = prune(model, marks, search, means=means, sources=donors, progress=False)
    assert chain <= named(circuit)
    assert len(named(circuit) - chain) <= 2
    run = set_up(model, marks, search, means=means, sources=donors)
    hooks = circuit.hooks_for(model, run.report.tokens, run.values)
    assert circuit.loss == pytest.approx(loss_of(model, run.report, hooks), abs=1e-6)
    hooks = circuit.hooks_for(model, run.selection.tokens, run.values)
    found = loss_of(model, run.selection, hooks)
    assert circuit.selection_loss == pytest.approx(found, abs=1e-6)
    assert found < 0.15
    with pytest.raises(ValueError, match=r"ablation='resample' .*use hooks_for\(model, tokens\)"):
        circuit.hooks()
    with pytest.raises(ValueError, match="sources= belong to circuits pruned with"):
        circuit.hooks_for(model, run.report.tokens)


# --------------------------------------------------------------------------------------------------
# frozen norms


def scales_under(model, batch, hooks):
    """What every norm divides by at the prompts' tokens, under hooks."""
    found = {}
    looks = [(name, lambda x, hook: found.update({hook.name: x})) for name in norm_hooks(model)]
    loss_of(model, batch, [*hooks, *looks])
    return found


def test_norms_are_held_at_the_whole_models(planted, marks, random_tokens):
    model, chain = planted()
    means = activation_means(model, random_tokens)
    search = replace(SEARCH, freeze_norm=True)
    circuit = prune(model, marks, search, means=means, progress=False)
    assert named(circuit) == chain
    batch = set_up(model, marks, search, means=means).report
    rows, hooks = torch.arange(len(batch)), circuit.hooks_for(model, batch.tokens)
    with torch.no_grad():
        logits = model.run_with_hooks(batch.tokens, return_type="logits", fwd_hooks=hooks)
    logits = logits[rows, batch.last]
    logit_diffs = logits[rows, batch.correct_token] - logits[rows, batch.incorrect_token]
    torch.testing.assert_close(circuit.losses, F.softplus(-logit_diffs), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"freeze_norm=True.*use hooks_for\(model, tokens\)"):
        circuit.hooks()
    with pytest.raises(ValueError, match="sources= belong to circuits"):
        circuit.hooks_for(model, batch.tokens, resample_sources(model, random_tokens))


def test_a_frozen_norm_does_not_amplify_what_is_kept(planted, marks, random_tokens):
    """The large constant channels are nodes: with them at zero, the free scale shrinks."""
    model, _ = planted()
    sites = ("embed", "attn_v")
    means = activation_means(model, random_tokens, sites)
    index = means.index
    kept = kept_of(index, [(0, "embed", 0), (0, "attn_v", 1)])
    losses = {}
    for freeze_norm in (False, True):
        search = replace(SEARCH, ablation="zero", freeze_norm=freeze_norm)
        run = set_up(model, marks, search, means=means)
        hooks = [*run.selection_hooks, *ablation_hooks(index, kept, run.values)]
        whole = scales_under(model, run.selection, [])
        shrunk = scales_under(model, run.selection, hooks)
        for name, scale in whole.items():
            assert torch.equal(shrunk[name], scale) == freeze_norm, name
        losses[freeze_norm] = float(run.losses(kept[None]))
        assert losses[freeze_norm] == pytest.approx(loss_of(model, run.selection, hooks))
    assert losses[False] < losses[True]


def test_jobs_with_frozen_norms_are_those_alone(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens, ("embed", "attn_v", "mlp_neuron"))
    config = replace(SEARCH, ablation="zero", init_bias=0.05, init_scale=0.1, steps=4)
    jobs = [
        (marks, replace(config, freeze_norm=frozen, seed=seed))
        for seed, frozen in ((0, True), (1, True), (0, False))
    ]
    runs = set_up_many(model, jobs, means, None, None)
    together = train_masks(runs[:2], progress=False)[-1]
    alone = [train_masks([run], progress=False)[-1][0] for run in runs]
    torch.testing.assert_close(together, torch.stack(alone[:2]), atol=1e-4, rtol=0)
    assert (alone[0] - alone[2]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# the embedding and the final stream


@pytest.mark.parametrize("kind", ["ours", "attn_only", "dense"])
def test_the_embedding_and_the_final_stream_are_sites(
    request, planted, marks, random_tokens, tmp_path, kind
):
    if kind == "dense":
        model, chain = request.getfixturevalue("dense_planted")
    else:
        model, chain = planted(attn_only=kind == "attn_only")
    sites = tuple(
        n for n in SITE_NAMES if n != "attn_z" and (kind != "attn_only" or n[:3] != "mlp")
    )
    means = activation_means(model, random_tokens, sites)
    circuit = prune(model, marks, SEARCH, means=means, progress=False)
    ends = {(0, "embed", 0), (1, "final_resid", 2 if kind == "ours" else 1)}
    assert chain | ends <= named(circuit)
    assert len(named(circuit) - chain - ends) <= (2 if kind == "dense" else 0)
    assert set(circuit.edges["source_site"]) | set(circuit.edges["target_site"]) <= set(sites[1:-1])
    graph = circuit.to_networkx()
    links = {(a, b) for a, b, kind in graph.edges(data="kind") if kind == "residual"}
    write = (0, "attn_out", 1) if kind != "ours" else (1, "mlp_out", 2)
    assert ((0, "embed", 0), (0, "attn_in", 0)) in links
    assert (write, (1, "final_resid", write[2])) in links
    assert circuit._repr_html_().count("<iframe") == 1
    assert "final residual" in circuit.to_plotly().to_json()
    circuit.save(tmp_path / "c")
    again = Circuit.load(tmp_path / "c", model)
    assert again.index == circuit.index
    assert named(again) == named(circuit)
    batch = marks.batch(8, split="held_out", seed=0)
    assert loss_of(model, batch, again.hooks()) == loss_of(model, batch, circuit.hooks())


def test_a_circuit_with_nodes_at_the_ends_is_not_compiled(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens, ("embed", "attn_v", "final_resid"))
    search = replace(SEARCH, steps=2)
    circuit = prune(model, marks, search, means=means, progress=False)
    batch = marks.batch(8, split="held_out", seed=0)
    with pytest.raises(ValueError, match="nodes at embed, final_resid cannot be compiled: only"):
        compile_circuit(circuit, model, batch)


@pytest.mark.parametrize("change", [{"freeze_norm": True}, {"ablation": "resample"}])
def test_a_circuit_whose_hooks_depend_on_the_prompts_is_not_compiled(
    planted, marks, random_tokens, change
):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    donors = resample_sources(model, random_tokens) if "ablation" in change else None
    search = replace(SEARCH, steps=2, target_loss=0.5, **change)
    circuit = prune(model, marks, search, means=means, sources=donors, progress=False)
    with pytest.raises(ValueError, match="its hooks depend on the prompts"):
        compile_circuit(circuit, model, marks.batch(8, split="held_out", seed=0))
