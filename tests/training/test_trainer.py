"""The trainer: what a step does, exact budgets, and runs that go on to the bit after any stop."""

import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.worker import DyingInSave, DyingTrainer, exit_codes
from tl_sparse import (
    ActivationDensity,
    SparseTransformer,
    SparseTransformerConfig,
    SparsityConfig,
    Trainer,
    TrainingConfig,
    TrainingResult,
    WeightMasks,
    WeightProjector,
    progress,
)
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.data import CorpusConfig, TokenizedCorpus, bigram_log_probs, build_corpus
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import l0
from tl_sparse.storage.finite import NotFinite
from tl_sparse.training.train_step import apply_gradient_rule, training_starts

STEPS, HALF = 12, 6
SPARSITY = SparsityConfig(
    density=1 / 4, floor=2, embedding_floor=2, anneal_end=0.5, lr_factor="unnormalised"
)
TINY = TrainingConfig(
    steps=STEPS, batch_size=8, lr=0.01, warmup=0.1, sparsity=SPARSITY,
    eval_every=4, eval_sequences=16, log_every=2, save_every=3,
)  # fmt: skip


def python_text(rng):
    """A small Python file."""
    names = ["total", "items", "row", "node", "count", "text", "path", "left", "right", "key"]
    lines = []
    for _ in range(30):
        a, b, c = rng.sample(names, 3)
        n = rng.randrange(100)
        lines += rng.choice(
            [
                [f"def {a}_{n}({b}, {c}):", f"    return {b} + {c} * {n}", ""],
                [f"for {a} in {b}:", f"    print({a}, {n})", ""],
                [f"{a} = [{n}, {n + 1}, {n * 2}]"],
                [f"if {a} > {n}:", f"    {b} = {c}[{a}]"],
            ]
        )
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(0)
    for i in range(40):
        (folder / f"file_{i}.py").write_text(python_text(rng), encoding="utf-8")
    config = CorpusConfig(
        sources=(str(folder),), vocab_size=400, idiom_share=0.1, validation_share=0.3,
        near_duplicate_threshold=1.0,
    )  # fmt: skip
    return build_corpus(config, tmp_path_factory.mktemp("corpus"), progress=False)


def architecture(corpus, **changes):
    sizes = {
        "n_layers": 2, "d_model": 16, "d_head": 4, "d_mlp": 32, "n_ctx": 16,
        "d_vocab": len(corpus.tokenizer), "activation_density": ActivationDensity.paper(0.5),
    }  # fmt: skip
    return SparseTransformerConfig(**(sizes | changes))


def new_model(corpus, **changes):
    return SparseTransformer(architecture(corpus, **changes), corpus.tokenizer)


def new_trainer(corpus, config=TINY, folder=None, *, kind=Trainer, **changes):
    return kind(new_model(corpus, **changes), corpus, config, folder, progress=False)


