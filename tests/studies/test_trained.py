import json
import math
import multiprocessing
import shutil
from dataclasses import replace

import pytest
import torch

from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.studies.frontier import token_loss
from tl_sparse.studies.runner import claimed, read_unit
from tl_sparse.studies.trained import (
    ModelUnit,
    forget,
    load_trained,
    machine,
    train_in,
    train_now,
    train_unit,
    training_time,
)
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.trainer import Trainer

RULE = SparsityConfig(density=0.25, floor=1, embedding_floor=1, lr_factor="unnormalised")
RUN = TrainingConfig(
    steps=4, batch_size=4, lr=1e-5, eval_every=2, eval_sequences=8, log_every=1, save_every=2,
    sparsity=RULE,
)  # fmt: skip


@pytest.fixture
def architecture(corpus):
    return SparseTransformerConfig(
        n_layers=1, d_model=16, d_head=4, n_ctx=48, d_mlp=12, d_vocab=len(corpus.tokenizer)
    )


def weights(folder):
    return SparseTransformer.from_pretrained(folder / "model").state_dict()


def test_a_model_has_a_folder_of_its_own_for_every_recipe(architecture, corpus, tmp_path):
    def folder(architecture=architecture, run=RUN, corpus=corpus):
        one = ModelUnit.cached(str(tmp_path), "x", "sparse", architecture, run, corpus)
        return one.unit.folder

    base = folder()
    assert base.parent == tmp_path
    assert base.name.startswith("x-sparse-")
    assert base == folder(replace(architecture), replace(RUN))
    others = {
        folder(replace(architecture, seed=1)),
        folder(run=replace(RUN, seed=1)),
        folder(corpus=replace(corpus, fingerprint="other")),
    }
    assert len(others - {base}) == 3


def test_an_interrupted_run_is_resumed_exactly_and_its_time_is_kept(
    architecture, corpus, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_in(whole, architecture, RUN, corpus, progress=False)
    usual = Trainer.train_step

    def fail(self, model):
        if self.step == 3:
            raise RuntimeError("cut off")
        return usual(self, model)

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(RuntimeError, match="cut off"):
        train_in(cut, architecture, RUN, corpus, progress=False)
    assert not (cut / "model").exists()
    monkeypatch.undo()
    train_in(cut, architecture, RUN, corpus, progress=False)
    first, second = weights(whole), weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    sessions = [json.loads(line) for line in (cut / "sessions.jsonl").read_text().splitlines()]
    assert [s["steps"] for s in sessions] == [3, 2]  # the third step was taken twice
    seconds = sum(s["seconds"] for s in sessions)
    assert seconds > 0
    hours, where = training_time(cut, 4)
    assert hours == pytest.approx(seconds / 5 * 4 / 3600)
    assert where == machine()


def test_a_finished_run_is_not_repeated_unless_asked_for(
    architecture, corpus, tmp_path, monkeypatch
):
    one = ModelUnit.cached(str(tmp_path), "x", "sparse", architecture, RUN, corpus)
    assert train_now(one, corpus, print, progress=False) > 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained again"))
        assert train_now(one, corpus, print, progress=False) == 0
    assert train_now(one, corpus, print, progress=False, retrain=True) > 0


def test_a_model_that_another_process_trained_meanwhile_is_taken(
    architecture, corpus, tmp_path, monkeypatch
):
    one = ModelUnit.cached(str(tmp_path), "x", "sparse", architecture, RUN, corpus)
    theirs = claimed(one.unit)
    assert theirs.__enter__()

    def finish(seconds):
        train_unit(one, corpus, progress=False)
        theirs.__exit__(None, None, None)

    monkeypatch.setattr("tl_sparse.studies.runner.time.sleep", finish)
    said = []
    assert train_now(one, corpus, said.append, progress=False) == 0
    assert len(said) == 1
    assert said[0].startswith("Waiting for x-sparse (process")


def test_processes_that_train_one_recipe_share_the_work(
    architecture, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("tl_sparse.studies.runner.WAIT", 0.05)
    one = ModelUnit.cached(str(tmp_path), "x", "sparse", architecture, RUN, corpus)

    def train():
        train_now(one, corpus, lambda line: None, progress=False)
        load_trained(one.unit.folder)

    processes = [multiprocessing.get_context("fork").Process(target=train) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    metrics = (one.unit.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3, 4]
    assert len((one.unit.folder / "sessions.jsonl").read_text().splitlines()) == 1
    forget(one.unit)
    assert read_unit(one.unit) is None
    load_trained(one.unit.folder)  # for others, until there is another
    assert [path.name for path in one.unit.folder.iterdir()] == ["model"]


def test_a_model_above_the_loss_that_it_should_stop_at_is_a_failure(architecture, corpus, tmp_path):
    for goal, failed in ((0.5, True), (50.0, False)):
        run = replace(RUN, sparsity=None, stop_at_loss=goal)
        one = ModelUnit.of(tmp_path, "x", "dense", architecture, run, corpus)
        record = train_unit(one, corpus, False, lambda model: {"width": model.config.d_model})
        assert record == read_unit(one.unit)
        assert record.result["width"] == 16
        assert record.result["nonzeros"] == sum(
            int(torch.count_nonzero(m))
            for name, m in weights(one.unit.folder).items()
            if "W_" in name and name != "pos_embed.W_pos"
        )
        assert (record.failure is not None) == failed
        if failed:
            assert "above its partner's 0.5000: give it more steps or width" in record.failure


def test_the_validation_loss_is_the_trainers(corpus, small_model):
    model = small_model(d_vocab=len(corpus.tokenizer), n_ctx=48, tokenizer=corpus.tokenizer)
    expected = Trainer(model, corpus, RUN, progress=False).validation_loss()
    text = corpus.validation_sequences(8, 48)
    assert token_loss(model.eval(), text) == pytest.approx(expected, rel=1e-6)
    short = Trainer(model, corpus, replace(RUN, context=16), progress=False).validation_loss()
    assert short != pytest.approx(expected, rel=1e-6)
    text = corpus.validation_sequences(8, 16)
    assert token_loss(model.eval(), text) == pytest.approx(short, rel=1e-6)


def test_a_run_whose_process_was_killed_before_it_noted_its_time_has_none(tmp_path):
    hours, where = training_time(tmp_path, 4)
    assert math.isnan(hours)
    assert where == "a machine that was not recorded"


@pytest.mark.parametrize("name", ["model.safetensors", None])
def test_a_damaged_model_is_set_aside_and_trained_anew(name, architecture, corpus, tmp_path):
    one = ModelUnit.cached(str(tmp_path), "x", "sparse", architecture, RUN, corpus)
    folder = one.unit.folder
    train_now(one, corpus, print, progress=False)
    whole = weights(folder)
    assert train_now(one, corpus, print, progress=False) == 0
    if name is None:
        shutil.rmtree(folder / "model")
    else:
        (folder / "model" / name).write_bytes(b"{")
    with pytest.warns(UserWarning, match=r"model is trained anew"):
        assert train_now(one, corpus, print, progress=False) > 0
    again = weights(folder)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    aside = list(folder.glob("model-damaged-*"))
    assert [(path / name).read_bytes() for path in aside] == ([] if name is None else [b"{"])
    assert read_unit(one.unit) is not None
