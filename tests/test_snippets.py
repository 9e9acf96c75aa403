"""The snippets of README, docs and notebooks, in the order in which a reader meets them."""

from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest

from tests.snippets import (
    PAGES,
    ROOT,
    as_program,
    command_lines,
    misused,
    programs,
    run,
    stand_in,
    undefined,
    wrong_command,
)

OTHERS = [ROOT / "notebooks" / f"{name}_quote_circuit" for name in ("dense", "bridged")]
RUN = (
    "bridges.md", "faithfulness.md", "files.md", "heads.md", "pages.md", "tracing.md",
    "tutorial_own_model.md", "tutorial_own_task.md",
)  # fmt: skip
"""Pages that are run as well. released_models.md names nodes of a model of eleven layers and two
thousand channels; notebook 05 makes its calls on a small one."""
PROGRAMS = programs()


READ = [*PROGRAMS, *sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_no_name_comes_before_its_definition(page):
    assert undefined(page) == []


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_call_is_one_that_the_package_takes(page):
    assert misused(page) == []


def test_a_program_has_the_lines_of_its_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\ntext\n\n```python\ny = x\n```\n")
    lines = as_program(page).splitlines()
    assert lines[0].startswith("# mypy:")
    assert {i: line for i, line in enumerate(lines[1:], start=2) if line} == {
        4: "x = 1",
        10: "y = x",
    }


def test_what_is_wrong_in_a_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nimport tl_sparse as tls\nx = tls.prun(1)\n```\n\n"
        "```python\ntls.prune(y, y, setings=1)\nfor y in ():\n    print(z)\n```\n"
    )
    assert undefined(page) == ["page.md:9: z"]
    (first, second) = misused(page)
    assert first.startswith("page.md:3: ")
    assert "prun" in first
    assert second.startswith("page.md:7: got an unexpected keyword argument 'setings'")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_is_one_that_would_begin(page):
    wrong = {" ".join(words): wrong_command(words) for words in command_lines(page)}
    assert {line: why for line, why in wrong.items() if why} == {}


def test_what_is_wrong_in_a_command_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`tl-sparse prune` and `tl-sparse prun x`, `make demo ARGS=--quick`\n\n"
        "```sh\nmake tests  # all\ntl-sparse prune python-sparse task --outt o\n"
        "python benchmarks/none.py --x\n```\n"
    )
    found = [wrong_command(words) for words in command_lines(page)]
    assert found[0] == "no target 'tests'"
    assert "--outt" in found[1] or "--out" in found[1]
    assert found[2:] == ["no file benchmarks/none.py", None, "no command 'prun'", None]


@pytest.fixture(scope="module")
def ready():
    """A model, its circuit, some text, and results of what is slow."""
    import tl_sparse as tls
    from tl_sparse.ablation.text import sequences_of
    from tl_sparse.data.bundled_text import bundled_text

    model = tls.SparseTransformer.from_pretrained("python-sparse")
    quotes = tls.Circuit.load(ROOT / "notebooks" / "quote_circuit", model)
    task = tls.tasks.get("single_double_quote", model)
    few = tls.faithfulness.EvaluationConfig(checks=("minimality",), pairs=2, controls=1)
    return SimpleNamespace(
        model=model,
        quotes=quotes,
        tokens=sequences_of(model, bundled_text()[:2]),
        report=tls.evaluate(model, quotes, task, few, progress=False),
        result=tls.tasks.evaluate_task(model, task, n_pairs=2),
    )


@pytest.fixture
def quick(monkeypatch, tmp_path, ready):
    """What is slow, or needs a network, gives a ready result; its arguments are checked."""
    import tl_sparse as tls
    from tl_sparse import bridges, compat, heads, tracing

    model, quotes = ready.model, ready.quotes
    assert quotes.task == "single_double_quote"

    def replaced(owner, name, result=None):
        monkeypatch.setattr(owner, name, stand_in(getattr(owner, name), result))

    def of_model(model, *_, **__):
        for folder in () if isinstance(model, str) else OTHERS:
            with suppress(ValueError):  # it is another model's
                return tls.Circuit.load(folder, model)
        return quotes

    replaced(tls, "prune", of_model)
    replaced(tls, "faithful_prune", quotes)
    replaced(tls, "prune_many", [quotes] * 8)
    replaced(tls, "evaluate", ready.report)
    replaced(tls.tasks, "evaluate_task", ready.result)
    for name in ("circuit_from_ranking", "hard_concrete", "search", "prune_edges"):
        replaced(tls.circuits, name, quotes)
    for owner, name in (
        (tls.faithfulness, "necessity"), (tls.tasks, "table"),
        (tls.circuits, "ablation_importance"), (tls.circuits, "rank_nodes"),
        (tls.Circuit, "write_page"), (tls.SparseTransformer, "push_to_hub"),
    ):  # fmt: skip
        replaced(owner, name)
    replaced(tls.studies, "frontier", SimpleNamespace(to_plotly=lambda: None))
    replaced(tls.data, "validation_text", ready.tokens)
    corpus = {"tokenizer": model.tokenizer, "validation_sequences": lambda *_, **__: ready.tokens}
    replaced(tls.data, "build_corpus", SimpleNamespace(**corpus))
    replaced(tls, "Trainer", SimpleNamespace(train=lambda: None))
    for owner, name in (
        (bridges, "bridge_released"), (bridges, "train_bridges"), (tracing, "read_dictionary"),
        (tracing, "train_dictionaries"),
    ):  # fmt: skip
        replaced(owner, name, (None, None))
    replaced(compat, "pretrained", model)
    few = heads.contrastive(tls.tasks.get("single_double_quote", model), model, n=12)
    replaced(heads, "contrastive", few)
    trace_each = tracing.trace_each
    monkeypatch.setattr(
        tracing, "trace_each", lambda splice, batch: trace_each(splice, batch.pairs(0, 1))
    )
    fit = partial(heads.DiscreteSAE.fit, epochs=1)
    monkeypatch.setattr(heads.DiscreteSAE, "fit", fit)
    load = tls.SparseTransformer.from_pretrained
    names = {"you/your-model": "folder"}
    monkeypatch.setattr(
        tls.SparseTransformer, "from_pretrained", lambda name: load(names.get(name, name))
    )
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("my-model/model")
    return quotes


@pytest.mark.parametrize("name", RUN)
def test_a_page_runs_from_top_to_bottom(quick, name):
    assert run(ROOT / "docs" / name)


def test_readme_runs_from_top_to_bottom(quick):
    names = run(ROOT / "README.md")
    assert names["small"].token_ids.numel() == 2  # the two answers
    assert names["mine"].name == "mine"
    assert names["circuit"].task == "single_double_quote"  # of heads, in the last snippet but one