class Interrupted(Trainer):
    """Ctrl-C arrives in the middle of a step: between the optimiser's update and the projection."""

    at = HALF

    def train_step(self, model):
        handle = None
        if self.step + 1 == self.at:
            handle = self.optimizer.register_step_post_hook(
                lambda *_: os.kill(os.getpid(), signal.SIGINT)
            )
        loss = super().train_step(model)
        if handle is not None:
            handle.remove()
        return loss


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, even where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def straight(corpus, tmp_path_factory):
    """An uninterrupted run: its folder and its result."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, new_trainer(corpus, folder=folder).train()


def final_state(folder):
    """Weights, optimiser state and metrics with which a run ended."""
    (checkpoint,) = folder.glob("checkpoint-*")
    weights = (checkpoint / "model" / "model.safetensors").read_bytes()
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return checkpoint.name, weights, moments, (folder / "metrics.jsonl").read_text()


def assert_same_run(folder, other):
    name, weights, moments, metrics = final_state(folder)
    other_name, other_weights, other_moments, other_metrics = final_state(other)
    assert (name, metrics) == (other_name, other_metrics)
    assert weights == other_weights
    assert moments["param_groups"] == other_moments["param_groups"]
    assert moments["state"].keys() == other_moments["state"].keys()
    for index, state in moments["state"].items():
        for key, value in state.items():
            assert torch.equal(value, other_moments["state"][index][key])


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------
# a run


def test_loss_falls_and_the_budgets_are_exact_at_the_end(corpus):
    config = replace(TINY, steps=60, eval_every=20, log_every=10, lr=0.02, batch_size=16)
    trainer = new_trainer(corpus, config)
    start = trainer.validation_loss()
    result = trainer.train()
    assert isinstance(result, TrainingResult)
    assert start == pytest.approx(math.log(len(corpus.tokenizer)), rel=0.05)  # knows nothing yet
    assert result.validation_loss < start - 1
    assert result.validation_loss == trainer.validation_loss()
    expected = {m.name: int(m.numel / 4) for m in weight_matrices(trainer.model)}
    assert l0(weight_matrices(trainer.model)) == expected == result.record.l0
    for block in trainer.model.blocks:
        assert (block.mlp.W_in != 0).sum(0).min() >= 2
        assert (block.attn.W_O != 0).sum(2).min() >= 2


def test_metrics_follow_the_schedules(straight):
    _, result = straight
    table = result.to_dataframe()
    assert list(table["step"]) == [2, 4, 6, 8, 10, 12]
    assert list(table["validation_loss"].notna()) == [False, True, False, True, False, True]
    for row in table.itertuples():
        assert row.tokens == row.step * 8 * 16
        assert row.lr == TINY.lr_at(row.step - 1)
        assert row.density == SPARSITY.density_at(row.step, STEPS)
    matrices = sum(result.record.l0.values())
    first, second, *later = table["l0"]
    assert first > second > matrices
    assert later == [matrices] * 4
    assert result.record.validation_loss == result.validation_loss
    assert "<table" in result._repr_html_()


def test_saved_model_and_record_are_those_of_the_run(straight, corpus):
    folder, result = straight
    model = SparseTransformer.from_pretrained(folder / "model")
    record = training_record(folder / "model")
    assert record.l0 == l0(weight_matrices(model)) == result.record.l0
    assert (record.steps, record.tokens, record.corpus) == (12, 12 * 8 * 16, corpus.fingerprint)
    assert record.config["seed"] == 0
    assert record.validation_loss == result.validation_loss


def test_l0_is_asserted_on_save(corpus, tmp_path):
    trainer = new_trainer(corpus, folder=tmp_path)
    trainer.train()
    with torch.no_grad():
        w = trainer.model.blocks[1].mlp.W_in
        w[tuple((w == 0).nonzero()[0])] = 1.0
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.W_in has 129 .* budget is 128"):
        trainer.save_checkpoint()
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="budget is 128"):
        trainer.record()
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_a_dense_model_trains_by_the_same_code(corpus, tmp_path):
    trainer = new_trainer(
        corpus, replace(TINY, sparsity=None), tmp_path, activation_density=ActivationDensity()
    )
    start = trainer.validation_loss()
    result = trainer.train()
    assert result.validation_loss < start
    assert set(result.metrics["density"]) == {1.0}
    model = SparseTransformer.from_pretrained(tmp_path / "model")
    assert l0(weight_matrices(model)) == {m.name: m.numel for m in weight_matrices(model)}


@pytest.mark.parametrize(
    "changes",
    [
        {"positional_embedding_type": "concat", "d_pos": 8},
        {"positional_embedding_type": "standard", "tie_word_embeddings": True},
        {"bigram_table": "frozen", "use_attention_sinks": True, "normalization_type": "LN"},
    ],
)
def test_every_architecture_ends_with_exact_budgets_and_can_be_loaded(corpus, tmp_path, changes):
    config = replace(TINY, steps=4)
    result = new_trainer(corpus, config, tmp_path, **changes).train()
    matrices = weight_matrices(SparseTransformer.from_pretrained(tmp_path / "model"))
    assert l0(matrices) == result.record.l0 == {m.name: m.numel // 4 for m in matrices}


def test_sparse_biases_are_within_their_budgets_and_saved(corpus, tmp_path):
    sparsity = replace(SPARSITY, sparse_biases=True, embedding_density=1 / 2,
                       embedding_schedule="window")  # fmt: skip
    result = new_trainer(corpus, replace(TINY, sparsity=sparsity), tmp_path).train()
    model = SparseTransformer.from_pretrained(tmp_path / "model")
    assert result.record.l0["blocks.0.mlp.b_in"] == 16
    assert int(model.blocks[0].mlp.b_in.count_nonzero()) == 16
    assert int(model.W_E.count_nonzero()) == model.W_E.numel() // 2


def test_window_densities_that_round_badly_still_end_on_the_budget(corpus):
    # 0.2 * 0.7 / 0.2 is just below 0.7 in floating point
    sparsity = replace(SPARSITY, density=0.2, embedding_density=0.7, embedding_schedule="window")
    result = new_trainer(corpus, replace(TINY, steps=4, sparsity=sparsity)).train()
    assert result.record.l0["embed.W_E"] == int(0.7 * len(corpus.tokenizer) * 16)


def test_bf16_keeps_fp32_weights_and_exact_budgets(corpus):
    trainer = new_trainer(corpus, replace(TINY, steps=4, precision="bf16"))
    result = trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert result.record.l0["blocks.0.mlp.W_in"] == 128
    other = new_trainer(corpus, replace(TINY, steps=4)).train()
    assert result.validation_loss != other.validation_loss
    assert result.validation_loss == pytest.approx(other.validation_loss, rel=0.01)


def test_stop_at_loss_stops_at_the_first_validation_loss_that_low(corpus, tmp_path):
    full = new_trainer(corpus, replace(TINY, sparsity=None, eval_every=2)).train().metrics
    goal = float(full["validation_loss"].iloc[2])
    config = replace(TINY, sparsity=None, eval_every=2, stop_at_loss=goal)
    result = new_trainer(corpus, config, tmp_path).train()
    assert result.record.steps == 6
    assert result.validation_loss == goal
    again = new_trainer(corpus, config, tmp_path).train()  # and stays there
    assert again.record == result.record
    early = replace(TINY, stop_at_loss=100.0, eval_every=2)  # a sparse model anneals first
    assert new_trainer(corpus, early).train().record.steps == HALF


def test_same_seed_same_bits_other_seed_other_batches(corpus):
    first, second = new_trainer(corpus), new_trainer(corpus)
    other = new_trainer(corpus, replace(TINY, seed=1))
    assert torch.equal(first.batch(3), second.batch(3))
    assert not torch.equal(first.batch(3), first.batch(4))
    assert not torch.equal(first.batch(3), other.batch(3))


# ------------------------------------------------------------------------------------------------
# data


def test_batches_are_windows_of_the_training_stream_after_bos(corpus):
    trainer = new_trainer(corpus)
    batch = trainer.batch(0).numpy()
    assert batch.shape == (8, 16)
    assert (batch[:, 0] == corpus.tokenizer.bos_token_id).all()
    stream = np.lib.stride_tricks.sliding_window_view(np.asarray(corpus.train), 15)
    for row in batch[:, 1:]:
        assert (stream == row).all(1).any()


def test_every_window_of_the_training_stream_can_be_drawn_and_none_beyond_it():
    drawn = training_starts(seed=0, step=0, batch_size=200, tokens=20, context=16)
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}


def test_training_reads_nothing_of_the_validation_split(corpus):
    poisoned = replace(corpus, validation=np.full(500, 7, dtype=np.uint16))
    runs = [new_trainer(c, replace(TINY, steps=4)) for c in (corpus, poisoned)]
    results = [run.train() for run in runs]
    assert results[0].validation_loss != results[1].validation_loss
    for (name, a), b in zip(
        runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_validation_takes_the_same_evenly_spaced_windows_every_time(corpus):
    trainer = new_trainer(corpus)
    assert trainer.validation_loss() == trainer.validation_loss()
    tokens = corpus.validation
    starts = np.linspace(0, len(tokens) - 16, 16).astype(int)
    windows = np.stack([tokens[s : s + 16] for s in starts]).astype(np.int64)
    windows[:, 0] = corpus.tokenizer.bos_token_id
    with torch.no_grad():
        logits = trainer.model(torch.from_numpy(windows))
    targets = torch.from_numpy(windows[:, 1:])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    assert trainer.validation_loss() == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# a step


def gradient_rms(parameters):
    grads = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    return float(grads.square().mean().sqrt())


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_gradient_rules(size):
    def gradients(rule):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(30, 40), (50,), (8,)]]
        for p in parameters[:2]:  # the third has no gradient
            p.grad = size * torch.randn(p.shape, generator=generator)
        before = gradient_rms(parameters)
        apply_gradient_rule(parameters, rule)
        return before, gradient_rms(parameters)

    # 1e-5 is added to the RMS, so that of 1e-3 becomes 1/1.01
    assert gradients("normalise")[1] == pytest.approx(1.0, rel=0.011 if size < 1 else 1e-4)
    before, after = gradients("clip")
    assert after == pytest.approx(min(before, 1.0), rel=1e-4)
    before, after = gradients("none")
    assert after == before


@pytest.mark.parametrize("rule", ["normalise", "clip", "none"])
def test_the_optimiser_sees_gradients_after_their_rule(corpus, rule):
    trainer = new_trainer(corpus, replace(TINY, steps=2, gradient=rule, lr=1e-5))
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(gradient_rms(trainer.model.parameters()))
    )
    trainer.train()
    if rule == "normalise":
        assert seen == pytest.approx([1.0, 1.0], abs=0.02)
    else:  # at these sizes gradients are far below 1: neither rule changes them
        assert max(seen) < 0.1


def test_gradients_and_moments_are_not_masked(corpus):
    trainer = new_trainer(corpus)
    trainer.train()
    w = trainer.model.blocks[0].mlp.W_in
    moment = trainer.optimizer.state[w]["exp_avg"]
    assert float((moment[w == 0] != 0).float().mean()) > 0.9


def test_two_halves_of_a_batch_give_the_step_of_the_whole_batch(corpus):
    def run(accumulation):
        # eps 1 and plain gradients: else the size of the gradient would cancel
        config = replace(
            TINY,
            steps=4,
            accumulation=accumulation,
            sparsity=None,
            gradient="none",
            eps=1.0,
            lr=1.0,
        )
        return new_trainer(corpus, config).train().metrics

    once, twice = run(1), run(2)
    assert np.allclose(once["loss"], twice["loss"], rtol=1e-5)
    assert np.allclose(once["validation_loss"].dropna(), twice["validation_loss"].dropna(),
                       rtol=1e-5)  # fmt: skip


def one_step(corpus, **changes):
    """A model after its first step, and what it was before."""
    config = replace(TINY, steps=5, warmup=0.0, sparsity=None, **changes)
    trainer = new_trainer(corpus, config)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train_step(trainer.model)
    return before, dict(trainer.model.named_parameters())


def test_weight_decay_before_or_after_the_projection(corpus):
    _, plain = one_step(corpus, weight_decay=0.0)
    start, first = one_step(corpus, weight_decay=0.5)
    _, last = one_step(corpus, weight_decay=0.5, decay_after_projection=True)
    lr = TINY.lr
    for name in plain:
        if ".W_" in name:
            # AdamW shrinks the old weight, decay after the projection the new one
            assert torch.allclose(first[name], plain[name] - lr * 0.5 * start[name], atol=1e-7)
            assert torch.allclose(last[name], plain[name] * (1 - lr * 0.5), atol=1e-7)
            assert not torch.equal(first[name], last[name])
        else:
            assert torch.equal(first[name], plain[name]), name
            assert torch.equal(last[name], plain[name]), name


def test_decay_after_projection_keeps_the_budgets(corpus):
    result = new_trainer(corpus, replace(TINY, decay_after_projection=True)).train()
    assert result.record.l0["blocks.0.attn.W_Q"] == 64


def test_a_frozen_bigram_table_is_filled_from_the_corpus_and_stays_put(corpus):
    trainer = new_trainer(corpus, bigram_table="frozen")
    assert not trainer.model.bigram.W_B.any()
    trainer.train()
    assert torch.equal(trainer.model.bigram.W_B, bigram_log_probs(corpus, TINY.bigram_smoothing))
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(p is not trainer.model.bigram.W_B for p in grouped)


def test_a_filled_bigram_table_is_not_overwritten(corpus):
    trainer = new_trainer(corpus, bigram_table="frozen")
    with torch.no_grad():
        trainer.model.bigram.W_B.fill_(0.5)
    trainer.train()
    assert (trainer.model.bigram.W_B == 0.5).all()


def test_a_learned_bigram_table_gets_no_decay_and_no_sharkfin(corpus):
    sparsity = replace(SPARSITY, anneal_start=0.0, anneal_end=0.0)  # factor 2 from the start
    config = replace(TINY, sparsity=sparsity, weight_decay=0.5, warmup=0.0)
    trainer = new_trainer(corpus, config, bigram_table="learned")
    with torch.no_grad():
        trainer.model.bigram.W_B.fill_(1.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train_step(trainer.model)
    after = dict(trainer.model.named_parameters())
    # Adam's first step is the learning rate in size, wherever there is a gradient
    change = (after["bigram.W_B"] - before["bigram.W_B"]).detach().abs()
    assert float(change.max()) == pytest.approx(config.lr, rel=1e-3)
    assert float(change.min()) == 0.0  # rows of unseen tokens: no gradient, and no decay
    bias = (after["blocks.0.mlp.b_out"] - before["blocks.0.mlp.b_out"]).detach().abs()
    assert float(bias.max()) == pytest.approx(2 * config.lr, rel=1e-3)


# ------------------------------------------------------------------------------------------------
# going on


def test_half_stop_half_equals_the_straight_run_to_the_bit(corpus, straight, tmp_path, ctrl_c):
    folder, result = straight
    with pytest.raises(KeyboardInterrupt, match="after step 6"):
        new_trainer(corpus, folder=tmp_path, kind=Interrupted).train()
    # Ctrl-C came in mid-step; the step was finished, and saved before it was raised
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000006"]
    resumed = new_trainer(corpus, folder=tmp_path)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.fill_(0.1)  # everything must come from the checkpoint
    again = resumed.train()
    assert_same_run(tmp_path, folder)
    assert again.metrics.equals(result.metrics)
    assert again.record == result.record


@pytest.mark.parametrize("at", [1, 5, STEPS])
def test_ctrl_c_at_any_step_loses_nothing(corpus, straight, tmp_path, ctrl_c, at):
    trainer = new_trainer(corpus, folder=tmp_path, kind=Interrupted)
    trainer.at = at
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # put back
    trainer.at = 0
    trainer.train()  # the same object can go on, too
    assert_same_run(tmp_path, straight[0])


def test_a_second_ctrl_c_stops_at_once(corpus, tmp_path, ctrl_c):
    class Impatient(Trainer):
        def train_step(self, model):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return super().train_step(model)

    trainer = new_trainer(corpus, folder=tmp_path, kind=Impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 0
    assert not list(tmp_path.glob("checkpoint-*"))


def test_without_a_folder_an_interrupted_trainer_goes_on_in_memory(corpus, straight, ctrl_c):
    trainer = new_trainer(corpus, kind=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.train().metrics.equals(straight[1].metrics)


def test_a_run_killed_between_checkpoints_goes_on_to_the_bit(corpus, straight, tmp_path):
    killed = exit_codes(lambda: new_trainer(corpus, folder=tmp_path, kind=DyingTrainer).train())
    assert killed == [-signal.SIGKILL]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000006"]
    # what a kill in mid-write leaves: half a line, after rows of steps that will be taken again
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 8, "lo')
    new_trainer(corpus, folder=tmp_path).train()
    assert_same_run(tmp_path, straight[0])


def test_a_run_killed_while_saving_keeps_the_old_checkpoint_and_goes_on(corpus, straight, tmp_path):
    killed = exit_codes(lambda: new_trainer(corpus, folder=tmp_path, kind=DyingInSave).train())
    assert killed == [-signal.SIGKILL]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000003"]
    assert list(tmp_path.glob(".checkpoint-*"))  # the half-written one
    new_trainer(corpus, folder=tmp_path).train()
    assert_same_run(tmp_path, straight[0])
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint-00000012", "metrics.jsonl", "model"
    }  # fmt: skip


def test_metrics_are_json_lines_with_every_step_once(straight, corpus, tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        new_trainer(corpus, folder=tmp_path, kind=Interrupted).train()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps(metrics_of(tmp_path)[-1] | {"step": 99}) + "\n")
    new_trainer(corpus, folder=tmp_path).train()
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows == metrics_of(straight[0])


def test_a_finished_run_is_not_trained_again(corpus, straight, tmp_path):
    folder, result = straight
    before = final_state(folder)[1:2]
    trainer = new_trainer(corpus, folder=folder)
    trainer.train_step = None  # may not be called
    again = trainer.train()
    assert again.metrics.equals(result.metrics)
    assert final_state(folder)[1:2] == before


def test_restart_begins_anew(corpus, straight, tmp_path):
    other = replace(TINY, lr=0.5)
    new_trainer(corpus, replace(other, steps=3), tmp_path).train()
    Trainer(new_model(corpus), corpus, TINY, tmp_path, progress=False, restart=True).train()
    assert_same_run(tmp_path, straight[0])


def refusal(trainer):
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_runs_checkpoint_is_refused_and_what_differs_is_named(corpus, straight):
    folder, _ = straight
    before = final_state(folder)
    message = refusal(new_trainer(corpus, replace(TINY, lr=0.5, seed=3), folder))
    assert "training.lr: 0.01 there, 0.5 here" in message
    assert "training.seed: 0 there, 3 here" in message
    assert "model" not in message.partition("another run")[2].partition("use another")[0]
    denser = replace(TINY, sparsity=replace(SPARSITY, density=0.5))
    message = refusal(new_trainer(corpus, denser, folder))
    assert "training.sparsity.density: 0.25 there, 0.5 here" in message
    message = refusal(new_trainer(corpus, folder=folder, n_layers=1))
    assert "model.n_layers: 2 there, 1 here" in message
    message = refusal(new_trainer(replace(corpus, fingerprint="abc"), folder=folder))
    assert f"corpus: '{corpus.fingerprint}' there, 'abc' here" in message
    assert final_state(folder)[:2] == before[:2]


def test_a_damaged_checkpoint_is_one_clear_error(corpus, tmp_path):
    new_trainer(corpus, replace(TINY, steps=3), tmp_path).train()
    path = tmp_path / "checkpoint-00000003" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"optimizer\.pt is truncated or no weights-only"):
        new_trainer(corpus, replace(TINY, steps=3), tmp_path).train()


# ------------------------------------------------------------------------------------------------
# whose files


def contents(folder):
    """Every file below a folder, and what is in it."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_what_a_trainer_wrote_is_resumed_from_and_deleted(corpus, straight, tmp_path):
    whole = straight[0] / "checkpoint-00000012"
    theirs = tmp_path / "theirs"
    shutil.copytree(whole, theirs / "elsewhere")
    run = tmp_path / "run"
    for name in ("checkpoint-best", "checkpoint-500", "checkpoint-0000000012", "checkpoint-1e8"):
        shutil.copytree(whole, run / name)  # complete checkpoints, by names that are not ours
    (run / "checkpoint-00000099").mkdir()  # beyond the last step: not in the way
    (run / "checkpoint-00000099" / "notes.md").write_text("mine")
    (run / "checkpoint-latest").symlink_to(theirs / "elsewhere")
    (run / "checkpoint-notes.txt").write_text("mine")
    for name in (
        ".checkpoint-best",
        ".model.original",
        ".model.backup",
        ".checkpoint-00000003.old",
    ):
        (run / name).mkdir()
        (run / name / "notes.md").write_text("mine")
    before = contents(run) | contents(theirs)
    again = Trainer(new_model(corpus), corpus, TINY, run, progress=False)
    assert again.train().metrics.equals(straight[1].metrics)
    again = Trainer(new_model(corpus), corpus, TINY, run, progress=False, restart=True)
    assert again.train().metrics.equals(straight[1].metrics)
    after = contents(run) | contents(theirs)
    assert {name: after.get(name) for name in before} == before
    assert (run / "checkpoint-latest").is_symlink()
    assert json.loads((run / "checkpoint-00000012" / "trainer.json").read_text())["step"] == 12


