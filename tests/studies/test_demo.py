import importlib
import json
import math
from dataclasses import replace

import pytest
import torch

from tl_sparse import cli
from tl_sparse.ablation import ablation_hooks
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.circuits import PruningConfig, count_edges, random_edges
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import l0
from tl_sparse.sparsity.weight_masks import WeightMasks
from tl_sparse.studies.demo import (
    DemoConfig,
    common_tasks,
    easier,
    last_token_decides,
    measure,
    model_config,
    run_demo,
    training_config,
)
from tl_sparse.tasks import evaluate_task, get, names
from tl_sparse.training.config import TrainingConfig

DEMO = importlib.import_module("tl_sparse.studies.demo")
CHAIN = {(0, "attn_in", 0), (0, "attn_v", 1), (0, "attn_out", 1)}


def test_unknown_tasks_name_the_choices():
    with pytest.raises(ValueError, match=r"unknown task\(s\) quotes, x; choose from .*for_while"):
        DemoConfig(tasks=("x", "for_while", "quotes"))


@pytest.mark.parametrize(
    "options", [{"max_tasks": 0}, {"pairs": 0}, {"target_loss": 0.7}, {"target_loss": 0.0}]
)
def test_bad_options_are_refused_before_any_training(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))}"):
        DemoConfig(**options)


def test_the_models_differ_in_width_and_activation_density_only(corpus):
    sparse, dense = (model_config(DemoConfig(), corpus, name) for name in ("sparse", "dense"))
    assert replace(
        dense, d_model=sparse.d_model, n_heads=sparse.n_heads, d_mlp=sparse.d_mlp,
        activation_density=sparse.activation_density,
    ) == sparse  # fmt: skip
    assert sparse.d_model > dense.d_model


def test_the_dense_model_stops_at_the_sparse_models_loss():
    config = DemoConfig(seed=5)
    sparse, dense = (training_config(config, name, 2.25) for name in ("sparse", "dense"))
    assert sparse.stop_at_loss is None
    assert dense.stop_at_loss == 2.25
    assert dense.sparsity is None
    assert sparse.sparsity == DEMO.SPARSITY
    assert sparse.seed == dense.seed == 5
    quick = training_config(replace(config, quick=True), "sparse", None)
    assert quick.steps < sparse.steps


def with_losses(trained, **losses):
    """The model with other task results."""
    results = {
        task: replace(trained.tasks["for_while"], task=task, losses=torch.full((8,), loss))
        for task, loss in losses.items()
    }
    return replace(trained, tasks=results)


def test_common_tasks_are_those_that_both_solve_best_first(solvers):
    sparse, dense = solvers()
    sparse = with_losses(sparse, a=0.01, b=0.12, c=0.02, d=0.001, e=0.149)
    dense = with_losses(dense, a=0.03, b=0.01, c=0.5, d=0.002, e=0.14)
    assert common_tasks(DemoConfig(max_tasks=4), sparse, dense) == ["d", "a", "b", "e"]
    assert common_tasks(DemoConfig(max_tasks=2), sparse, dense) == ["d", "a"]
    assert common_tasks(DemoConfig(target_loss=0.13), sparse, dense) == ["d", "a", "b"]
    assert common_tasks(DemoConfig(quick=True), sparse, dense) == ["d", "a"]
    assert common_tasks(DemoConfig(max_tasks=2), sparse, dense, {"d"}) == ["a", "b"]
    named = DemoConfig(tasks=("var_if", "for_while", "var_if"))
    assert common_tasks(named, sparse, dense) == ["var_if", "for_while"]


def test_without_a_common_task_an_easier_target_is_tried(solvers):
    sparse, dense = solvers()
    sparse = with_losses(sparse, a=0.01, b=0.4, c=0.2, d=0.001)
    dense = with_losses(dense, a=0.6, b=0.45, c=0.29, d=0.28)
    config, chosen = easier(DemoConfig(), sparse, dense, {"d"})
    assert (config.target_loss, chosen) == (0.3, ["c"])
    config, chosen = easier(DemoConfig(target_loss=0.3), sparse, dense, {"d"})
    assert (config.target_loss, chosen) == (0.5, ["c", "b"])
    config, chosen = easier(DemoConfig(), sparse, dense, {"b", "c", "d"})
    assert (config.target_loss, chosen) == (0.15, ["a"])


def test_the_table_holds_what_the_models_and_circuits_were_measured_to_do(solvers, circuit_of):
    sparse, dense = solvers(extra=150)
    wide = [(0, "mlp_in", c) for c in range(8)] + [(0, "mlp_neuron", c) for c in range(12)]
    circuits = {
        ("for_while", "sparse"): circuit_of(sparse),
        ("for_while", "dense"): circuit_of(dense, [*CHAIN, *wide]),
    }
    config = DemoConfig(pairs=6, seed=3)
    before = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    rows = measure(config, (sparse, dense), circuits, ["for_while"]).set_index("model")
    assert all(torch.equal(t, before[n]) for n, t in dense.model.state_dict().items())
    for trained in (sparse, dense):
        circuit, row = circuits["for_while", trained.name], rows.loc[trained.name]
        assert row["loss"] == trained.tasks["for_while"].loss
        assert (row["nodes"], row["edges"]) == (circuit.n_nodes, circuit.n_edges)
        control = random_edges(trained.model, circuit.index, circuit.kept)
        assert row["random_edges"] == pytest.approx(float(control.mean()))
        assert row["random_edges_sd"] == pytest.approx(float(control.std()))
        assert row["circuit_loss_calibrated"] == pytest.approx(circuit.loss_calibrated)
    circuit, row = circuits["for_while", "dense"], rows.loc["dense, magnitude-pruned"]
    masks = WeightMasks.top_k(dense.model, 0.25, 1, None, 1)
    task = get("for_while", dense.model.tokenizer, 48)
    with masks.applied(dense.model), torch.no_grad():
        assert row["edges"] == count_edges(dense.model, circuit.index, circuit.kept)
        assert row["loss"] == evaluate_task(dense.model, task, 6, seed=3).loss
        batch = task.batch(6, split="held_out", seed=3)
        hooks = ablation_hooks(circuit.index, circuit.kept, circuit.means.values)
        logit_diffs = task_logit_diffs(dense.model, batch, hooks)
    loss = float(torch.nn.functional.softplus(-logit_diffs).mean())
    assert row["circuit_loss"] == pytest.approx(loss, abs=1e-7)
    assert row["edges"] < circuit.n_edges


