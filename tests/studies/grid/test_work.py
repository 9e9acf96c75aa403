import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tl_sparse.circuits import Circuit, PruningConfig
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.studies import runner, trained
from tl_sparse.studies.grid import (
    StudyConfig,
    plan,
    read_study,
    run_study,
    work,
    write_study,
)
from tl_sparse.studies.runner import claimed, holder, read_unit
from tl_sparse.training.config import TrainingConfig

SPARSITY = SparsityConfig(floor=0, lr_factor="none")


def training(**changes):
    return TrainingConfig(steps=2, batch_size=4, eval_sequences=4, **changes)


@pytest.fixture
def config(corpus, sixty_sources, tmp_path):
    return StudyConfig(
        out=str(tmp_path / "study"),
        cache=str(corpus.directory.parent),
        corpus=corpus.config,
        widths=(8, 12),
        l0=(0.5,),
        l0_unit="density",
        embedding_nonzeros=4,
        seeds=(0, 1),
        compare=("d8-l0.5",),
        dense_width=8,
        model=SparseTransformerConfig(n_layers=1, d_head=4, n_ctx=48),
        training=training(sparsity=SPARSITY),
        dense_training=training(sparsity=None, eval_every=1),
        tasks=("for_while", "var_if"),
        targets=(0.15,),
        pruning=PruningConfig(
            headroom=0.0, steps=24, batch_pairs=4, selection_pairs=8, report_pairs=4
        ),
        mean_sequences=20,
        controls=3,
    )


@pytest.fixture
def planting(monkeypatch, planted_in):
    """Training leaves models that do for_while; returns the names of the folders trained in."""
    names = []
    real = trained.train_in

    def train_in(folder, architecture, run, corpus, *, progress):
        from tl_sparse.checkpoints.packed import training_record
        from tl_sparse.model.transformer import SparseTransformer

        names.append(folder.name)
        real(folder, architecture, run, corpus, progress=progress)
        model, record = (
            SparseTransformer.from_pretrained(folder / "model"),
            training_record(folder / "model"),
        )
        planted_in(model, extra=5 if run.sparsity is None else 0)
        object.__setattr__(record, "l0", model.n_nonzero())
        loss = 3.0 if run.stop_at_loss is None else run.stop_at_loss
        object.__setattr__(record, "validation_loss", loss)
        model.save_pretrained(folder / "model", record)

    monkeypatch.setattr(trained, "train_in", train_in)
    few = partial(work.table, names=["for_while", "var_if"])  # all twenty take seconds
    monkeypatch.setattr(work, "table", few)
    monkeypatch.setattr(work, "_by_attribution", work_by_planted_ranking)
    return names


def work_by_planted_ranking(opened, one):
    from tl_sparse.circuits import prune

    task = opened.task(one.task)
    return prune(opened.model, task, one.config, means=opened.means, progress=False)


def test_a_study_trains_prunes_measures_and_draws(config, corpus, planting):
    said = []
    result = run_study(config, said.append, progress=False)
    # a model is pruned before the next one is trained
    assert said[1].startswith("d8-l0.5-seed0: training")
    assert said[3].startswith("d8-l0.5-seed0: for_while 0.15 learned, for_while 0.15 attribution (")
    models = result.models
    assert list(models["model"]) == [
        "d8-l0.5-seed0", "d12-l0.5-seed0", "d8-l0.5-seed1", "d12-l0.5-seed1",
        "d8-l0.5-dense-seed0", "d8-l0.5-dense-seed1",
    ]  # fmt: skip
    assert (models["failure"] == "").all()
    circuits = result.circuits
    assert set(circuits["task"]) == {"for_while"}  # no model does var_if
    counts = circuits.groupby(["setting", "kind", "method"])["target_loss"].apply(sorted)
    assert counts["d12-l0.5", "sparse", "learned"] == [0.15, 0.15]
    for kind in ("sparse", "dense"):
        for method in ("learned", "attribution"):
            assert counts["d8-l0.5", kind, method] == [0.15, 0.15]
    assert (circuits["nodes"] >= 3).all()
    assert len(result.necessity) == 4
    # without the chain there is no telling for from while: ln 2 is the best that is left
    assert (result.necessity["loss"] > math.log(2) - 1e-3).all()
    assert (result.necessity["random_loss"] < 0.15).all()
    assert not planting_again(config, planting, said)
    check_files(config, result)


def planting_again(config, planting, said):
    """What a second run trains."""
    planting.clear()
    told = len(said)
    again = run_study(config, said.append, progress=False)
    assert not again.plan.left
    assert said[told:] == ["Corpus: " + ", ".join(config.corpus.sources)]
    return planting


