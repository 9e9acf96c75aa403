import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import gated_ablation_hooks
from tl_sparse.ablation.logit_diff import PackedBatch, packed_logit_diffs, task_logit_diffs, trimmed
from tl_sparse.sites import SITE_NAMES, NodeIndex
from tl_sparse.tasks import TaskBatch


def batch_of(pairs, answers=(3, 4)):
    """A batch of prompts given as token ids."""
    rows = [ids for pair in pairs for ids in pair]
    longest = max(map(len, rows))
    answer = torch.tensor(answers).repeat(len(pairs))
    return TaskBatch(
        tokens=torch.stack([F.pad(torch.tensor(ids), (0, longest - len(ids))) for ids in rows]),
        last=torch.tensor([len(ids) - 1 for ids in rows]),
        correct_token=answer,
        incorrect_token=answer.view(-1, 2).flip(1).flatten(),
        prompts=tuple(" ".join(map(str, ids)) for ids in rows),
        answers=tuple(map(str, answer.tolist())),
    )


@pytest.fixture
def overlapping():
    """Pairs that share 1 to 9 tokens; of two each prompt is how the other begins; one is equal."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 30, (16,), generator=draw).tolist()
    pairs = []
    for shared in range(1, 10):
        head = [1, *ids[: shared - 1]]
        a, b = [6, *ids[5:]], [7, *ids[9:]]
        pairs.append((head + a[: 1 + shared % 3], head + b[: 1 + (shared + 1) % 3]))
    pairs += [([1, *ids[:4]], [1, *ids[:9]]), ([1, *ids[:7]], [1, *ids[:3]])]
    pairs.append(([1, *ids[:5]], [1, *ids[:5]]))
    return batch_of(pairs)


def test_trimming_drops_padding_only(marks):
    batch = marks.batch(16, split="train", seed=0)
    shortest = int(batch.last.min())
    rows = batch.last[::2].argmin()
    short = trimmed(batch.pairs(int(rows), int(rows) + 1))
    assert short.tokens.shape[1] == shortest + 1 < batch.tokens.shape[1]
    assert (short.tokens != marks.tokenizer.pad_token_id).all()
    assert torch.equal(trimmed(batch).tokens, batch.tokens)


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_margins_are_the_logit_differences_at_the_last_token(request, planted, marks, kind):
    model = planted(bigram_table="learned")[0]
    if kind == "dense":
        model = request.getfixturevalue("dense_planted")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    batch = marks.batch(5, split="train", seed=1)
    assert len(set(batch.last.tolist())) > 1
    logit_diffs = task_logit_diffs(model, batch)
    logits = model(batch.tokens, return_type="logits")
    for i in range(10):
        right, wrong = (3, 4) if i % 2 == 0 else (4, 3)
        last = logits[i, int(batch.last[i])]
        assert float(logit_diffs[i]) == pytest.approx(float(last[right] - last[wrong]), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# packed


def test_packed_prompts_give_the_same_logit_diffs(small_model, option, overlapping):
    """Whatever both members share; with every option of the architecture in turn."""
    model = small_model(option)
    packed = packed_logit_diffs(model, PackedBatch.of(overlapping), [])
    plain = task_logit_diffs(model, overlapping)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    assert plain[-2] == -plain[-1] != 0  # the same prompt with the answers swapped
    assert plain.std() > 1e-3


def test_packing_computes_what_is_shared_once(overlapping):
    batch = PackedBatch.of(overlapping)
    assert batch.lengths[-1] == 6  # of twice six tokens
    assert int(batch.lengths.sum()) < int((overlapping.last + 1).sum())


@pytest.mark.parametrize("option", ["plain", "together", "abstopk_resid", "attn_only", "no_norm"])
def test_packed_prompts_give_the_same_margins_under_masks(small_model, option, overlapping):
    """Gates between 0 and 1 at all ten sites, two masks with replacements of their own."""
    model = small_model(option)
    sites = tuple(name for name in SITE_NAMES if option != "attn_only" or name[:3] != "mlp")
    index = NodeIndex.of(model, sites)
    gates = (torch.rand(2, index.n_nodes) * 1.5).clamp(max=1)
    values = 0.1 * torch.randn(2, index.n_nodes)
    batch = PackedBatch.of(overlapping)
    twice = batch.rows(torch.arange(len(batch.lengths)).repeat(2))
    packed = packed_logit_diffs(model, twice, gated_ablation_hooks(index, gates, values)).view(
        2, -1
    )
    for mask in range(2):
        hooks = gated_ablation_hooks(index, gates[mask, None], values[mask, None])
        alone = task_logit_diffs(model, overlapping, hooks)
        torch.testing.assert_close(packed[mask], alone, atol=1e-5, rtol=1e-5)
    assert (packed[0] - packed[1]).abs().max() > 1e-3


def test_gradients_through_packed_prompts_are_the_same(small_model, overlapping):
    model = small_model("together")
    index = NodeIndex.of(model)
    values = 0.1 * torch.randn(1, index.n_nodes)
    gates = torch.rand(1, index.n_nodes, requires_grad=True)
    grads = []
    for packs in (True, False):
        hooks = gated_ablation_hooks(index, gates, values)
        if packs:
            logit_diffs = packed_logit_diffs(model, PackedBatch.of(overlapping), hooks)
        else:
            logit_diffs = task_logit_diffs(model, overlapping, hooks)
        grads += torch.autograd.grad(F.softplus(-logit_diffs).mean(), gates)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)
    assert grads[0].abs().max() > 1e-4


def test_rows_of_a_packed_batch_come_in_any_order_and_number(small_model, overlapping):
    model = small_model("standard")
    chosen = torch.tensor([4, 0, 11, 4])
    packed = packed_logit_diffs(model, PackedBatch.of(overlapping).rows(chosen), [])
    whole = task_logit_diffs(model, overlapping).view(-1, 2)
    torch.testing.assert_close(packed.view(-1, 2), whole[chosen], atol=1e-5, rtol=1e-5)
