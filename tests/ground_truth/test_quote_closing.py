import pandas as pd
import pytest
import torch

from tl_sparse import ground_truth
from tl_sparse.ablation import ablation_hooks
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_losses
from tl_sparse.circuits import circuit_edges
from tl_sparse.circuits.edges import input_major
from tl_sparse.ground_truth.quote_closing import QUERY
from tl_sparse.ground_truth.quoted_text import WORDS
from tl_sparse.sites import MATRICES

SEEDS = range(5)


@pytest.fixture(scope="module")
def models():
    """A planted model of each seed, with as few distractors as there may be."""
    made = {}

    def of(seed):
        if seed not in made:
            made[seed] = ground_truth.quote_closing(distractors=27, seed=seed)
        return made[seed]

    return of


def own(model, site):
    """Channels of the circuit at a site."""
    nodes = model.nodes[model.nodes["site"] == site]
    return nodes["channel"].tolist()


def test_it_has_twelve_nodes_and_nine_edges(models):
    model = models(0)
    assert model.kept.sum() == len(model.nodes) == 12
    counts = model.nodes.groupby(["layer", "site"]).size().to_dict()
    assert counts == {
        (0, "mlp_in"): 2, (0, "mlp_neuron"): 2, (0, "mlp_out"): 2, (1, "attn_in"): 2,
        (1, "attn_q"): 1, (1, "attn_k"): 1, (1, "attn_v"): 1, (1, "attn_out"): 1,
    }  # fmt: skip
    assert model.edges.groupby("matrix").size().to_dict() == {
        "W_in": 2, "W_out": 4, "W_K": 1, "W_V": 1, "W_O": 1,
    }  # fmt: skip
    assert model.nodes["role"].is_unique


@pytest.mark.parametrize("seed", SEEDS)
def test_the_weights_between_its_nodes_are_the_edges_that_were_written(models, seed):
    model = models(seed)
    order = list(model.edges.columns[:-1])
    found = circuit_edges(model.model, model.index, model.kept).sort_values(order)
    written = model.edges.sort_values(order)
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), written.reset_index(drop=True), check_exact=True
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_the_circuit_does_the_task_and_no_node_can_be_missed(models, seed):
    """In the circuit and in the full model: so no set that lacks one of them reaches 0.15."""
    model = models(seed)
    nodes = torch.nonzero(model.kept).flatten()
    without = torch.ones(12, model.index.n_nodes, dtype=torch.bool)
    without[range(12), nodes] = False
    whole = torch.ones(1, model.index.n_nodes, dtype=torch.bool)
    keep = torch.cat([whole, model.kept[None], model.kept & without, without])
    batch = model.task.batch(16, split="held_out", seed=1)
    losses = masked_losses(model.model, batch, model.index, keep, model.means.values)
    assert (losses[:2] < 0.05).all()
    assert (losses[2:] > 0.25).all()


def test_whatever_else_is_there_a_missing_node_cannot_be_made_up_for(models):
    """With random halves of the distractors too."""
    model = models(0)
    generator = torch.Generator().manual_seed(0)
    some = model.kept | (torch.rand(60, model.index.n_nodes, generator=generator) < 0.5)
    nodes = torch.nonzero(model.kept).flatten()
    lacking = some.clone()
    lacking[range(60), nodes.repeat(5)] = False
    batch = model.task.batch(8, split="train", seed=1)
    losses = [
        masked_losses(model.model, batch, model.index, keep, model.means.values)
        for keep in (some, lacking)
    ]
    assert losses[0].max() < 0.1
    assert losses[1].min() > 0.2


def test_ranking_by_exact_ablation_finds_it(models):
    """The distractors hide it from no one who tries every node."""
    model = models(1)
    batch = model.task.batch(8, split="train", seed=0)
    one_each = ~torch.eye(model.index.n_nodes, dtype=torch.bool)
    losses = masked_losses(model.model, batch, model.index, one_each, model.means.values)
    found = torch.zeros_like(model.kept)
    found[losses.argsort(descending=True)[:12]] = True
    assert ground_truth.recovery(model, found).exact


def test_the_head_attends_to_the_opening_from_the_end_of_the_text(models):
    model = models(2)
    batch = model.task.batch(16, split="held_out", seed=0)
    openings = model.model.tokenizer.convert_tokens_to_ids(["('", '("'])
    head = own(model, "attn_q")[0] // 4
    for hooks in ([], ablation_hooks(model.index, model.kept, model.means.values)):
        with model.model.hooks(fwd_hooks=hooks):
            _, cache = model.model.run_with_cache(batch.tokens)
        pattern = cache["blocks.1.attn.hook_pattern"][range(32), head, batch.last]
        at_opening = (torch.isin(batch.tokens, torch.tensor(openings)) * pattern).sum(1)
        assert at_opening.mean() > 0.9
        assert at_opening.min() > 0.75