def check_files(config, result):
    page = write_study(result)
    out = page.parent
    assert {p.stem for p in (out / "figures").iterdir()} == {
        "figure2", "figure3", "figure31", "figure32",
    }  # fmt: skip
    assert not list(out.rglob("*.lock"))
    table = pd.read_csv(out / "tables" / "figure2.csv")
    assert set(table["series"]) == {"sparse", "dense"}
    sizes = result.circuits.query("kind == 'dense' and method == 'learned'")
    by_hand = math.exp(np.log(sizes["edges"]).mean())
    row = table.query("series == 'dense'").iloc[0]
    assert row["edges"] == pytest.approx(by_hand)
    frontier = pd.read_csv(out / "tables" / "figure3.csv").set_index("group")
    assert set(frontier.index) == {"d8-l0.5", "d12-l0.5", "d8-l0.5, dense"}
    losses = result.models.query("setting == 'd12-l0.5'")["text_loss"]
    assert frontier.loc["d12-l0.5", "validation_loss"] == pytest.approx(losses.mean())
    assert (frontier["models"] == 2).all()
    figure = json.loads((out / "figures" / "figure32.json").read_text())
    assert {trace["name"] for trace in figure["data"]} >= {"the circuit's nodes", "random nodes"}
    html = page.read_text(encoding="utf-8")
    assert "for_while" in html
    assert "src=" not in html.split("<body>")[1]  # nothing is fetched from elsewhere


def test_a_larger_grid_keeps_what_is_there(config, corpus, planting):
    one = replace(config, widths=(8,), seeds=(0,), targets=(0.15,))
    run_study(one, lambda line: None, progress=False)
    before = {path: path.stat().st_mtime_ns for path in files_of(one)}
    planting.clear()
    more = replace(one, seeds=(0, 1))
    run_study(more, lambda line: None, progress=False)
    assert [name.rsplit("-", 1)[0] for name in planting] == [
        "d8-l0.5-seed1", "d8-l0.5-dense-seed1",
    ]  # fmt: skip
    assert before.items() <= {path: path.stat().st_mtime_ns for path in files_of(more)}.items()


def files_of(config):
    return [p for p in Path(config.out).rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_circuit_that_was_cut_off_is_found_again_and_the_others_are_kept(
    config, corpus, planting, monkeypatch
):
    config = replace(config, widths=(8,), seeds=(0,), targets=(0.15,), together=1)
    real = Circuit.save
    saved = []

    def interrupted(self, folder):
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt
        real(self, folder)

    monkeypatch.setattr(Circuit, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, lambda line: None, progress=False)
    assert len(read_study(config, corpus).circuits) == 1
    half = write_study(run_study(replace(config, draw_only=True), lambda line: None))
    assert "units are not finished" in half.read_text(encoding="utf-8")
    left = [p.name for p in (Path(config.out) / "circuits").iterdir()]
    assert len(left) == 1  # nothing half-written
    planting.clear()
    result = run_study(config, lambda line: None, progress=False)
    assert all("dense" in name for name in planting)  # the sparse model was there
    assert len(saved) == 2 + len(result.circuits) - 1


def test_what_cannot_be_done_is_told_and_does_not_stop_the_rest(
    config, corpus, planting, monkeypatch
):
    def attempted(model, jobs, *, means, progress):
        return [ValueError("the mask collapsed") for _ in jobs]

    monkeypatch.setattr(work, "attempted", attempted)
    one = replace(config, widths=(8,), seeds=(0,), targets=(0.15,))
    result = run_study(one, lambda line: None, progress=False)
    learned = result.circuits.query("method == 'learned'")
    assert set(learned["failure"]) == {"the mask collapsed"}
    assert learned["edges"].isna().all()
    html = write_study(result).read_text(encoding="utf-8")
    assert "the mask collapsed" in html


def test_a_dense_model_above_its_partners_loss_is_left_out(config, corpus, planting, monkeypatch):
    real = trained.load_trained

    def load_trained(folder):
        model, record, loss = real(folder)
        return model, record, loss + ("dense" in folder.name)

    monkeypatch.setattr(trained, "load_trained", load_trained)
    one = replace(config, widths=(8,), seeds=(0,), targets=(0.15,))
    result = run_study(one, lambda line: None, progress=False)
    dense = result.models.query("kind == 'dense'").iloc[0]
    assert "above its partner's 3.0000" in dense["failure"]
    assert set(result.circuits["kind"]) == {"sparse"}


def test_work_held_by_another_process_is_waited_for(config, corpus, planting, monkeypatch):
    one = replace(config, widths=(8,), seeds=(0,), targets=(0.15,))
    first = plan.plan(one, corpus).models[0].unit
    other = claimed(first)
    assert other.__enter__()
    said, naps = [], []

    def sleep(seconds):
        assert read_unit(first) is None  # not done twice
        naps.append(seconds)
        other.__exit__(None, None, None)

    monkeypatch.setattr(runner.time, "sleep", sleep)
    run_study(one, said.append, progress=False)
    assert naps == [runner.WAIT]
    assert any(line.startswith("Waiting for d8-l0.5-seed0 (process") for line in said)
    assert holder(first) == ""
