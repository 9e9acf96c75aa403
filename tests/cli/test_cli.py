import importlib
import inspect
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from tl_sparse import cli, tasks
from tl_sparse.checkpoints.packed import training_record
from tl_sparse.circuits import Circuit
from tl_sparse.cli import studies
from tl_sparse.cli.commands import COMMANDS
from tl_sparse.cli.models import Info, Train
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.training.config import TrainingConfig

SIZES = {
    "--model.n-layers": 1, "--model.d-model": 16, "--model.d-head": 4, "--model.n-ctx": 48,
    "--training.steps": 6, "--training.batch-size": 4, "--training.eval-sequences": 4,
    "--training.sparsity.density": 0.5, "--training.sparsity.floor": 1,
    "--training.sparsity.embedding-floor": 1,
}  # fmt: skip

QUICK = (
    "--pruning.steps", "40", "--pruning.batch-pairs", "8", "--pruning.selection-pairs", "16",
    "--pruning.report-pairs", "8",
)  # fmt: skip


def flags(options):
    return [str(part) for option in options.items() for part in option]


def refused(capsys, *arguments):
    """The code and the words with which a command line ends."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code not in (0, None)
    if isinstance(ended.value.code, str):
        return ended.value.code
    printed = capsys.readouterr()
    # the parser draws boxes; what it says is what counts
    words = [line.strip("│╭╮╰╯─ ") for line in (printed.out + printed.err).splitlines()]
    return " ".join(" ".join(words).split())


@pytest.fixture(scope="module")
def corpus(sixty_sources):
    """Options for a corpus of sixty small files."""
    return flags({"--corpus.sources": sixty_sources, "--corpus.idiom-share": 0.3})


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The folder of a run of six steps."""
    out = tmp_path_factory.mktemp("run") / "here"
    cli.main(["train", "--out", str(out), *corpus, *flags(SIZES)])
    return out


@pytest.fixture
def solver(trained, tmp_path):
    """The trained model with new weights, by which it does the task for_while and nothing else."""
    model = SparseTransformer.from_pretrained(trained / "model")
    answers = tasks.get("for_while", model.tokenizer).answer_ids
    marks = [model.tokenizer.encode(word) for word in ("for", "while")]
    assert [len(ids) for ids in marks] == [1, 1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.blocks[0].ln1, model.blocks[0].ln2, model.ln_final):
            norm.w.fill_(1.0)
        model.W_E[:, 3], model.W_E[:, 4] = 3.0, -3.0
        model.W_E[marks[0], 0], model.W_E[marks[1], 0] = 3.0, -3.0
        block = model.blocks[0].attn
        block.W_V[0, 0, 1], block.W_O[0, 1, 1] = 1.0, 4.0
        model.W_U[1, answers[0]], model.W_U[1, answers[1]] = 10.0, -10.0
    model.save_pretrained(tmp_path / "solver")
    return tmp_path / "solver"


# --------------------------------------------------------------------------------------------------
# help


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    text = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    return " ".join(text.split())


def test_help_lists_the_commands_and_what_each_does(capsys):
    text = help_of(capsys)
    assert len(COMMANDS) >= 15
    for name, command in COMMANDS.items():
        assert f"{name} {command.summary}" in text
        options = getattr(importlib.import_module(f"tl_sparse.cli.{command.module}"),
                          command.options)  # fmt: skip
        assert inspect.getdoc(options).splitlines()[0] == command.summary


def test_version_and_help_come_without_torch():
    code = (
        "import sys; from tl_sparse import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(sorted({'torch', 'transformer_lens', 'numpy', 'tyro'} & set(sys.modules)))"
    )
    for word, start in (("--version", "tl-sparse "), ("--help", "usage: tl-sparse")):
        run = subprocess.run(
            [sys.executable, "-c", code, word], capture_output=True, text=True, check=True
        )
        assert run.stdout.startswith(start)
        assert run.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--training.sparsity.density", "--model.d-model", "--corpus.sources", "--out")),
        ("prune", ("--pruning.target-loss", "MODEL", "TASK", "--mean-sequences", "--overwrite")),
        ("info", ("MODEL", "--pairs")),
        ("demo", ("--quick", "--target-loss", "--out")),
        ("sweep", ("--l0-penalties", "--seeds", "--search-rounds", "--pruning.steps")),
        ("frontier", ("--groups", "--sequences", "--pruning.target-loss")),
        ("study", ("--widths", "--l0-unit", "--compare", "--training.steps", "--targets")),
    ],
)
def test_help_names_the_options(capsys, command, options):
    text = help_of(capsys, command)
    for option in options:
        assert option in text


