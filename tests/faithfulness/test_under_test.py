from dataclasses import replace

import pytest
import torch

from tl_sparse.ablation import activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_of_channels, circuit_of_heads
from tl_sparse.circuits.pruning_run import selection_and_training
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.under_test import pruning_config_of


def test_no_test_prompt_was_seen_in_discovery(whole, chain):
    _, task, circuit = chain
    selection, training = selection_and_training(task, pruning_config_of(circuit))
    seen = set(selection.prompts) | set(training.prompts)
    assert len(whole.batch) == 16
    assert not seen & set(whole.batch.prompts)
    pairs = list(zip(whole.batch.prompts[::2], whole.batch.prompts[1::2], strict=True))
    assert len(set(pairs)) == len(pairs)


def test_a_task_without_fresh_prompts_is_refused(chain, random_tokens):
    from tl_sparse.tasks.task import Pair, StoredPairs

    model, task, circuit = chain
    pairs = tuple(
        Pair(prompts=(f"w{i} w5 w10", f"w{i} w6 w10"), answers=(" w3", " w4")) for i in (20, 21)
    )
    same = replace(task, make=StoredPairs(train=pairs, held_out=pairs))
    with pytest.raises(ValueError, match="none is left to test on"):
        under_test(model, circuit, same)


def test_circuits_of_other_models_and_tasks_are_refused(chain, planted):
    model, task, circuit = chain
    with pytest.raises(ValueError, match="not of 'other'"):
        under_test(model, circuit, replace(task, name="other"))
    with torch.no_grad():
        model.unembed.W_U.mul_(1.5)
    with pytest.raises(ValueError, match="belongs to another model"):
        under_test(model, circuit, task)


def test_margins_are_those_of_plain_runs_one_prompt_at_a_time(whole):
    model, batch = whole.model, whole.batch
    hooks = whole.circuit.hooks()
    for row in range(len(batch)):
        length = int(batch.last[row]) + 1
        tokens = batch.tokens[row : row + 1, :length]
        for fwd_hooks, found in ((hooks, whole.circuit_logit_diffs), ([], whole.model_logit_diffs)):
            logits = model.run_with_hooks(tokens, fwd_hooks=fwd_hooks)[0, -1]
            logit_diff = logits[batch.correct_token[row]] - logits[batch.incorrect_token[row]]
            assert float(logit_diff) == pytest.approx(float(found[row]), abs=1e-4)


def test_with_everything_removed_all_prompts_look_the_same(whole):
    logit_diffs = whole.empty_logit_diffs.view(-1, 2)
    assert torch.allclose(logit_diffs[:, 0], -logit_diffs[:, 1], atol=1e-5)


def less_one_edge(circuit):
    """The circuit without its last edge, whose target gets a constant instead."""
    return replace(
        circuit,
        edges=circuit.edges.iloc[:-1],
        removed_edges=circuit.edges.iloc[-1:].assign(constant=0.3),
    )


def test_the_circuit_alone_runs_without_its_removed_edges(chain, tested):
    model, task, circuit = chain
    pruned = less_one_edge(circuit)
    with_all, test = tested(model, task, circuit), tested(model, task, pruned)
    with pruned.applied(model), torch.no_grad():
        expected = task_logit_diffs(model, test.batch)
    assert torch.allclose(test.circuit_logit_diffs, expected, atol=1e-5)
    assert not torch.allclose(test.circuit_logit_diffs, with_all.circuit_logit_diffs, atol=1e-2)
    assert torch.equal(test.model_logit_diffs, with_all.model_logit_diffs)
    more = test.kept.clone()
    more[torch.nonzero(~more)[0]] = True
    both = test.logit_diffs(torch.stack([test.kept, more]))
    assert torch.allclose(both[0], test.circuit_logit_diffs, atol=1e-5)
    assert torch.allclose(both[1], with_all.logit_diffs(more[None])[0], atol=1e-5)


def test_a_head_is_kept_or_removed_whole(planted, marks, random_tokens):
    model, _ = planted()
    heads = circuit_of_heads(model, "marked", [(0, 0)], random_tokens)
    found = under_test(model, heads, marks, EvaluationConfig(pairs=4))
    assert found.n_components == 4
    assert found.kept_components.tolist() == [True, False, False, False]
    assert int(heads.kept.sum()) == model.config.d_head
    z = activation_means(model, random_tokens, index=heads.index).values
    by_hand = [
        (f"blocks.{layer}.attn.hook_z", replaced(z.view(2, 2, 4)[layer], keep))
        for layer, keep in ((0, [True, False]), (1, [False, False]))
    ]
    expected = task_logit_diffs(model, found.batch, by_hand)
    assert torch.allclose(found.circuit_logit_diffs, expected, atol=1e-5)


def replaced(values, keep):
    def hook(x, hook=None):
        x = x.clone()
        for head, kept in enumerate(keep):
            if not kept:
                x[:, :, head] = values[head]
        return x

    return hook


def test_features_of_any_hook_make_a_circuit(planted, marks, random_tokens):
    model, _ = planted()
    kept = {"blocks.1.mlp.hook_post": torch.arange(12) == 5}
    circuit = circuit_of_channels(model, "marked", kept, random_tokens)
    found = under_test(model, circuit, marks, EvaluationConfig(pairs=4))
    # neuron 5 is the chain's; without the other neurons the task is done
    assert bool((found.circuit_logit_diffs > 0).all())
    assert found.n_components == 12


def test_wrong_heads_hooks_and_groups_are_refused(planted, random_tokens):
    model, _ = planted()
    with pytest.raises(ValueError, match=r"head 0\.7: the model has layers 0 to 1 and"):
        circuit_of_heads(model, "t", [(0, 7)], random_tokens)
    with pytest.raises(ValueError, match="no hook 'nowhere'"):
        circuit_of_channels(model, "t", {"nowhere": torch.ones(3, dtype=torch.bool)}, random_tokens)
    with pytest.raises(ValueError, match="hook_z has 8 channels, not 4"):
        circuit_of_channels(model, "t", {"blocks.0.attn.hook_z": torch.ones(4) > 0}, random_tokens)
    half = {"blocks.0.attn.hook_z": torch.arange(8) < 2}
    group = {"blocks.0.attn.hook_z": torch.arange(8) // 4}
    with pytest.raises(ValueError, match="kept in part"):
        circuit_of_channels(model, "t", half, random_tokens, groups=group, d_head=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"checks": ("norms", "Z")}, "unknown checks Z; choose from attention_patterns"),
     ({"checks": ()}, "no checks"),
     ({"pairs": 0}, "pairs=0 must be at least 1")],
)  # fmt: skip
def test_configs_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)


@pytest.mark.parametrize(
    "config",
    [
        {"selection_pairs": 10**9}, {"steps": 10**12}, {"selection_pairs": "many"},
        {"edge_pruning": {"selection_pairs": 10**9}}, {"edge_pruning": [1]},
    ],
)  # fmt: skip
def test_a_config_that_would_hang_is_refused_at_once(chain, config):
    model, task, circuit = chain
    hostile = replace(circuit, config={**circuit.config, **config}, seed=0)
    with pytest.raises(ValueError, match="the circuit's config"):
        under_test(model, hostile, task)
