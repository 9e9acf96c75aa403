import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import ablation_hooks, activation_means, resample_sources
from tl_sparse.ablation.logit_diff import frozen_norms_of, task_logit_diffs
from tl_sparse.ablation.prompt_packing import pack
from tl_sparse.circuits.importance import NodeScores, ablated_logit_diffs, ablation_importance
from tl_sparse.sites import NodeIndex
from tl_sparse.tasks import TaskBatch

PROMPTS = [
    [1, 5, 6, 7, 8, 9, 10, 11],
    [1, 5, 6, 7, 12, 9, 10],  # shares four tokens with its partner
    [1, 5],
    [1, 5, 6, 7, 8, 9, 13, 14, 15],  # begins with all of its partner
    [1, 20, 21, 22, 23],
    [1, 24, 21, 22],
    [1, 14, 15, 16],
    [1, 14],
    [1, 9, 9, 9, 9, 9],
    [1, 9, 9, 9, 9, 10],
]
EVERY = ("embed", "attn_in", "attn_q", "attn_k", "attn_v", "attn_z", "attn_out", "mlp_in",
         "mlp_neuron", "mlp_out", "final_resid")  # fmt: skip


@pytest.fixture
def batch() -> TaskBatch:
    """Five pairs of prompts whose lengths and common starts differ."""
    longest = max(map(len, PROMPTS)) + 1  # a column of padding alone
    return TaskBatch(
        tokens=torch.tensor([row + [2] * (longest - len(row)) for row in PROMPTS]),
        last=torch.tensor([len(row) - 1 for row in PROMPTS]),
        correct_token=torch.tensor([3, 4] * 5),
        incorrect_token=torch.tensor([4, 3] * 5),
        prompts=tuple(map(str, PROMPTS)),
        answers=("w3", "w4") * 5,
    )


@torch.no_grad()
def one_by_one(model, batch, index, values, keep, nodes, hooks=()):
    found = []
    for node in nodes.tolist():
        without = keep.clone()
        without[node] = False
        removal = ablation_hooks(index, without, values)
        found.append(task_logit_diffs(model, batch, [*hooks, *removal]))
    return torch.stack(found)


def some_nodes(index, per_site=3):
    """A few nodes of every site."""
    generator = torch.Generator().manual_seed(5)
    return torch.cat(
        [
            piece.start + torch.randperm(piece.stop - piece.start, generator=generator)[:per_site]
            for piece in index.slices.values()
        ]
    )


def random_keep(index, share=0.7):
    return torch.rand(index.n_nodes, generator=torch.Generator().manual_seed(6)) < share


def test_packed_rows_hold_every_prompt_once(batch):
    rows = {}
    for packed in pack(batch, group=2):
        assert packed.real.any(0).all()  # no column is padding alone
        for row, pair in enumerate(packed.pairs.tolist()):
            for member in (0, 1):
                last = packed.last[row, member]
                seen = packed.mask[row, last]
                assert packed.real[row][seen].all()
                tokens = packed.tokens[row][seen].tolist()
                assert packed.positions[row][seen].tolist() == list(range(len(tokens)))
                rows[2 * pair + member] = tokens
            assert packed.real[row].sum() == (11, 9, 8, 4, 7)[pair]
    assert [rows[i] for i in range(len(PROMPTS))] == PROMPTS


def test_no_slot_sees_what_is_not_its_past(batch):
    for packed in pack(batch):
        place = packed.positions[:, None, :] <= packed.positions[:, :, None]
        assert (packed.mask <= place).all()
        seen = packed.mask.sum(2)
        assert torch.equal(seen[packed.real], packed.positions[packed.real] + 1)
        assert (seen[~packed.real] == 1).all()


def test_groups_have_at_least_one_pair(batch):
    with pytest.raises(ValueError, match="group=0"):
        next(pack(batch, group=0))


