"""False circuits: each looks like the circuit, and each is told from it, by direct runs.

The suite itself is tested on them elsewhere; here are plain runs of the model, one question each.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from tl_sparse import ground_truth
from tl_sparse.ablation import ablation_hooks, frozen_norm_hooks
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ground_truth.false_circuits import without

NAMES = (
    "extra_nodes", "missing_backup", "cancelling_ablations", "repurposed_node",
    "uniform_attention", "norm_scale_cheat",
)  # fmt: skip


@cache
def all_of_them():
    return {false.name: false for false in ground_truth.false_circuits()}


@pytest.fixture(scope="module")
def falses():
    return all_of_them()


def logit_diffs(model, keep, hooks=()):
    """Margins of held-out prompts with all else at its mean, one mask after the other."""
    batch = model.task.batch(8, split="held_out", seed=2)
    rows = [
        task_logit_diffs(
            model.model, batch, [*hooks, *ablation_hooks(model.index, mask, model.means.values)]
        )
        for mask in keep
    ]
    return torch.stack(rows).detach()


def share(model, keep):
    """f of each mask."""
    whole = torch.ones_like(model.kept)
    means = logit_diffs(model, [whole, ~whole, *keep]).mean(1)
    return (means[2:] - means[1]) / (means[0] - means[1])


def effects(model, kept):
    """What each kept node's removal takes from the mean logit_diff."""
    nodes = torch.nonzero(model.kept if kept is None else kept).flatten()
    base = torch.ones_like(model.kept) if kept is None else kept
    alone = base.repeat(len(nodes), 1)
    alone[range(len(nodes)), nodes] = False
    return logit_diffs(model, [base]).mean() - logit_diffs(model, alone).mean(1)


def attention(model, kept):
    """How much of the last token's attention the circuit's head gives to the opening."""
    batch = model.task.batch(8, split="held_out", seed=2)
    openings = model.model.tokenizer.convert_tokens_to_ids(["('", '("'])
    ((layer, head),) = model.heads
    with model.model.hooks(fwd_hooks=ablation_hooks(model.index, kept, model.means.values)):
        _, cache = model.model.run_with_cache(batch.tokens)
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][range(16), head, batch.last]
    return (torch.isin(batch.tokens, torch.tensor(openings)) * pattern).sum(1)


def test_there_are_six_and_none_is_the_true_circuit(falses):
    assert tuple(falses) == NAMES
    for false in falses.values():
        assert not torch.equal(false.kept, false.truth.kept)
        assert not set(false.fools) & set(false.caught_by)


@pytest.mark.parametrize("name", NAMES)
def test_each_answers_as_the_whole_model_does(falses, name):
    false = falses[name]
    assert share(false.truth, [false.kept])[0] == pytest.approx(0.95, abs=0.06)
    assert F.softplus(-logit_diffs(false.truth, [false.kept])).mean() < 0.02
    circuit = false.circuit()
    assert circuit.loss < 0.02
    assert circuit.accuracy == 1.0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "missing_backup"])
def test_without_its_nodes_the_model_cannot_answer(falses, name):
    false = falses[name]
    assert share(false.truth, [~false.kept])[0].abs() < 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name != "extra_nodes"])
def test_nearly_all_of_its_nodes_are_needed_for_what_it_does(falses, name):
    false = falses[name]
    needed = effects(false.truth, false.kept) > 0.05  # a hundredth of the logit_diff
    assert needed.float().mean() > 0.9


def test_extra_nodes_can_go(falses):
    false = falses["extra_nodes"]
    found = effects(false.truth, false.kept) > 0.05
    assert found.float().mean() == pytest.approx(1 / 3)
    assert (false.kept & false.truth.kept).sum() == found.sum()


def test_without_the_one_head_its_backup_answers(falses):
    false = falses["missing_backup"]
    assert share(false.truth, [~false.kept])[0] > 0.85
    assert share(false.truth, [~false.truth.kept])[0].abs() < 0.01


def test_one_of_two_cancelling_writes_breaks_the_answer(falses):
    false = falses["cancelling_ablations"]
    model = false.truth
    by_neuron = without(model, parts={(0, "mlp")})
    by_head = without(model, parts={(1, "attn")})
    losses = F.softplus(-logit_diffs(model, [by_neuron, by_head, false.kept])).mean(1)
    assert (losses[:2] > 1).all()
    assert losses[2] < 0.02
    assert torch.equal(by_neuron & by_head, false.kept)


def test_the_repurposed_node_helps_in_the_model_and_hurts_in_the_circuit(falses):
    false = falses["repurposed_node"]
    model = false.truth
    role = model.nodes["role"].loc[torch.nonzero(false.kept).flatten().tolist()]
    inside = dict(zip(role, effects(model, false.kept), strict=True))
    whole = dict(zip(model.nodes["role"], effects(model, None), strict=True))
    flipped = [name for name in inside if inside[name] * whole[name] < 0]
    assert flipped == ["steered to single"]
    assert whole["steered to single"] > 0.1
    assert inside["steered to single"] < -0.1


def test_its_head_attends_to_all_tokens_alike(falses):
    false = falses["uniform_attention"]
    model = false.truth
    assert (attention(model, torch.ones_like(model.kept)) > 0.99).all()
    assert (attention(model, model.kept) > 0.99).all()
    last = model.task.batch(8, split="held_out", seed=2).last
    torch.testing.assert_close(attention(model, false.kept), 1 / (last + 1), atol=0.01, rtol=0)


def test_at_the_models_own_scale_the_whisper_is_no_answer(falses):
    false = falses["norm_scale_cheat"]
    model = false.truth
    batch = model.task.batch(8, split="held_out", seed=2)

    def whole(run, hooks):
        return task_logit_diffs(run, batch, hooks)

    held = frozen_norm_hooks(model.model, batch.tokens, whole)
    free, frozen = (logit_diffs(model, [false.kept], hooks) for hooks in ((), held))
    assert (free > 4).all()
    assert (frozen < 0.5).all()
    true = logit_diffs(model, [model.kept], held)
    torch.testing.assert_close(true, logit_diffs(model, [model.kept]), atol=0.1, rtol=0)


def test_models_must_all_be_there():
    with pytest.raises(ValueError, match="models lack averaging, backup"):
        ground_truth.false_circuits(models={})


def test_roles_and_parts_must_be_there(falses):
    model = falses["extra_nodes"].truth
    with pytest.raises(ValueError, match="no node of the circuit is 'reads the weather'"):
        without(model, {"reads the weather"})
    with pytest.raises(ValueError, match=r"no node of the circuit is \(3, 'mlp'\)"):
        without(model, parts={(3, "mlp")})
