"""Notebooks are stored with outputs that hold; how that is told. `make notebooks` runs them."""

import hashlib
import re
import tempfile
from base64 import b64encode
from html import unescape

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebook_outputs import (
    PLOTLY,
    VARIES,
    clean,
    code_cells,
    digest,
    foreign_paths,
    other_numbers,
    stale,
)
from tests.notebooks import read, stored_notebooks

MEGABYTES = 5.0
NOTEBOOKS = stored_notebooks()


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def stored(request):
    return read(request.param)


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


# --------------------------------------------------------------------------------------------------
# those that are stored


def test_outputs_are_those_of_the_cells_as_they_are(stored):
    assert stored.metadata["tl_sparse"]["sources"] == digest(stored)
    assert stored.metadata["tl_sparse"]["version"]
    assert [cell.execution_count for cell in code_cells(stored)] == list(
        range(1, len(code_cells(stored)) + 1)
    )
    assert outputs(stored)


def test_a_circuit_is_drawn_in_its_first_two_cells(stored):
    shown = [o for cell in stored.cells[:2] for o in cell.get("outputs", [])]
    assert any("image/svg+xml" in output.data for output in shown)


def test_it_ends_with_a_short_cell_for_the_readers_own_task(stored):
    headings = [i for i, c in enumerate(stored.cells) if "## Now with your task" in c.source]
    assert len(headings) == 1
    cell = stored.cells[headings[0] + 1]
    assert cell.cell_type == "code"
    assert len(cell.source.splitlines()) <= 20
    assert "my" in cell.source  # what a reader changes is called so


def test_every_figure_has_a_picture_beside_it(stored):
    figures = [output.data for output in outputs(stored) if PLOTLY in output.get("data", {})]
    assert all(
        data["image/png"].startswith("iVBORw0KGgo") for data in figures
    )  # a PNG's first bytes


def test_nothing_of_the_machine_is_in_them(stored):
    assert foreign_paths(stored) == []
    assert [
        o for o in outputs(stored) if o.get("name") == "stderr" or o.output_type == "error"
    ] == []
    before = nbformat.writes(stored)
    clean(stored)
    assert nbformat.writes(stored) == before


def test_all_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MEGABYTES * 1e6


# --------------------------------------------------------------------------------------------------
# what is compared


def html(text):
    return new_output("execute_result", {"text/html": text, "text/plain": "wraps here or there"})


def notebook(*outputs, source="f()", tags=()):
    made = new_notebook(cells=[new_markdown_cell("# T", id="a"), new_code_cell(source, id="b")])
    made.cells[1].outputs = list(outputs)
    made.cells[1].metadata["tags"] = list(tags)
    made.metadata["tl_sparse"] = {"sources": digest(made)}
    return made


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def figure(title="loss", **trace):
    data = {"data": [{"type": "bar", **trace}], "layout": {"title": {"text": title}}}
    return new_output("display_data", {PLOTLY: data})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (printed("loss 0.31, 12 nodes\n"), printed("loss  -1.2e-05, 1,234 nodes\n")),
        (printed("model 1a2b3c4d5e6f7a8b is here"), printed("model ffffffffffff0000 is here")),
        (html("<td>0.25</td><td>head</td>"), html("<td class='n'>-1e-3</td> <td>head</td>")),
        (html("<p>a</p><iframe srcdoc='old'></iframe>"), html("<p>a</p><iframe srcdoc='new'>")),
        (html("<style>a{}</style>x"), html("<style>b{}</style>x")),
        (figure(y=[1, 2]), figure(y=[3, 4])),
    ],
)
def test_numbers_and_styles_may_differ(before, after):
    assert stale(notebook(before), notebook(after)) == []


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (printed("the task holds"), printed("the task fails"), 'stored "holds", now "fails"'),
        (printed("a b"), printed("a b c"), 'stored "", now "c"'),
        (html("<td>a</td><td>1</td>"), html("<td>a</td><td>1</td><td>2</td>"), 'now "#"'),
        (printed("loss 0.3"), printed("loss nan"), 'stored "#", now "nan"'),
        (figure("loss"), figure("nodes"), 'stored "loss", now "nodes"'),
        (figure(name="sparse"), figure(name="dense"), 'stored "sparse'),
        (figure(), printed("figure"), f"outputs were {PLOTLY}, now text"),
    ],
)
def test_other_words_are_stale(before, after, words):
    (problem,) = stale(notebook(before), notebook(after))
    assert problem.startswith("cell 1: ")
    assert words in problem


def test_an_output_that_came_or_went_is_stale():
    some = printed("a")
    assert stale(notebook(), notebook(some)) == ["cell 1: outputs were none, now text"]
    assert stale(notebook(some), notebook()) == ["cell 1: outputs were text, now none"]


def test_a_cell_that_was_edited_since_is_stale_even_if_it_tells_the_same():
    before, after = (notebook(printed("a"), source="f()") for _ in range(2))
    before.cells[1].source = "g()"
    assert stale(before, after) == ["its cells were edited after their outputs were stored"]


def test_a_notebook_without_outputs_is_stale():
    new = notebook(printed("a"))
    del new.metadata["tl_sparse"]
    assert stale(new, notebook(printed("a"))) == ["its outputs were never stored"]


def test_of_a_cell_that_varies_only_kinds_are_compared():
    before, after = (notebook(printed(text), tags=[VARIES]) for text in ("indent_for", "var_if"))
    assert stale(before, after) == []
    assert stale(before, notebook(html("a"), tags=[VARIES])) != []


def test_other_numbers_are_named():
    before, after = notebook(printed("12 nodes")), notebook(printed("13 nodes"))
    assert stale(before, after) == []
    assert other_numbers(before, after) == [1]
    assert other_numbers(before, before) == []


# --------------------------------------------------------------------------------------------------
# what is kept


def test_progress_durations_and_paths_are_not_kept(tmp_path):
    made = notebook(
        printed("took 3.2 s"), printed("50%|###", "stderr"), printed(f" in {tmp_path}/x\n")
    )
    made.cells[1].execution_count = 7
    made.cells[1].metadata["execution"] = {"shell.execute_reply": "2026"}
    clean(made)
    inside = str(tmp_path).removeprefix(tempfile.gettempdir())
    (output,) = made.cells[1].outputs
    assert output.text == f"took … s in tmp{inside}/x\n"
    assert made.cells[1].execution_count == 1
    assert "execution" not in made.cells[1].metadata


def test_scripts_of_pages_in_frames_are_kept_as_they_are():
    page = '<p>in 3 s</p><iframe srcdoc="<script>for(var u=0,s=1;;)</script>"></iframe> 4 min'
    made = notebook(html(page))
    clean(made)
    kept = made.cells[1].outputs[0].data["text/html"]
    assert kept == page.replace("in 3 s", "in … s").replace("4 min", "… min")


def test_the_scripts_of_stored_pages_are_those_that_their_policies_allow(stored):
    """A browser does not run any other."""
    scripts = 0
    for output in outputs(stored):
        for frame in re.findall(r'srcdoc="([^"]*)"', output.get("data", {}).get("text/html", "")):
            page = unescape(frame)
            for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL):
                name = b64encode(hashlib.sha256(script.encode()).digest()).decode()
                assert f"'sha256-{name}'" in page
                scripts += 1
    assert scripts > 0


def test_a_path_of_the_machine_is_found():
    assert foreign_paths(notebook(html("<b>/home/me/x</b>"))) == ["/home/me"]
    assert foreign_paths(notebook(html("a/home/b, ~/tmp/x, </opt>"))) == []
