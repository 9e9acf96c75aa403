"""The snippets of README and docs, in the order in which a reader meets them."""

from functools import partial
from types import SimpleNamespace

import pytest

from tests.snippets import ROOT, misused, run, snippets, stand_in, undefined

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PIECES = {"contributing.md"}
"""Pages whose snippets are pieces of files, not programs."""
PROGRAMS = [page for page in PAGES if snippets(page) and page.name not in PIECES]


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_no_name_comes_before_its_definition(page):
    assert undefined(page) == []


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_every_call_is_one_that_the_package_takes(page):
    assert misused(page) == []


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


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """What is slow, or needs a network, gives a ready result; its arguments are checked."""
    import tl_sparse as tls
    from tl_sparse import heads
    from tl_sparse.ablation.text import sequences_of
    from tl_sparse.data.bundled_text import bundled_text

    model = tls.SparseTransformer.from_pretrained("python-sparse")
    quotes = tls.Circuit.load(ROOT / "notebooks" / "quote_circuit", model)
    assert quotes.task == "single_double_quote"

    def replaced(owner, name, result=None):
        monkeypatch.setattr(owner, name, stand_in(getattr(owner, name), result))

    for name in ("prune", "faithful_prune"):
        replaced(tls, name, quotes)
    replaced(tls, "prune_many", [quotes] * 8)
    replaced(tls, "evaluate")
    for name in ("circuit_from_ranking", "hard_concrete", "search", "prune_edges"):
        replaced(tls.circuits, name, quotes)
    for owner, name in (
        (tls.faithfulness, "necessity"), (tls.tasks, "table"), (tls.tasks, "evaluate_task"),
        (tls.circuits, "ablation_importance"), (tls.circuits, "rank_nodes"),
        (tls.Circuit, "write_page"), (tls.SparseTransformer, "push_to_hub"),
    ):  # fmt: skip
        replaced(owner, name)
    replaced(tls.studies, "frontier", SimpleNamespace(to_plotly=lambda: None))
    replaced(tls.data, "validation_text", sequences_of(model, bundled_text()[:2]))
    replaced(tls.data, "build_corpus", SimpleNamespace(tokenizer=model.tokenizer))
    replaced(tls, "Trainer", SimpleNamespace(train=lambda: None))
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


def test_readme_runs_from_top_to_bottom(quick):
    names = run(ROOT / "README.md")
    assert names["small"].token_ids.numel() == 2  # the two answers
    assert names["mine"].name == "mine"
    assert names["circuit"].task == "single_double_quote"  # of heads, in the last snippet but one
