"""What is no part of a circuit and is not silent either breaks true circuits under other tests."""

import pytest
import torch
import torch.nn.functional as F

from tl_sparse import ground_truth
from tl_sparse.circuits import PruningConfig
from tl_sparse.faithfulness import EvaluationConfig, under_test
from tl_sparse.faithfulness.attention import head_patterns
from tl_sparse.faithfulness.checks.partial_ablation import attacked
from tl_sparse.faithfulness.registry import HALF_OF_CHANCE
from tl_sparse.faithfulness.ways_to_ablate import ablations


@pytest.fixture(scope="module")
def busy():
    model = ground_truth.bystanders()
    few = PruningConfig(steps=4, batch_pairs=8, selection_pairs=8, report_pairs=8)
    config = EvaluationConfig(pairs=12, attack_steps=30, attack_pairs=8)
    return under_test(model.model, model.circuit(config=few), model.task, config, model.text[:64])


def loss(busy, values):
    return float(busy.losses(busy.kept[None], values).mean())


def test_the_circuit_does_the_task_and_nothing_else_does(busy):
    assert float(F.softplus(-busy.circuit_logit_diffs).mean()) < 0.02
    assert float((~busy.kept).sum()) > 500
    rest = busy.logit_diffs(~busy.kept[None])[0]
    assert float(rest.mean()) < 0.05 * float(busy.model_logit_diffs.mean())


def test_text_drowns_it_and_other_prompts_of_the_task_do_not(busy):
    ways = ablations(busy, [])
    assert loss(busy, ways["resample"](busy.batch)) > 2 * HALF_OF_CHANCE
    for name in ("other_answer", "other_prompt", "mean", "task_mean", "zero", "positional_mean"):
        assert loss(busy, ways[name](busy.batch)) < 0.1


def test_an_adversary_without_a_limit_breaks_it_by_one_answer_for_all(busy):
    kept = busy.kept_components[None]
    free, limited = (attacked(busy, kept, 2, some) for some in (False, True))
    assert float(free.losses) > 2 * HALF_OF_CHANCE
    assert float(limited.losses) < HALF_OF_CHANCE / 2
    gates = torch.where(busy.kept, 1.0, free.ablation_masks[0][busy.component])[None]
    first, second = busy.logit_diffs(gates)[0].view(-1, 2).T
    assert bool((first + second > 5).all())  # the two prompts of each pair are still told apart
    assert float((first - second).abs().min()) > 2


def test_its_head_attends_elsewhere_only_where_it_does_not_matter(busy):
    found = head_patterns(busy)
    assert found.heads[["layer", "head"]].drop_duplicates().shape[0] == 1
    assert float(found.js.mean() / found.uniform.mean()) > 0.5
    assert float(found.js_felt.mean() / found.uniform_felt.mean()) < 0.01