def folder_in_the_way(run, whole):
    (run / "checkpoint-00000003").mkdir()
    (run / "checkpoint-00000003" / "notes.md").write_text("mine")
    return "checkpoint-00000003 was not written by a trainer"


def file_in_the_way(run, whole):
    (run / "checkpoint-00000005").write_text("mine")  # Ctrl-C may want any step
    return "checkpoint-00000005 was not written by a trainer"


def link_in_the_way(run, whole):
    shutil.copytree(whole, run / "elsewhere")
    (run / "checkpoint-00000012").symlink_to(run / "elsewhere")
    return "checkpoint-00000012 was not written by a trainer"


def model_without_a_run(run, whole):
    shutil.copytree(whole / "model", run / "model")
    path = run / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"training": None}))
    return "model holds a model without a training record"


def something_called_model(run, whole):
    (run / "model").mkdir()
    (run / "model" / "weights.bin").write_text("mine")
    return "model was not written by a trainer"


def model_of_another_run(run, whole):
    shutil.copytree(whole / "model", run / "model")
    path = run / "model" / "config.json"
    values = json.loads(path.read_text())
    values["training"]["config"]["lr"] = 0.5
    path.write_text(json.dumps(values))
    return r"model belongs to another run \(training.lr: 0.5 there, 0.01 here\)"