def test_the_query_is_constant_where_it_is_and_its_mean_is_no_stand_in(models):
    """Otherwise mean ablation would do nothing to it, and it were no node to be found."""
    model = models(3)
    (query,) = own(model, "attn_q")
    batch = model.task.batch(16, split="held_out", seed=0)
    _, cache = model.model.run_with_cache(batch.tokens)
    values = cache["blocks.1.attn.hook_q"].flatten(2)[..., query]
    assert set(values.unique().tolist()) == {0.0, QUERY}
    assert (values[range(32), batch.last] == QUERY).all()
    node = int(model.nodes.index[model.nodes["site"] == "attn_q"][0])
    assert 0 < model.means.values[node] < 0.15 * QUERY
    assert (model.edges["target_site"] != "attn_q").all()


def test_nobody_else_writes_to_the_circuits_channels_and_others_read_them(models):
    model = models(0)
    channels = {*own(model, "mlp_in"), *own(model, "mlp_out"), *own(model, "attn_out")}
    assert len(channels) == 5
    written = model.edges[model.edges["matrix"].isin(["W_out", "W_O"])]
    allowed = {(r.layer, r.matrix, r.source, r.target) for r in written.itertuples()}
    for layer in (0, 1):
        for matrix, source_site, _ in MATRICES:
            weight = input_major(model.model, layer, matrix)
            if matrix in ("W_out", "W_O"):
                for source, target in torch.nonzero(weight).tolist():
                    if target in channels:
                        assert (layer, matrix, source, target) in allowed
            else:
                assert source_site in ("attn_in", "mlp_in")
                assert (weight[sorted(channels)] != 0).sum() > 5
    assert (model.model.embed.W_E[:, own(model, "mlp_out")] == 0).all()


def test_the_distractors_are_active(models):
    model = models(0)
    batch = model.task.batch(32, split="train", seed=0)
    _, cache = model.model.run_with_cache(batch.tokens)
    for hook, piece in model.index.slices.items():
        varies = cache[hook].flatten(0, 1).flatten(1).std(0) > 0.01
        others = ~model.kept[piece]
        assert varies[others].float().mean() > 0.7, hook


def test_the_seed_decides_the_model_to_the_bit(models):
    again = ground_truth.quote_closing(distractors=27, seed=0)
    first = models(0)
    states = [m.model.state_dict() for m in (first, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(first.means.values, again.means.values)
    assert len({tuple(torch.nonzero(models(s).kept).flatten().tolist()) for s in SEEDS}) == 5


def test_a_run_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    ground_truth.quote_closing(distractors=27, seed=9)
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_are_many_and_the_splits_share_no_word(models):
    task = models(0).task
    train, held_out = (task.batch(256, split=split, seed=0) for split in ("train", "held_out"))
    for batch in (train, held_out):
        assert len(set(batch.prompts)) == 512
        assert batch.answers[:2] == ("')", '")')
        a, b = batch.prompts[:2]
        assert a.replace("('", '("') == b != a
    assert not set(WORDS["train"]) & set(WORDS["held_out"])
    assert task_logit_diffs(models(0).model, held_out).min() > 0


def test_more_distractors_hide_it_as_well():
    model = ground_truth.quote_closing()
    assert model.index.n_nodes == 1408
    keep = torch.stack([torch.ones_like(model.kept), model.kept])
    batch = model.task.batch(16, split="held_out", seed=1)
    assert masked_losses(model.model, batch, model.index, keep, model.means.values).max() < 0.05


@pytest.mark.parametrize("distractors", [0, 23, 28])
def test_distractors_that_do_not_fit_are_refused(distractors):
    with pytest.raises(ValueError, match=f"distractors={distractors} must be at least 27.*27, 59"):
        ground_truth.quote_closing(distractors=distractors)


def test_recovery_names_what_is_missing_and_what_is_extra(models):
    model = models(0)
    exact = ground_truth.recovery(model, model.kept)
    assert exact.exact
    assert str(exact) == "exactly the true nodes"
    other = model.kept.clone()
    first = model.nodes.iloc[0]
    other[model.nodes.index[0]] = False
    spare = int(torch.nonzero(~model.kept)[0])
    other[spare] = True
    found = ground_truth.recovery(model, other)
    assert not found.exact
    assert found.missing["role"].tolist() == [first["role"]]
    assert found.extra.index.tolist() == [spare]
    assert str(found) == f"1 missing: 0.mlp_in.{first['channel']}; 1 extra: 0.attn_in.{spare}"
    for changed in (model.kept & other, model.kept | other):
        assert not ground_truth.recovery(model, changed).exact
    with pytest.raises(ValueError, match="one entry for each of 704 nodes"):
        ground_truth.recovery(model, model.kept[1:])
