import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import tl_sparse
from tl_sparse.views import (
    Bullets,
    Chart,
    CircuitTable,
    Look,
    Page,
    PageCircuit,
    PageExample,
    Panel,
    Section,
    Table,
    Text,
    chart,
    circuit_figure,
    circuit_html,
    circuit_svg,
    frame_html,
    page_html,
)

KINDS = ("joined", "bars")

HOSTILE = (
    "<|endoftext|>",
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "\u2028",
    " a\n",
    "&lt;",
)


class Parsed(HTMLParser):
    """Collects elements with their attributes, and the texts of elements by class."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.scripts = [], [], []
        self._open = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append((tag, dict(attrs).get("class") or ""))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        tag, class_ = self._open[-1] if self._open else ("", "")
        if tag == "script":
            self.scripts[-1] += data
        self.texts.append((tag, class_, data))

    def of_class(self, name):
        return [text for _, class_, text in self.texts if name in class_.split()]

    def of_tag(self, name):
        return [text for tag, _, text in self.texts if tag == name]


def example(tokens=("print", '("'), activations=None, **values):
    facts = {
        "correct_token": '")',
        "incorrect_token": "')",
        "p_model": 0.97,
        "p_circuit": 0.9,
        **values,
    }
    return PageExample(tokens=tokens, activations=activations, **facts)


QUOTE = pd.DataFrame({"loss": [0.15]}, index=pd.Index(["quote"], name="task"))


def report(*circuits, table=QUOTE, notes=("One seed only.",), **parts):
    facts = {
        "title": "Circuits of toy",
        "summary": "One.\n\nTwo.",
        "facts": (("validation loss", "3.41"),),
        "sections": (
            Section("Results", () if table.empty else (Table(table),)),
            Section("Read with care", (Bullets(notes),) if notes else ()),
        ),
        **parts,
    }
    return Page(circuits=circuits, **facts)


def payload(page):
    return json.loads(page.scripts[0])


def test_page_has_all_its_parts(quote_circuit):
    page = Parsed(page_html(report(PageCircuit(quote_circuit, "sparse", (example(),)))))
    assert page.of_tag("h1") == ["Circuits of toy"]
    assert page.of_class("summary") == ["One.", "Two."]
    assert "validation loss" in page.of_tag("dt")
    assert "One seed only." in page.of_tag("li")
    assert "0.150" in page.of_tag("td")
    (circuit,) = payload(page)["circuits"]
    assert circuit["examples"][0]["tokens"] == ["print", '("']
    assert len(circuit["nodes"]) == 12


def test_page_asks_no_network(quote_circuit):
    html = page_html(report(PageCircuit(quote_circuit, "sparse")))
    page = Parsed(html)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    scripts = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert len(digests) == 2
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        f"form-action 'none'; script-src {hashes}"
    )
    ours = html.replace(scripts[0], "")
    assert set(re.findall(r"https?://[^\"' ]+", ours)) == {"http://www.w3.org/2000/svg"}
    assert "Copyright 2010-2026 Mike Bostock" in scripts[0]
    assert "Redistribution and use" in scripts[0]  # d3-ease's licence
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "base"}
    assert not [a for _, a in page.elements if "src" in a]
    assert "@import" not in html
    assert "url(" not in ours


def test_page_follows_the_colour_scheme(quote_circuit):
    assert "prefers-color-scheme: dark" in page_html(report(PageCircuit(quote_circuit, "x")))


def test_hostile_texts_stay_texts(quote_circuit):
    evil = HOSTILE[1]
    shown = PageCircuit(
        quote_circuit, evil, (example(HOSTILE, correct_token=evil, incorrect_token="<b>"),)
    )
    table = pd.DataFrame({evil: [evil]}, index=[evil])
    html = page_html(
        report(shown, title=evil, summary=evil, facts=((evil, evil),), table=table, notes=(evil,))
    )
    page = Parsed(html)
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert not {tag for tag, _ in page.elements} & {"img", "b"}
    (circuit,) = payload(page)["circuits"]
    assert circuit["examples"][0]["tokens"] == [
        "<|endoftext|>", "</script><img·src=x·onerror=alert(1)>", "<!--", "\\u2028", "·a↵", "&lt;",
    ]  # fmt: skip
    assert circuit["examples"][0]["correct"] == evil.replace(" ", "·")


EVIL = "</title></script><script>1</script><img src=x><a href=//x>$\\href{x}{y}$\x00\u202e'\"&"
"""What would break out of any place: elements, attributes, scripts, Plotly's HTML, MathJax."""
HARMLESS = "w" * len(EVIL)