def test_help_of_an_option_is_the_docstring_of_its_field(capsys):
    text = help_of(capsys, "train")
    assert "Share of nonzero entries in every matrix of the blocks at the end of training." in text
    assert "Width of the residual stream. (default: 128)" in text
    assert "Prompt pairs per step (the paper: 64)." in help_of(capsys, "prune")


def test_recipe_sets_the_defaults(capsys):
    paper = TrainingConfig.recipe("paper")
    assert f"Optimiser steps. (default: {paper.steps})" in help_of(
        capsys, "train", "--recipe", "paper"
    )
    assert "Optimiser steps. (default: 1600)" in help_of(capsys, "train")


def test_recipe_reaches_the_run_and_options_change_it(monkeypatch):
    seen = []
    monkeypatch.setattr(Train, "run", lambda self: seen.append(self))
    cli.main(["train", "--out", "o", "--recipe=paper", "--training.steps", "7"])
    cli.main(["train", "--out", "o"])
    assert seen[0].training == TrainingConfig.recipe("paper", steps=7)
    assert seen[0].recipe == "paper"
    assert seen[1].training == TrainingConfig.recipe("cpu")


# --------------------------------------------------------------------------------------------------
# refusals


def test_an_unknown_command_names_the_commands(capsys):
    words = refused(capsys, "trian")
    assert words.startswith("tl-sparse: no command 'trian'; choose from info, prune, evaluate, ")
    assert words.endswith(" Did you mean train?")
    assert refused(capsys) == (
        f"tl-sparse: say which command: {', '.join(COMMANDS)}; or --help, --version"
    )


def test_what_is_missing_is_named_in_one_line(capsys):
    assert refused(capsys, "prune") == "tl-sparse prune: missing MODEL, TASK, --out"
    assert refused(capsys, "prune", "m", "t", "--uot", "x") == "tl-sparse prune: missing --out"
    words = refused(capsys, "prune", "m", "t", "--out", "o", "--pruning.step", "x")
    assert words.startswith("tl-sparse prune: Unrecognized options: --pruning.step, x")
    assert "Perhaps you meant: --pruning.steps" in words


def test_an_unknown_recipe_names_the_recipes(capsys):
    words = refused(capsys, "train", "--out", "o", "--recipe", "mine")
    assert words == "tl-sparse: unknown recipe 'mine'; choose from paper, released, cpu"


def test_an_unknown_option_is_named(capsys):
    words = refused(capsys, "train", "--out", "o", "--training.stepz", "3")
    assert "Unrecognized" in words
    assert "--training.stepz" in words
    assert "\n" not in words


def test_an_unknown_choice_names_the_choices(capsys):
    words = refused(capsys, "train", "--out", "o", "--training.gradient", "big")
    assert "invalid choice 'big'" in words
    assert "('normalise', 'clip', 'none')" in words


def test_a_bad_value_is_told_before_anything_runs(capsys, tmp_path):
    out = tmp_path / "o"
    assert "lr=-1.0 must be positive" in refused(
        capsys, "train", "--out", str(out), "--training.lr", "-1"
    )
    assert "target_loss=2.0 must lie between 0 and ln 2" in refused(
        capsys, "prune", "m", "t", "--out", str(out),
        "--pruning.target-loss", "2",
    )  # fmt: skip
    assert not out.exists()


def test_an_unknown_task_names_the_tasks(capsys, trained, tmp_path):
    words = refused(
        capsys, "prune", str(trained / "model"), "quotes",
        "--out", str(tmp_path / "o"),
    )  # fmt: skip
    assert words.startswith("tl-sparse: unknown task 'quotes': choose from ")
    assert "single_double_quote" in words
    assert "\n" not in words
    demo = refused(capsys, "demo", "--tasks", "quotes")
    assert "unknown task(s) quotes; choose from" in demo
    assert "single_double_quote" in demo


