"""``prune_many``: every job is as if it were alone, whatever it shares a forward pass with."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tl_sparse.ablation import activation_means, resample_sources
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import Circuit, PruningConfig, PruningFailed, prune, prune_many, pruning
from tl_sparse.circuits.mask_training import TrainingPool, train_masks
from tl_sparse.circuits.pruning_run import set_up, set_up_many
from tl_sparse.config import ActivationDensity
from tl_sparse.tasks import Task, task

SEARCH = PruningConfig(
    headroom=0.0, steps=24, batch_pairs=8, selection_pairs=16, report_pairs=8, lr=0.06
)


def named(circuit):
    return set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))


@pytest.fixture
def late(words):
    """Longer prompts than those of the other task, with less in common at their start."""

    @task(answers=(" w3", " w4"), source="test")
    def late_marks(rng, split):
        """Whether w5 or w6 comes first."""
        low, high = (20, 25) if split == "train" else (25, 30)
        filler = " ".join(f"w{rng.randrange(low, high)}" for _ in range(rng.randint(7, 8)))
        return f"w5 {filler} w10", f"w6 {filler} w10"

    return Task.bind(late_marks, words, max_tokens=12)


@pytest.fixture
def jobs(marks, late):
    """Seeds, prices, targets, tasks of different lengths, optimizers: all in one group."""
    return [
        (marks, SEARCH),
        (late, replace(SEARCH, seed=3)),
        (marks, replace(SEARCH, l0_penalty=0.5, penalty="fixed", target_loss=0.3)),
        (late, replace(SEARCH, lr=0.1, beta1=0.5, beta2=0.9, weight_decay=0.05, temperature=0.6)),
        (marks, replace(SEARCH, seed=1, warmup_frac=0.3, init_bias=0.2, init_scale=0.1)),
        (marks, replace(SEARCH, ablation="zero", adapt_rate=0.2, target_loss=0.5)),
    ]


def test_one_job_is_prune_to_the_bit(planted, marks, random_tokens):
    model, _ = planted()
    means = activation_means(model, random_tokens)
    (many,) = prune_many(model, [(marks, SEARCH)], means=means, progress=False)
    alone = prune(model, marks, SEARCH, means=means, progress=False)
    for name in ("kept", "tau", "losses", "losses_calibrated"):
        assert torch.equal(getattr(many, name), getattr(alone, name))
    assert many.size_curve.equals(alone.size_curve)


@pytest.mark.parametrize("kind", ["ours", "abstopk", "dense"])
def test_masks_trained_together_are_those_trained_alone(
    request, planted, jobs, random_tokens, kind
):
    if kind == "dense":
        model = request.getfixturevalue("dense_planted")[0]
    else:
        density = ActivationDensity.paper(0.5 if kind == "abstopk" else 1.0)
        model = planted(activation_density=density)[0]
    means = activation_means(model, random_tokens)
    jobs = [(task, replace(config, steps=5)) for task, config in jobs]
    runs = set_up_many(model, jobs, means, None, None)
    assert len({int(p.train.last.max()) for p in runs}) > 1
    together = train_masks(runs, progress=False)
    for row, run in enumerate(runs):
        alone = train_masks([run], progress=False)
        assert len(alone) == len(together) == 5
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], atol=1e-4, rtol=0)
    last = together[-1]
    assert (last[:, None] - last[None]).abs().amax(2)[~torch.eye(6, dtype=torch.bool)].min() > 1e-3


@pytest.mark.parametrize("max_rows", [1, 40])
def test_every_job_finds_what_it_would_find_alone(planted, jobs, random_tokens, max_rows):
    """Six at a time, two or one: the same circuits, in the order of the jobs."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    chosen = [jobs[i] for i in (1, 0, 4)]
    found = prune_many(model, chosen, means=means, max_rows=max_rows, progress=False)
    for circuit, (job_task, config) in zip(found, chosen, strict=True):
        assert named(circuit) == chain
        assert circuit.task == job_task.name
        assert circuit.config["seed"] == circuit.seed == config.seed
        assert circuit.target_loss == config.target_loss
        alone = prune(model, job_task, config, means=means, progress=False)
        assert torch.equal(circuit.kept, alone.kept)
        torch.testing.assert_close(circuit.losses, alone.losses, atol=1e-5, rtol=1e-5)


def test_a_job_that_fails_takes_no_other_with_it(planted, marks, late, random_tokens):
    """Also across groups; failures stand in the places of their jobs."""
    model, chain = planted()
    means = activation_means(model, random_tokens)
    hopeless = replace(SEARCH, penalty="fixed", l0_penalty=100.0, lr=0.3, on_collapse="fail")
    configs = [hopeless, SEARCH, replace(hopeless, steps=3), replace(SEARCH, batch_pairs=7)]
    jobs = [(task, config) for config, task in zip(configs, [marks, late] * 2, strict=True)]
    found = prune_many(model, jobs, means=means, progress=False)
    assert [type(x) for x in found] == [PruningFailed, Circuit, PruningFailed, Circuit]
    assert [x.task for x in found if isinstance(x, Circuit)] == ["late_marks", "late_marks"]
    assert all(named(x) == chain for x in found if isinstance(x, Circuit))
    assert all(math.isfinite(x.loss) and x.loss > 0.15 for x in found[::2])