@cache
def crowded(text):
    """A page with a text in every place that takes one."""
    panel = {"series": text, "label": text, "hover": text, "line": text, "y": 1.0}
    named = pd.DataFrame([panel | {"x": text}, panel | {"x": f"{text}2"}])
    numbers = pd.DataFrame([panel | {"x": x} for x in (1.0, 2.0)])
    panels = [
        Panel(named, text, text, text),
        Panel(numbers.assign(y=text), text, text, text, x_level=(1.0, text)),
        Panel(numbers, text, text, text, y_level=(1.0, text)),
    ]
    charts = [chart(text, panels, look=Look(kind), note=text) for kind in KINDS]
    nodes = pd.DataFrame({"layer": 0, "site": [f"{text}1", f"{text}2"], "channel": [1, 2]})
    nodes = nodes.assign(hook=nodes["site"])
    nodes["head"] = nodes["head_channel"] = pd.array([None, None], dtype="Int64")
    edges = pd.DataFrame(
        [(0, f"{text}1", 1, f"{text}2", 2, text, 0.5)],
        columns=["layer", "source_site", "source", "target_site", "target", "matrix", "weight"],
    )
    circuit = CircuitTable(text, nodes, edges, model_name=text, accuracy=0.5)
    shown = example((text, text), {f"0.{text}1.1": [0.1, 0.2]}, correct_token=text,
                    incorrect_token=text)  # fmt: skip
    table = pd.DataFrame({text: [text], "outcome": [text]}, index=pd.Index([text], name=text))
    blocks = (Text(text), Bullets((text,)), Table(table, text), Table(table, max_rows=0),
              *map(Chart, charts), Chart(circuit_figure(circuit)))  # fmt: skip
    return Page(
        text, text, ((text, text),), (Section(text, blocks),),
        (PageCircuit(circuit, text, (shown,)), PageCircuit(circuit, text),
         PageCircuit(replace(circuit, task=f"{text}2"), text)),
    ), circuit, table  # fmt: skip


def strings(value):
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in strings(item)]


def test_no_text_in_any_place_of_a_page_changes_what_the_page_consists_of():
    hostile, harmless = (Parsed(page_html(crowded(text)[0])) for text in (EVIL, HARMLESS))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    assert [set(attrs) for _, attrs in hostile.elements] == [
        set(attrs) for _, attrs in harmless.elements
    ]
    found = [value for _, attrs in hostile.elements for value in attrs.values() if value]
    found += [text for tag, _, text in hostile.texts if tag not in ("script", "style")]
    assert all(line.isprintable() for text in found for line in text.split("\n"))
    assert any("<a href=//x>" in text for text in found)  # it is shown, as text


def test_no_text_in_any_place_of_a_figure_is_read_as_html_or_tex():
    page, _, _ = crowded(EVIL)
    drawn = [
        json.loads(b.figure.to_json()) for b in page.sections[0].blocks if isinstance(b, Chart)
    ]
    for trace in (trace for figure in drawn for trace in figure["data"]):
        for never_shown in ("legendgroup", "customdata"):
            trace.pop(never_shown, None)
    shown = [text for text in strings(drawn) if "href" in text]
    assert len(shown) > 40
    for text in shown:
        assert not set(re.findall("<[^>]*>", text)) - {"<br>", "<b>", "</b>", "<sub>", "</sub>"}
        assert "$" not in text