def test_a_missing_model_is_one_line(capsys, tmp_path):
    words = refused(capsys, "info", str(tmp_path / "nowhere"))
    assert words.startswith("tl-sparse: ")
    assert "nowhere is no folder" in words
    assert "\n" not in words


def test_a_model_that_cannot_do_the_task_is_one_line(capsys, trained, corpus, tmp_path):
    out = tmp_path / "c"
    words = refused(
        capsys, "prune", str(trained / "model"), "for_while",
        "--out", str(out), *corpus, "--pruning.steps", "2",
    )  # fmt: skip
    assert words.startswith("tl-sparse: the full model has loss ")
    assert "above the target 0.15: it does not solve the task; a higher target_loss" in words
    assert not out.exists()


def test_no_sequence_to_average_over_is_refused(capsys, trained, tmp_path):
    words = refused(
        capsys, "prune", str(trained / "model"), "for_while",
        "--out", str(tmp_path / "c"), "--mean-sequences", "0",
    )  # fmt: skip
    assert words == "tl-sparse: mean_sequences=0 must be at least 1"


def test_an_interruption_is_one_line_that_says_what_is_left(monkeypatch, capsys):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Info, "run", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "tl-sparse: stopped; nothing was written, and the same command starts anew\n"
    )
    monkeypatch.setattr(Train, "run", stop)
    with pytest.raises(SystemExit):
        cli.main(["train", "--out", "o"])
    assert "run the same command again to go on" in capsys.readouterr().err


def test_an_interruption_while_a_command_is_imported_is_one_line(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--out", "o"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "tl-sparse: stopped; nothing had begun\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(self):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Info, "run", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["info"])


# --------------------------------------------------------------------------------------------------
# from text to circuit


def test_training_leaves_a_model_and_metrics(trained):
    model = SparseTransformer.from_pretrained(trained / "model")
    record = training_record(trained / "model")
    assert model.config.d_model == 16
    assert model.config.d_vocab == len(model.tokenizer)
    assert record.steps == 6
    assert record.config["sparsity"]["density"] == 0.5
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_loss"] == record.validation_loss


def test_training_again_finds_the_run_finished(capsys, trained, corpus):
    before = (trained / "model" / "model.safetensors").read_bytes()
    cli.main(["train", "--out", str(trained), *corpus, *flags(SIZES)])
    loss = training_record(trained / "model").validation_loss
    assert f"validation loss {loss:.3f} nats" in capsys.readouterr().out
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_a_dense_model_is_trained_by_density_one(corpus, tmp_path):
    options = SIZES | {"--training.sparsity.density": 1, "--training.steps": 2}
    cli.main(["train", "--out", str(tmp_path / "run"), *corpus, *flags(options)])
    model = SparseTransformer.from_pretrained(tmp_path / "run" / "model")
    assert float((model.blocks[0].mlp.W_in != 0).float().mean()) > 0.99


def test_info_without_a_model_lists_the_tasks(capsys):
    cli.main(["info"])
    assert capsys.readouterr().out == f"tasks: {', '.join(tasks.names())}\n"


def test_info_tells_the_config_the_training_and_every_task(capsys, trained):
    cli.main(["info", str(trained / "model"), "--pairs", "2", "--config"])
    text = capsys.readouterr().out
    record = training_record(trained / "model")
    assert text.splitlines()[0].startswith(f"{trained / 'model'}: 1 layers, width 16, ")
    assert '"d_model": 16' in text
    assert f"trained 6 steps on {6 * 4 * 48:,} tokens" in text
    assert f"validation loss {record.validation_loss:.3f} nats" in text
    assert f"{sum(record.l0.values()):,} nonzero weights" in text
    lines = {line.split()[0]: line for line in text.splitlines() if "held-out loss" in line}
    assert set(lines) == set(tasks.names())
    model = SparseTransformer.from_pretrained(trained / "model")
    result = tasks.evaluate_task(model, tasks.get("var_if", model.tokenizer, 48), 2)
    assert lines["var_if"].endswith(
        f"held-out loss {result.loss:.3f}  accuracy {result.accuracy:.2f}"
    )