def test_removals_are_those_of_one_by_one_with_every_option(small_model, option, batch):
    """Inside a circuit, so that removed nodes lie on all sides of the one in question."""
    model = small_model(option, zeros=0.5)
    names = [name for name in EVERY if not (option == "attn_only" and name.startswith("mlp"))]
    tokens = torch.randint(3, 30, (8, 12), generator=torch.Generator().manual_seed(4))
    means = activation_means(model, tokens, sites=tuple(names))
    keep = random_keep(means.index)
    nodes = some_nodes(means.index, 2)
    nodes = nodes[keep[nodes]]
    base, logit_diffs = ablated_logit_diffs(
        model, batch, means.index, means.values, nodes=nodes, keep=keep, max_slots=300
    )
    expected = one_by_one(model, batch, means.index, means.values, keep, nodes)
    torch.testing.assert_close(logit_diffs, expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 1e-3  # something was at stake
    removal = ablation_hooks(means.index, keep, means.values)
    whole_logit_diffs = task_logit_diffs(model, batch, removal).detach()
    torch.testing.assert_close(base, whole_logit_diffs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def measured_model(small_model):
    """A model with everything of the paper's, half of its weights zero, and means of it."""
    model = small_model("together", zeros=0.5)
    tokens = torch.randint(3, 30, (8, 12), generator=torch.Generator().manual_seed(4))
    return model, activation_means(model, tokens)


def test_frozen_norms_are_held_in_partial_runs_too(measured_model, batch):
    model, means = measured_model
    index, nodes = means.index, some_nodes(means.index, 1)
    keep = random_keep(index)
    nodes = nodes[keep[nodes]]
    base, logit_diffs = ablated_logit_diffs(
        model, batch, index, means.values, nodes=nodes, keep=keep, freeze_norm=True
    )
    hooks = frozen_norms_of(model, batch)
    expected = one_by_one(model, batch, index, means.values, keep, nodes, hooks)
    torch.testing.assert_close(logit_diffs, expected, atol=1e-5, rtol=1e-5)
    free, _ = ablated_logit_diffs(model, batch, index, means.values, nodes=nodes[:1], keep=keep)
    assert (free - base).abs().max() > 1e-3


def test_nodes_that_have_their_value_anyway_are_not_run(measured_model, batch, monkeypatch):
    from tl_sparse.ablation.partial_forward import PartialForward

    model, means = measured_model
    with torch.no_grad():  # a neuron that nothing reads from the stream is the same everywhere
        model.blocks[0].mlp.W_in[:, 3] = 0
        model.blocks[0].mlp.W_in_pos[:, 3] = 0
        model.blocks[0].mlp.b_in[3] = -30.0
    values = means.values.clone()
    node = means.index.slices["blocks.0.mlp.hook_post"].start + 3
    values[node] = 0.0
    monkeypatch.setattr(PartialForward, "changed", lambda *_: pytest.fail("it was run"))
    base, logit_diffs = ablated_logit_diffs(
        model, batch, means.index, values, nodes=torch.tensor([node])
    )
    assert torch.equal(logit_diffs[0], base)


def test_importance_is_the_rise_of_the_loss(measured_model, batch):
    model, means = measured_model
    keep = random_keep(means.index)
    result = ablation_importance(model, batch, means.index, means.values, keep=keep, task="t")
    base, logit_diffs = ablated_logit_diffs(model, batch, means.index, means.values, keep=keep)
    expected = F.softplus(-logit_diffs).mean(1) - F.softplus(-base).mean()
    torch.testing.assert_close(result.scores[keep], expected)
    assert result.loss == pytest.approx(float(F.softplus(-base).mean()))
    assert (result.scores[~keep] == -torch.inf).all()
    assert len(result.order) == keep.sum()
    assert keep[result.order].all()
    frame = result.to_dataframe()
    assert len(frame) == keep.sum()
    assert frame["score"].is_monotonic_decreasing
    best = frame.iloc[0]
    piece = means.index.slices[best["hook"]]
    assert best["score"] == result.scores[piece.start + best["channel"]]
    assert best["score"] > 1e-3


def test_equal_scores_keep_the_order_of_the_index(measured_model):
    index = measured_model[1].index
    scores = torch.zeros(index.n_nodes)
    scores[7] = 1.0
    order = NodeScores(index, scores, "by hand", "", 0.0, 0.0).order
    assert order.tolist() == [7, *range(7), *range(8, index.n_nodes)]


def test_removed_nodes_can_be_resampled(measured_model, batch):
    model, means = measured_model
    tokens = torch.randint(3, 30, (len(batch), 12), generator=torch.Generator().manual_seed(8))
    donors = resample_sources(model, tokens)
    nodes = some_nodes(means.index, 1)
    keep = torch.ones(means.index.n_nodes, dtype=torch.bool)
    _, logit_diffs = ablated_logit_diffs(model, batch, means.index, donors, nodes=nodes)
    expected = one_by_one(model, batch, means.index, donors, keep, nodes)
    torch.testing.assert_close(logit_diffs, expected, atol=1e-5, rtol=1e-5)


def test_models_of_transformer_lens_are_measured(dense_model, batch):
    tokens = torch.randint(3, 30, (8, 12), generator=torch.Generator().manual_seed(4))
    means = activation_means(dense_model, tokens)
    nodes = some_nodes(means.index, 1)
    keep = random_keep(means.index)
    nodes = nodes[keep[nodes]]
    _, logit_diffs = ablated_logit_diffs(
        dense_model, batch, means.index, means.values, nodes=nodes, keep=keep
    )
    expected = one_by_one(dense_model, batch, means.index, means.values, keep, nodes)
    torch.testing.assert_close(logit_diffs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switch", ["use_split_qkv_input", "use_attn_in", "use_hook_mlp_in",
                                    "use_attn_result"])  # fmt: skip
def test_switches_of_transformer_lens_change_nothing(small_model, batch, switch):
    model = small_model("concat")
    tokens = torch.randint(3, 30, (8, 12), generator=torch.Generator().manual_seed(4))
    means = activation_means(model, tokens)
    nodes = some_nodes(means.index, 1)
    _, off = ablated_logit_diffs(model, batch, means.index, means.values, nodes=nodes)
    getattr(model, f"set_{switch}")(True)
    _, on = ablated_logit_diffs(model, batch, means.index, means.values, nodes=nodes)
    torch.testing.assert_close(on, off, atol=1e-5, rtol=1e-5)


def test_bad_requests_are_refused(measured_model, batch):
    model, means = measured_model
    index, values = means.index, means.values
    keep = torch.ones(index.n_nodes, dtype=torch.bool)
    keep[3] = False
    with pytest.raises(ValueError, match="only nodes that are kept"):
        ablated_logit_diffs(model, batch, index, values, nodes=torch.tensor([3]), keep=keep)
    with pytest.raises(ValueError, match="one entry for each of"):
        ablated_logit_diffs(model, batch, index, values[:-1], keep=keep[:-1])
    none, nothing = ablated_logit_diffs(
        model, batch, index, values, nodes=torch.zeros(0, dtype=torch.int64)
    )
    assert nothing.shape == (0, len(none))


@pytest.mark.parametrize("before", ["hook_embed", "hook_pos_embed"])
def test_removals_at_any_hooks_are_those_of_one_by_one(small_model, batch, before):
    """Hooks of several layers, in and between the sites of the table, and before the blocks."""
    model = small_model("standard", zeros=0.5)
    tokens = torch.randint(3, 30, (8, 12), generator=torch.Generator().manual_seed(4))
    hooks = ("blocks.1.mlp.hook_pre", "blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", before)
    index = NodeIndex.over(model, dict(zip(hooks, (24, 16, 16, 16), strict=True)))
    values = activation_means(model, tokens, index=index).values
    nodes, keep = some_nodes(index, 2), torch.ones(index.n_nodes, dtype=torch.bool)
    base, logit_diffs = ablated_logit_diffs(model, batch, index, values, nodes=nodes)
    expected = one_by_one(model, batch, index, values, keep, nodes)
    torch.testing.assert_close(logit_diffs, expected, atol=1e-5, rtol=1e-5)
    assert ((expected - base).abs().amax(1) > 1e-5).sum() >= len(hooks)