def test_displays_are_of_the_same_elements_whatever_the_texts():
    for draw in (
        lambda text: circuit_html(crowded(text)[1]),
        lambda text: frame_html(text, text, crowded(text)[2]),
        lambda text: circuit_svg(crowded(text)[1]),
    ):
        hostile, harmless = Parsed(draw(EVIL)), Parsed(draw(HARMLESS))
        assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
        assert [set(a) for _, a in hostile.elements] == [set(a) for _, a in harmless.elements]
    assert ET.fromstring(circuit_svg(crowded(EVIL)[1])) is not None  # a file of its own
    assert "mathjax_ignore" in frame_html("a", "b", QUOTE)


def test_html_and_figures_are_written_in_one_place_each():
    """What is written elsewhere goes round the escapes above."""
    package = Path(tl_sparse.__file__).parent
    found = {}
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for words in ("<!doctype", "tostring(", ".to_html(", "write_html", "plotly.subplots",
                      "go.Figure(", "Markdown("):  # fmt: skip
            if words in source:
                found.setdefault(words, []).append(path.relative_to(package).as_posix())
    assert found == {
        "<!doctype": ["views/markup.py"],
        "tostring(": ["views/markup.py"],
        "plotly.subplots": ["views/chart.py"],
        "go.Figure(": ["views/circuit_figure.py", "views/heat_map.py"],
    }


def test_page_can_be_written_whatever_the_tokens(quote_circuit):
    shown = PageCircuit(quote_circuit, "x", (example(("\ud800", "\x00")),))
    assert page_html(report(shown)).encode("utf-8")


def test_activations_reach_the_script_by_node(quote_circuit):
    first = example(activations={"0.mlp_neuron.863": [0.5, -1.23456]})
    second = example(("a",), {"10.attn_q.657": np.array([2.0])})
    page = Parsed(page_html(report(PageCircuit(quote_circuit, "x", (first, second)))))
    (circuit,) = payload(page)["circuits"]
    place = {node["id"]: str(i) for i, node in enumerate(circuit["nodes"])}
    assert circuit["activations"] == {
        place["0.mlp_neuron.863"]: [[0.5, -1.235], None],
        place["10.attn_q.657"]: [None, [2.0]],
    }


def test_script_knows_all_edges(random_circuit_of):
    circuit = random_circuit_of(320, 3000)
    (data,) = payload(Parsed(page_html(report(PageCircuit(circuit, "dense")))))["circuits"]
    assert len(data["edges"]) == circuit.n_edges > 800


def test_edges_in_the_script_join_the_right_nodes(quote_circuit):
    page = Parsed(page_html(report(PageCircuit(quote_circuit, "x"))))
    (data,) = payload(page)["circuits"]
    ids, matrices = [node["id"] for node in data["nodes"]], data["matrices"]
    named = {(ids[a], ids[b], matrices[m], w) for a, b, m, w in data["edges"]}
    assert ("10.attn_in.985", "10.attn_k.657", "W_K", 1.56) in named


def test_circuits_of_a_task_stand_together_and_are_compared(quote_circuit, circuit_of):
    other = circuit_of([(0, "mlp_in", 1)], [], task="bracket")
    html = page_html(
        report(
            PageCircuit(quote_circuit, "sparse"),
            PageCircuit(other, "alone"),
            PageCircuit(quote_circuit, "dense"),
        )
    )
    page = Parsed(html)
    assert page.of_tag("h3") == ["sparse", "dense", "alone"]
    assert [a["data-circuit"] for _, a in page.elements if "data-circuit" in a] == ["0", "2", "1"]
    assert [len(c["nodes"]) for c in payload(page)["circuits"]] == [12, 1, 12]
    assert "97.2 %" in page.of_tag("td")
    assert page.of_tag("h2")[2:] == ["single_double_quote", "bracket"]


def test_table_formats_counts_shares_and_gaps():
    table = pd.DataFrame(
        {
            "edges": [1234, 9],
            "dense edges": [51234.0, np.nan],
            "loss": [-0.0123, 0.15],
            "kept": pd.array([3, None], dtype="Int64"),
            "done": [True, False],
            "note": ["a", None],
        }
    )
    cells = Parsed(page_html(report(table=table))).of_tag("td")
    assert cells == [
        "1,234", "51,234", "−0.0123", "3", "yes", "a", "9", "–", "0.150", "–", "no", "–",
    ]  # fmt: skip