def test_tasks_tells_a_table_with_own_files_and_keeps_every_prompt(capsys, trained, tmp_path):
    folder = str(trained / "model")
    row = {"prompts": ["x = [[1]", "x = [1]"], "answers": ["]", "\n"], "split": "held_out"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "prompts.csv"
    options = flags({"--pairs": 2, "--files": tmp_path / "mine.jsonl", "--csv": out})
    cli.main(["tasks", folder, *options])
    model = SparseTransformer.from_pretrained(folder)
    own = tasks.from_jsonl(tmp_path / "mine.jsonl", model.tokenizer, max_tokens=48)
    expected = tasks.table(model, 2, [*tasks.names(), own])
    assert capsys.readouterr().out == f"{expected}\n"
    lines = out.read_text().splitlines()
    assert lines[0] == "task,split,pair,member,prompt,answer,loss,correct"
    assert sum(line.startswith("mine,held_out,") for line in lines) == 4
    (tmp_path / "mine.jsonl").write_text("{}\n")
    words = refused(capsys, "tasks", folder, "--files", str(tmp_path / "mine.jsonl"))
    assert "mine.jsonl, line 1: no key 'prompts'" in words


def test_info_of_a_model_without_tokenizer_or_record(capsys, trained, tmp_path):
    model = SparseTransformer.from_pretrained(trained / "model")
    model.set_tokenizer(None)
    model.save_pretrained(tmp_path / "bare")
    cli.main(["info", str(tmp_path / "bare")])
    text = capsys.readouterr().out
    assert "width 16" in text
    assert "d_model" not in text
    assert text.endswith("no tokenizer, so no tasks\n")
    words = refused(
        capsys, "prune", str(tmp_path / "bare"), "for_while",
        "--out", str(tmp_path / "c"),
    )  # fmt: skip
    assert words.endswith("bare has no tokenizer: there are no prompts for it")


def test_info_of_a_model_whose_loss_was_never_measured(capsys, trained, tmp_path):
    model = SparseTransformer.from_pretrained(trained / "model")
    record = training_record(trained / "model")
    object.__setattr__(record, "validation_loss", None)
    model.save_pretrained(tmp_path / "early", record)
    cli.main(["info", str(tmp_path / "early"), "--pairs", "1"])
    assert "validation loss not measured; " in capsys.readouterr().out


def test_pruning_leaves_the_circuit_and_its_drawing(capsys, solver, corpus, tmp_path):
    out = tmp_path / "found"
    command = [
        "prune", str(solver), "for_while", "--out", str(out), *corpus,
        "--pruning.steps", "40", "--pruning.batch-pairs", "8", "--pruning.selection-pairs", "16",
        "--pruning.report-pairs", "8", "--mean-sequences", "20",
    ]  # fmt: skip
    cli.main(command)
    model = SparseTransformer.from_pretrained(solver)
    circuit = Circuit.load(out / "circuit", model)
    names = set(circuit.nodes[["layer", "site", "channel"]].itertuples(index=False, name=None))
    assert {(0, "attn_in", 0), (0, "attn_v", 1), (0, "attn_out", 1)} <= names
    assert circuit.accuracy == 1.0
    assert circuit.config["steps"] == 40
    assert circuit.means.n_tokens == 20 * 48
    text = capsys.readouterr().out
    assert repr(circuit) in text
    assert str(out / "circuit.html") in text
    assert "for_while" in (out / "circuit.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir()) == ["circuit", "circuit.html"]
    # again into the same folder: the old circuit is replaced only if that is wanted
    words = refused(capsys, *command, "--pruning.seed", "1")
    assert words == (
        f"tl-sparse: {out} has circuit, circuit.html already: choose another --out, or replace "
        "with --overwrite"
    )
    assert Circuit.load(out / "circuit", model).seed == 0
    cli.main([*command, "--pruning.seed", "1", "--overwrite"])
    assert Circuit.load(out / "circuit", model).seed == 1


def test_means_are_taken_over_windows_that_begin_with_bos(solver, corpus, tmp_path, monkeypatch):
    seen = []

    def spy(model, tokens):
        seen.append(tokens)
        raise ValueError("enough")

    monkeypatch.setattr("tl_sparse.cli.circuits.activation_means", spy)
    with pytest.raises(SystemExit, match="enough"):
        cli.main(
            ["prune", str(solver), "for_while", "--out",
             str(tmp_path / "c"), *corpus, "--mean-sequences", "9"]
        )  # fmt: skip
    tokenizer = SparseTransformer.from_pretrained(solver).tokenizer
    assert seen[0].shape == (9, 48)
    assert (seen[0][:, 0] == tokenizer.bos_token_id).all()
    assert len(np.unique(seen[0].numpy(), axis=0)) == 9


def test_pruning_reads_no_more_text_than_it_needs(solver, sixty_sources, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the whole corpus was built")

    for place in ("tl_sparse.data.corpus.first_of_each", "tl_sparse.data.corpus.build_tokenizer"):
        monkeypatch.setattr(place, refuse)
    cli.main(
        ["prune", str(solver), "for_while", "--out", str(tmp_path / "c"),
         "--corpus.sources", str(sixty_sources), "--mean-sequences", "9", *QUICK]
    )  # fmt: skip
    circuit = Circuit.load(tmp_path / "c" / "circuit", SparseTransformer.from_pretrained(solver))
    assert circuit.means.n_tokens == 9 * 48


def test_evaluating_leaves_a_report_a_page_and_tables(capsys, solver, sixty_sources, tmp_path):
    from tl_sparse.faithfulness import FaithfulnessReport

    corpus = ("--corpus.sources", str(sixty_sources))
    cli.main(
        ["prune", str(solver), "for_while", "--out", str(tmp_path / "c"),
         *corpus, "--mean-sequences", "9", *QUICK]
    )  # fmt: skip
    out = tmp_path / "e"
    cli.main(
        ["evaluate", str(solver), str(tmp_path / "c" / "circuit"),
         "--out", str(out), *corpus, "--sequences", "9", "--evaluation.checks", "norms",
         "minimality", "--evaluation.pairs", "8", "--thresholds", "minimal", "0.5"]
    )  # fmt: skip
    report = FaithfulnessReport.load(out / "report.json")
    assert [result.check for result in report.results] == ["minimality", "norms"]
    assert report.thresholds["minimal"] == 0.5
    assert report.verdict in capsys.readouterr().out
    assert len(pd.read_csv(out / "numbers.csv")) == len(report.to_dataframe())
    assert "for_while" in (out / "report.html").read_text(encoding="utf-8")
    words = refused(
        capsys, "evaluate", str(solver), str(tmp_path), "--out", str(out),
        "--evaluation.checks", "X", "Y",
    )  # fmt: skip
    assert "unknown checks X, Y; choose from attention_patterns" in words


# --------------------------------------------------------------------------------------------------
# many circuits


def test_a_sweep_leaves_a_row_and_a_circuit_for_every_setting(
    capsys, solver, sixty_sources, tmp_path
):
    out = tmp_path / "sweep"
    cli.main(
        ["sweep", str(solver), "--out", str(out), "--targets", "0.3", "0.15",
         "--seeds", "0", "1", "--tasks", "for_while", "var_if", "--mean-sequences", "9",
         "--corpus.sources", str(sixty_sources), *QUICK]
    )  # fmt: skip
    rows = pd.read_csv(out / "sweep.csv")
    assert len(rows) == 8
    found = rows[rows["task"] == "for_while"]
    settings = sorted(map(tuple, found[["target_loss", "seed"]].values.tolist()))
    assert settings == [(0.15, 0), (0.15, 1), (0.3, 0), (0.3, 1)]
    model = SparseTransformer.from_pretrained(solver)
    for row in found.itertuples():
        circuit = Circuit.load(out / "circuits" / row.circuit, model)
        assert (circuit.n_nodes, circuit.seed) == (row.nodes, row.seed)
        assert circuit.target_loss == row.target_loss
    # a task that the model does not do leaves its reason, not the others
    refused_rows = rows[rows["task"] == "var_if"]
    assert refused_rows["failure"].str.contains("does not solve the task").all()
    assert f"8 rows in {out / 'sweep.csv'}" in capsys.readouterr().out


def test_a_sweep_takes_the_tasks_that_the_model_does(solver, sixty_sources, tmp_path):
    out = tmp_path / "sweep"
    cli.main(
        ["sweep", str(solver), "--out", str(out), "--l0-penalties", "0.001", "0.01",
         "--mean-sequences", "9", "--corpus.sources", str(sixty_sources), *QUICK]
    )  # fmt: skip
    rows = pd.read_csv(out / "sweep.csv")
    assert set(rows["task"]) == {"for_while"}
    assert sorted(rows["l0_penalty"]) == [0.001, 0.01]


def test_a_sweep_is_refused_before_anything_runs(capsys, tmp_path):
    start = ("sweep", "m", "--out", str(tmp_path / "o"))
    assert "unknown task(s) quotes; choose from" in refused(capsys, *start, "--tasks", "quotes")
    words = refused(capsys, *start, "--search-rounds", "2", "--l0-penalties", "0.1")
    assert "l0_penalties and lrs are what the search chooses" in words
    assert "target_loss=3.0" in refused(capsys, *start, "--targets", "3.0")
    assert not (tmp_path / "o").exists()


def test_a_search_keeps_its_trials_and_the_best_circuit(solver, sixty_sources, tmp_path):
    pytest.importorskip("optuna")
    out = tmp_path / "sweep"
    cli.main(
        ["sweep", str(solver), "--out", str(out), "--tasks", "for_while",
         "--search-rounds", "1", "--mean-sequences", "9",
         "--corpus.sources", str(sixty_sources), *QUICK]
    )  # fmt: skip
    rows = pd.read_csv(out / "sweep.csv")
    assert len(rows) == 1
    circuit = Circuit.load(
        out / "circuits" / rows["circuit"][0], SparseTransformer.from_pretrained(solver)
    )
    assert circuit.n_nodes == rows["nodes"][0]
    assert (out / "search" / "for_while-0.15-seed0.db").is_file()


def test_the_frontier_of_folders_is_a_table_and_a_figure(capsys, solver, sixty_sources, tmp_path):
    out, twin = tmp_path / "f", tmp_path / "twin"
    SparseTransformer.from_pretrained(solver).save_pretrained(twin)
    cli.main(
        ["frontier", str(solver), str(twin), "--out", str(out), "--sequences", "9",
         "--groups", "one", "one", "--corpus.sources", str(sixty_sources), *QUICK]
    )  # fmt: skip
    rows = pd.read_csv(out / "frontier.csv")
    assert list(rows["model"]) == [str(solver), str(twin)]
    assert set(rows["group"]) == {"one"}
    assert set(pd.read_csv(out / "tasks.csv")["task"]) == {"for_while"}
    assert "one: loss" in (out / "frontier.html").read_text(encoding="utf-8")
    assert "the tasks that all 2 models solve: for_while" in capsys.readouterr().out


def test_a_frontier_is_refused_before_anything_runs(capsys):
    assert "1 groups for 2 models" in refused(capsys, "frontier", "a", "b", "--groups", "x")
    assert "named twice" in refused(capsys, "frontier", "a", "a")


def test_a_study_is_run_and_written(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(studies, "run_study", lambda config, say: seen.append(config) or "result")
    monkeypatch.setattr(studies, "write_study", lambda result: tmp_path / result)
    cli.main(["study", "here", "--widths", "16", "--l0", "0.5", "0.25", "--l0-unit", "density"])
    (config,) = seen
    assert (config.out, config.widths, config.l0) == ("here", (16,), (0.5, 0.25))
    assert str(tmp_path / "result") in capsys.readouterr().out
    assert "must lie in (0, 1]" in refused(capsys, "study", "here", "--l0", "99999999")


@pytest.mark.parametrize(
    ("command", "made", "work"),
    [("demo", "report.html", "run_demo"), ("study", "report.html", "run_study"),
     ("pair", "python-dense-seed1/README.md", "train_pair")],
)  # fmt: skip
def test_a_finished_experiment_is_replaced_only_with_overwrite(
    monkeypatch, capsys, tmp_path, command, made, work
):
    runs = []
    monkeypatch.setattr(studies, work, lambda config, say: runs.append(config) or [])
    for each in ("write_report", "write_study"):
        monkeypatch.setattr(studies, each, lambda result: tmp_path)
    where = [str(tmp_path)] if command == "study" else ["--out", str(tmp_path)]
    cli.main([command, *where])  # nothing is there, or an earlier run was interrupted
    assert len(runs) == 1
    (tmp_path / made).parent.mkdir(exist_ok=True)
    (tmp_path / made).touch()
    assert f"has {made} already" in refused(capsys, command, *where)
    assert len(runs) == 1
    cli.main([command, *where, "--overwrite"])
    assert len(runs) == 2