# --------------------------------------------------------------------------------------------------
# the whole job, small


@pytest.fixture
def small(corpus, small_config_of, monkeypatch):
    """The study with its small corpus, small models, and a few steps of training and pruning."""

    def training(config, name, match):
        recipe = TrainingConfig.recipe(
            "cpu", steps=4, batch_size=4, eval_sequences=4, seed=config.seed
        )
        if name == "sparse":
            return replace(recipe, sparsity=DEMO.SPARSITY)
        return replace(recipe, sparsity=None, stop_at_loss=match)

    monkeypatch.setattr(DEMO, "corpus_config", lambda config: corpus.config)
    monkeypatch.setattr(DEMO, "model_config", lambda _, corpus, name: small_config_of(corpus, name))
    monkeypatch.setattr(DEMO, "training_config", training)
    monkeypatch.setattr(
        DEMO, "PruningConfig",
        lambda **options: PruningConfig(
            **options | {"steps": 30, "batch_pairs": 8, "selection_pairs": 16}
        ),
    )  # fmt: skip


def teach(cache, planted_in):
    """Give the models in the cache weights that do the task for_while."""
    for folder in cache.glob("demo-*"):
        model = SparseTransformer.from_pretrained(folder / "model")
        record = training_record(folder / "model")
        planted_in(model, 5)
        model.save_pretrained(folder / "model", replace(record, l0=l0(weight_matrices(model))))


def test_the_job_from_text_to_circuits(small, corpus, planted_in, tmp_path):
    config = DemoConfig(out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), pairs=8)
    said = []
    first = run_demo(config, said.append, progress=False)
    assert [model.name for model in first.models] == ["sparse", "dense"]
    assert all(model.seconds > 0 for model in first.models)
    assert set(first.models[0].tasks) == set(names())
    text = corpus.validation_sequences(512, 48)
    assert first.models[0].means.n_tokens == text.numel()
    assert first.corpus.fingerprint == corpus.fingerprint
    assert any(line.startswith("Tasks that both solve") and line.endswith("none") for line in said)
    # untrained models do no task to any target: the one that they do best, and how well
    assert first.circuits == {}
    ((best, _), _) = first.failures
    assert first.to_dataframe()["task"].tolist() == [best] * 3
    assert said[-3].startswith("  shown instead, at the target 0.15: ")

    teach(tmp_path / "cache", planted_in)
    said.clear()
    second = run_demo(config, said.append, progress=False)
    assert sum("from the cache" in line for line in said) == 2
    assert all(model.seconds == 0 for model in second.models)
    assert set(second.circuits) == {("for_while", "sparse"), ("for_while", "dense")}
    assert second.failures == {}
    for circuit in second.circuits.values():
        kept = set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))
        assert kept >= CHAIN
        assert circuit.seed == config.seed
        assert len(circuit.losses) == 16
    assert second.rows["model"].tolist() == ["sparse", "dense", "dense, magnitude-pruned"]
    again = run_demo(config, said.append, progress=False)
    assert again.rows.equals(second.rows)

    third = run_demo(replace(config, retrain=True), said.append, progress=False)
    assert all(model.seconds > 0 for model in third.models)
    assert third.models[0].validation_loss == first.models[0].validation_loss
    assert third.models[0].means.model_fingerprint == first.models[0].means.model_fingerprint


def test_a_task_that_is_not_solved_is_a_failure_with_its_reason(small, tmp_path):
    config = DemoConfig(
        out=str(tmp_path / "out"), cache=str(tmp_path / "cache"), pairs=4,
        tasks=("for_while", "for_while"),
    )  # fmt: skip
    result = run_demo(config, [].append, progress=False)
    assert set(result.failures) == {("for_while", "sparse"), ("for_while", "dense")}
    assert all("does not solve the task" in reason for reason in result.failures.values())
    assert len(result.rows) == 3
    assert "nodes" not in result.rows
    assert math.isfinite(result.rows["loss"].sum())


def test_the_command_writes_the_report_and_says_where(small, planted_in, tmp_path, capsys):
    out, cache = tmp_path / "out", tmp_path / "cache"
    command = ["demo", "--out", str(out), "--cache", str(cache), "--pairs", "4"]
    cli.main(command)
    teach(cache, planted_in)
    cli.main([*command, "--overwrite"])
    assert capsys.readouterr().out.endswith(f"Report: {(out / 'report.html').resolve()}\n")
    values = json.loads((out / "report.json").read_text())
    assert [row["model"] for row in values["rows"]][:2] == ["sparse", "dense"]
    assert sorted(p.name for p in (out / "circuits").iterdir()) == [
        "for_while-dense", "for_while-sparse",
    ]  # fmt: skip


def test_tasks_that_the_last_token_decides_are_left_to_the_bigram_table():
    """Their circuits are empty. The paper's other tasks must look further back."""
    tokenizer = SparseTransformer.from_pretrained("python-sparse").tokenizer
    found = {n for n in names() if last_token_decides(get(n, tokenizer, 64), DemoConfig())}
    assert found == {"else_elif"}