def test_a_target_missed_by_rounding_fails_that_job_alone(
    planted, marks, random_tokens, monkeypatch
):
    """Losses a hair's breadth below the target do not count, at any stage of the search."""
    model, _ = planted()
    means = activation_means(model, random_tokens)
    close = replace(SEARCH, steps=1, target_loss=0.2, on_collapse="fail")

    def nearly(model, batch, index, keep, values, *, hooks=(), max_rows=0):
        return torch.full((len(keep),), 0.2 - 5e-7)

    monkeypatch.setattr("tl_sparse.circuits.pruning_run.masked_losses", nearly)
    (found,) = prune_many(model, [(marks, close)], means=means, progress=False)
    assert isinstance(found, PruningFailed)
    assert "none of its 1 checkpoints" in str(found)


def test_a_job_that_cannot_be_posed_is_told_before_any_training(
    planted, marks, random_tokens, monkeypatch
):
    model, _ = planted()
    means = activation_means(model, random_tokens, sites=("attn_in", "attn_v"))
    monkeypatch.setattr(pruning, "train_masks", None)
    for change, message in (
        ({"target_loss": 1e-5}, "above the target 1e-05: it does not solve the task"),
        ({"tie_qk": True}, "needs both sites attn_q and attn_k"),
        ({"ablation": "resample"}, "give both or neither"),
    ):
        jobs = [(marks, SEARCH), (marks, replace(SEARCH, **change))]
        with pytest.raises(ValueError, match=message):
            prune_many(model, jobs, means=means, progress=False)


def test_no_jobs_have_no_results(planted, random_tokens):
    model, _ = planted()
    assert prune_many(model, [], means=activation_means(model, random_tokens)) == []


def test_the_time_of_a_training_is_shared_out(planted, marks, random_tokens, monkeypatch):
    """By a clock that counts its own readings."""
    ticks = iter(range(1000))
    monkeypatch.setattr(pruning.time, "perf_counter", lambda: float(next(ticks)))
    model, _ = planted()
    means = activation_means(model, random_tokens)
    jobs = [
        (marks, replace(SEARCH, steps=1, l0_penalty=price)) for price in (1e-3, 2e-3, 4e-3, 5e-3)
    ]
    found = prune_many(model, jobs, means=means, progress=False)
    # a quarter of the training's one tick, and one of its own
    assert [circuit.seconds for circuit in found] == [1.25] * 4


# --------------------------------------------------------------------------------------------------
# what jobs share


def test_tasks_with_the_same_prompts_and_other_answers_keep_theirs(planted, marks, random_tokens):
    model, _ = planted()
    first = set_up(model, marks, SEARCH, means=activation_means(model, random_tokens))
    train = first.train
    swapped = replace(
        train,
        correct_token=train.incorrect_token,
        incorrect_token=train.correct_token,
        answers=train.answers[::-1],
    )
    both = [first, replace(first, train=swapped)]
    pool = TrainingPool(both)
    losses = pool.losses(2, torch.ones(2, first.index.n_nodes))
    logit_diffs = task_logit_diffs(model, train.pairs(16, 24))
    expected = [F.softplus(-logit_diffs).mean(), F.softplus(logit_diffs).mean()]
    torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_every_step_takes_the_next_pairs(request, planted, marks, late, random_tokens, kind):
    """Of each task its own, and round again at the end."""
    model = planted()[0] if kind == "ours" else request.getfixturevalue("dense_planted")[0]
    means = activation_means(model, random_tokens)
    configs = [replace(SEARCH, steps=3), replace(SEARCH, steps=3, seed=1)]
    runs = set_up_many(model, list(zip([marks, late], configs, strict=True)), means, None, None)
    pool = TrainingPool(runs)
    assert [len(p.train) for p in runs] == [48, 48]
    for step, first in ((0, 0), (1, 8), (2, 16), (3, 24 % 17)):
        losses = pool.losses(step, torch.ones(2, means.index.n_nodes))
        expected = [
            F.softplus(-task_logit_diffs(model, p.train.pairs(first, first + 8))).mean()
            for p in runs
        ]
        torch.testing.assert_close(losses, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_jobs_that_resample_are_those_alone_too(planted, marks, random_tokens):
    """Other seeds draw other donors."""
    model, _ = planted()
    means = activation_means(model, random_tokens)
    donors = resample_sources(model, random_tokens)
    config = replace(SEARCH, ablation="resample", steps=4, refine=False, target_loss=0.5)
    configs = [config, replace(config, l0_penalty=5e-3), replace(config, seed=2)]
    jobs = [(marks, config) for config in configs]
    found = prune_many(model, jobs, means=means, sources=donors, progress=False)
    for circuit, (_, config) in zip(found, jobs, strict=True):
        alone = prune(model, marks, config, means=means, sources=donors, progress=False)
        torch.testing.assert_close(circuit.tau, alone.tau, atol=1e-4, rtol=0)
        assert torch.equal(circuit.kept, alone.kept)