def other_metrics(run, whole):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return "metrics.jsonl, line 1: .*no trainer wrote it"


def notes_called_metrics(run, whole):
    (run / "metrics.jsonl").write_text("to measure: loss")
    return "metrics.jsonl, line 1: .*no trainer wrote it"


@pytest.mark.parametrize(
    "put",
    [folder_in_the_way, file_in_the_way, link_in_the_way, model_without_a_run,
     something_called_model, model_of_another_run, other_metrics, notes_called_metrics],
)  # fmt: skip
def test_what_is_in_the_way_is_refused_before_the_first_step(corpus, straight, tmp_path, put):
    message = put(tmp_path, straight[0] / "checkpoint-00000012")
    before = contents(tmp_path)
    trainer = new_trainer(corpus, folder=tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert trainer.step == 0
    assert contents(tmp_path) == before


def test_a_checkpoint_into_which_someone_put_a_file_is_kept(corpus, straight, tmp_path, ctrl_c):
    with pytest.raises(KeyboardInterrupt):
        new_trainer(corpus, folder=tmp_path, kind=Interrupted).train()
    notes = tmp_path / "checkpoint-00000006" / "model" / "notes.md"
    notes.write_text("mine")
    new_trainer(corpus, folder=tmp_path).train()
    assert notes.read_text() == "mine"
    assert (tmp_path / "checkpoint-00000012").is_dir()
    before = contents(tmp_path)
    anew = Trainer(new_model(corpus), corpus, TINY, tmp_path, progress=False, restart=True)
    with pytest.raises(ValueError, match=r"00000006 also holds model/notes\.md"):
        anew.train()
    assert contents(tmp_path) == before


def test_a_kill_while_an_old_checkpoint_is_removed_is_harmless(
    corpus, straight, tmp_path, monkeypatch
):
    usual = shutil.rmtree

    def cut_off(folder, **options):  # as rmtree leaves it when it is killed: some files are gone
        if (Path(folder) / "trainer.json").exists():
            (Path(folder) / "trainer.json").unlink()
            raise KeyboardInterrupt
        usual(folder, **options)

    monkeypatch.setattr("tl_sparse.training.resume.shutil.rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        new_trainer(corpus, folder=tmp_path).train()
    monkeypatch.undo()
    new_trainer(corpus, folder=tmp_path).train()
    assert_same_run(tmp_path, straight[0])
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint-00000012", "metrics.jsonl", "model"
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------
# several processes


def test_runs_that_share_a_folder_take_turns_and_the_second_takes_the_result(
    corpus, straight, tmp_path, capfd
):
    first = new_trainer(corpus, folder=tmp_path)
    inside, results = threading.Event(), []
    usual = first.train_step

    def slow(model):
        inside.set()
        time.sleep(0.05)
        return usual(model)

    first.train_step = slow
    thread = threading.Thread(target=lambda: results.append(first.train()))
    thread.start()
    assert inside.wait(60)
    second = Trainer(new_model(corpus), corpus, TINY, tmp_path)
    second.train_step = None  # may not be called
    results.append(second.train())
    thread.join()
    assert f"waiting for process {os.getpid()} on " in capfd.readouterr().err
    assert results[0].metrics.equals(results[1].metrics)
    assert_same_run(tmp_path, straight[0])
    assert not (tmp_path / ".trainer.lock").exists()


def test_processes_that_train_in_one_folder_end_with_one_run(corpus, straight, tmp_path):
    codes = exit_codes(lambda: new_trainer(corpus, folder=tmp_path).train(), {}, {}, {})
    assert codes == [0, 0, 0]
    assert_same_run(tmp_path, straight[0])


def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    config = replace(TINY, steps=6, accumulation=2, save_every=6)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # what launchers set
    everyone |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    two = [everyone | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    assert exit_codes(lambda: new_trainer(corpus, config, tmp_path).train(), *two) == [0, 0]
    one, two = new_trainer(corpus, config).train().metrics, metrics_of(tmp_path)
    assert [row["step"] for row in two] == list(one["step"])
    for name in ("loss", "validation_loss"):
        mine = [value for value in one[name] if not math.isnan(value)]
        theirs = [row[name] for row in two if row[name] is not None]
        assert theirs == pytest.approx(mine, rel=1e-4)
    assert two[-1]["l0"] == one["l0"].iloc[-1]
    # and a single process can resume what two began
    again = new_trainer(corpus, config, tmp_path).train()
    assert again.record.l0 == training_record(tmp_path / "model").l0


# ------------------------------------------------------------------------------------------------
# what users see


def test_without_progress_nothing_is_printed(corpus, tmp_path, capfd):
    new_trainer(corpus, replace(TINY, steps=3), tmp_path).train()
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_shows_loss_l0_and_speed(corpus, capfd, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)  # a line for every step
    Trainer(new_model(corpus), corpus, replace(TINY, steps=4), progress=True).train()
    out, err = capfd.readouterr()
    assert out == ""
    for word in ("4/4", "loss ", "val ", "L0 ", "tok/s"):
        assert word in err


def test_wandb_is_imported_only_when_asked_for(corpus, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    new_trainer(corpus, replace(TINY, steps=1), tmp_path).train()
    assert "wandb" not in sys.modules


def test_wandb_gets_every_row_once_and_is_closed(corpus, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(project, config):
            calls.append((project, sorted(config)))
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    config = replace(TINY, steps=4)
    Trainer(new_model(corpus), corpus, config, progress=False, wandb_project="tiny").train()
    assert calls[0] == ("tiny", ["corpus", "model", "training"])
    assert [call[0] for call in calls[1:-1]] == [2, 4]
    assert "validation_loss" not in calls[1][1]
    assert calls[2][1]["validation_loss"] > 0
    assert calls[-1] == "finished"


def test_wandb_that_is_not_installed_is_one_clear_error(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="needs wandb: pip install"):
        Trainer(new_model(corpus), corpus, TINY, wandb_project="tiny")


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    class Diverging(Trainer):
        def train_step(self, model):
            with torch.no_grad():
                self.model.blocks[0].mlp.b_out[0] = math.nan
            return super().train_step(model)

    config = replace(TINY, log_every=1, save_every=1)
    trainer = new_trainer(corpus, config, tmp_path, kind=Diverging)
    with pytest.raises(RuntimeError, match="training loss is nan at step 1"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_trained_at_all(corpus, tmp_path, monkeypatch, value):
    trainer = new_trainer(corpus, TINY, tmp_path)
    with torch.no_grad():
        trainer.model.blocks[0].mlp.b_out[0] = value
    monkeypatch.setattr(trainer, "train_step", lambda model: pytest.fail("a step was taken"))
    with pytest.raises(
        NotFinite, match=r"weights of this SparseTransformer.*blocks\.0\.mlp\.b_out"
    ):
        trainer.train()


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(corpus, tmp_path):
    class Diverging(Trainer):
        def train_step(self, model):
            if self.step == 4:
                with torch.no_grad():
                    self.model.blocks[0].mlp.W_in[0, 0] = math.nan
            return super().train_step(model)

    config = replace(TINY, log_every=100, eval_every=100)  # nobody looks at the loss
    trainer = new_trainer(corpus, config, tmp_path, kind=Diverging)
    with pytest.raises(RuntimeError, match="weights are no longer finite at step 6"):
        trainer.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000003"]
    assert torch.isfinite(
        SparseTransformer.from_pretrained(tmp_path / "checkpoint-00000003" / "model").W_E
    ).all()


# ------------------------------------------------------------------------------------------------
# bad input


def refused(corpus, message, config=TINY, model=None):
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(model or new_model(corpus), corpus, config, progress=False)
    assert "\n" not in str(caught.value)


def test_a_corpus_shorter_than_one_sequence_is_refused(corpus):
    short = replace(corpus, validation=corpus.validation[:15])
    refused(short, "validation part has 15 tokens, fewer than one sequence of 16")
    refused(replace(corpus, train=corpus.train[:9]), "train part has 9 tokens")


def test_a_batch_that_cannot_be_split_is_refused(corpus):
    message = "batch_size=8 must be a multiple of processes x accumulation = 3"
    refused(corpus, message, replace(TINY, accumulation=3))


def test_a_context_longer_than_the_models_is_refused(corpus):
    refused(corpus, "context=17 must be from 2 to the model's n_ctx=16", replace(TINY, context=17))


def test_a_budget_below_its_floors_is_refused_before_training(corpus):
    sparse = replace(TINY, sparsity=replace(SPARSITY, density=0.01))
    refused(corpus, r"blocks\.0\.attn\.W_Q: density 0.01 keeps 2 of 256", sparse)


def test_a_vocabulary_larger_than_the_models_is_refused(corpus):
    model = SparseTransformer(architecture(corpus, d_vocab=100))
    refused(corpus, "tokens, more than the model's d_vocab=100", model=model)


def test_a_model_with_another_tokenizer_is_refused(corpus, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n" * 50)
    (tmp_path / "b.py").write_text("while True: pass\n" * 50)
    sources = CorpusConfig(sources=(str(tmp_path),), validation_share=0.5, vocab_size=400,
                           seed=2, idiom_share=0.5)  # fmt: skip
    texts = build_corpus(sources, tmp_path / "corpus", progress=False)
    model = SparseTransformer(architecture(corpus), texts.tokenizer)
    refused(corpus, "tokenizer is not the corpus'", model=model)


def test_the_corpus_can_be_loaded_from_its_folder(corpus):
    assert TokenizedCorpus.load(corpus.directory).fingerprint == corpus.fingerprint


def test_trained_models_take_weight_masks(straight):
    model = SparseTransformer.from_pretrained(straight[0] / "model")
    counts = straight[1].record.l0
    assert WeightMasks.of(model).l0() == counts
    assert WeightProjector.top_k(model, 1 / 4, floor=2).check() == counts


def test_a_corpus_with_more_tokens_than_the_model_predicts_is_refused(sixty_sources, tmp_path):
    config = CorpusConfig(sources=(str(sixty_sources),), vocab_size=400, validation_share=0.3)
    corpus = build_corpus(config, tmp_path, progress=False)
    config = SparseTransformerConfig(d_model=16, n_ctx=8, d_vocab=400, d_vocab_out=9)
    with pytest.raises(ValueError, match="predicts d_vocab_out=9 of them only"):
        Trainer(SparseTransformer(config), corpus, TrainingConfig(steps=2), progress=False)