def test_page_without_circuits_or_table_is_a_page():
    page = Parsed(page_html(report(table=pd.DataFrame(), notes=(), facts=(), summary="")))
    assert payload(page)["circuits"] == []
    assert len(page.scripts) == 1
    assert not page.of_tag("h2")


def test_long_tables_open_on_a_click_and_say_that_they_are_cut():
    table = Table(pd.DataFrame({"x": range(1200)}), fold="<curve>", max_rows=3)
    page = Parsed(page_html(Page("t", sections=(Section("s", (table,)),))))
    assert page.of_tag("td") == ["0", "1", "2"]
    assert page.of_tag("small") == ["1,200 rows, the first 3 are shown"]
    assert page.of_tag("summary") == ["<curve> "]


def test_outcomes_are_marked():
    table = pd.DataFrame({"outcome": ["passed", "not measured"], "other": ["passed", ""]})
    page = Parsed(page_html(Page("t", sections=(Section("s", (Table(table), Text("a"))),))))
    assert page.of_class("passed") == ["✓ passed"]
    assert page.of_tag("td") == ["✓ passed", "passed", "not measured"]


def test_charts_are_in_the_page_with_what_draws_them():
    points = pd.DataFrame({"series": "</script><b>", "x": [1.0, 2.0], "y": [0.0, math.nan]})
    figure = chart("</script><i>", [Panel(points, "x", "y")])
    html = page_html(Page("t", sections=(Section("s", (Chart(figure), Chart(figure))),)))
    page = Parsed(html)
    assert [a["data-chart"] for _, a in page.elements if "data-chart" in a] == ["0", "1"]
    library, data, drawing = page.scripts
    assert "Plotly.react" in drawing
    assert len(library) > 1_000_000
    assert json.loads(data)["charts"][0]["data"][0]["name"] == "&lt;/script&gt;&lt;b&gt;"
    assert not {tag for tag, _ in page.elements} & {"b", "i"}
    assert "src=" not in html.split("<body>")[1]


@pytest.mark.parametrize("what", ["tokens", "texts", "effects"])
def test_what_is_said_of_an_unknown_node_is_refused(quote_circuit, what):
    unknown = "0.mlp_neuron.1"
    said = {
        "tokens": pd.DataFrame(
            {"node": [unknown], "side": ["logits"], "text": ["a"], "weight": [1.0]}
        ),
        "texts": {unknown: {}}, "effects": {unknown: 1.0},
    }  # fmt: skip
    shown = PageCircuit(quote_circuit, "x", **{what: said[what]})
    with pytest.raises(ValueError, match=f"{what} are given of '{unknown}', which is not a node"):
        page_html(Page("t", circuits=(shown,)))


def test_activation_of_an_unknown_node_is_refused(quote_circuit):
    shown = PageCircuit(quote_circuit, "x", (example(activations={"0.mlp_neuron.1": [0.0, 0.0]}),))
    with pytest.raises(ValueError, match=r"'0.mlp_neuron.1', which is not a node.*0.mlp_in.205"):
        page_html(report(shown))


def test_activations_of_the_wrong_length_are_refused(quote_circuit):
    shown = PageCircuit(quote_circuit, "x", (example(activations={"0.mlp_in.205": [0.0]}),))
    with pytest.raises(ValueError, match=r"example 0 has 2 tokens but activations of shape \(1,\)"):
        page_html(report(shown))


def test_activations_that_are_not_finite_are_refused(quote_circuit):
    values = {"0.mlp_in.205": [0.0, float("nan")]}
    with pytest.raises(ValueError, match=r"0.mlp_in.205 in example 0 are not finite"):
        page_html(report(PageCircuit(quote_circuit, "x", (example(activations=values),))))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_probability_outside_the_unit_interval_is_refused(quote_circuit, p):
    shown = PageCircuit(quote_circuit, "x", (example(p_circuit=p),))
    with pytest.raises(ValueError, match=r"p_circuit of example 0 must lie in \[0, 1\]"):
        page_html(report(shown))
