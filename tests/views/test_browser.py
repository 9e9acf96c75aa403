"""The page in a real browser: a headless Chromium, where there is one."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.chromium import NAMES, chromium_path

CHOSEN = ".panel h4"


@pytest.fixture(scope="module")
def chromium():
    """A browser that is closed with the module."""
    api = pytest.importorskip("playwright.sync_api")
    path = chromium_path()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """Opens circuits as a page; fails on a console message, an error, or a request."""
    heard, contexts = [], []

    def opened(*circuits, html=None, width=1400, height=900, scheme="light"):
        from tl_sparse.views import Page, page_html

        path = tmp_path / "page.html"
        path.write_text(html or page_html(Page("A page", circuits=circuits)), encoding="utf-8")
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        allowed = ("file:", "data:", "blob:", "about:")
        page.on("request", lambda r: None if r.url.startswith(allowed) else heard.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelector('iframe, .drawing[data-drawn]')")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert heard == []


@pytest.fixture
def full(quote_circuit):
    """A circuit with all that a page can show."""
    from tl_sparse.views import PageCircuit, PageExample
    from tl_sparse.views.examples import TokenExample

    pattern = np.tril(np.full((3, 3), 0.1))
    pattern[2, 0] = 0.9
    example = PageExample(
        ("print", '("', " a"), '")', "')", 0.97, 0.6,
        {"10.attn_k.657": [0.0, 2.0, -1.0]}, {"10.attn_k.657": [0.5, 2.0, -1.0]},
        {"L10H82": pattern}, (('")', -0.5),),
    )  # fmt: skip
    tokens = pd.DataFrame(
        [("0.mlp_in.205", "embedding", " banana", 1.5), ("0.mlp_in.205", "embedding", "fig", -1.0),
         ("10.attn_out.83", "logits", '")', 2.0)],
        columns=["node", "side", "text", "weight"],
    )  # fmt: skip
    texts = {"0.mlp_neuron.863": {"top": [TokenExample(("x", " kiwi"), (0.1, 3.0), 1, "3.0")]}}
    return PageCircuit(
        quote_circuit, "circuit", (example,), tokens, texts, {"0.mlp_neuron.863": 0.25},
        {"10.attn.k:657": "looks for the quote"}, "key",
    )  # fmt: skip


def test_a_clicked_node_tells_its_names_edges_values_and_where_its_head_looks(open_page, full):
    page = open_page(full)
    assert page.locator(".node").count() == 12
    label = page.locator("[data-node='10.attn_k.657'] text")
    label.click()  # mark and label are one target
    panel = page.locator(".panel")
    assert page.text_content(CHOSEN) == "10.attn.k:657"
    assert "blocks.10.hook[..., 82, 1]" in panel.text_content()
    assert "L10H82.k1" in panel.text_content()
    assert panel.locator(".edge .name").all_text_contents() == ["10.attn.act_in:985"]
    assert panel.locator(".edge .weight").all_text_contents() == ["1.56"]
    assert page.locator(".of-model .token").nth(1).get_attribute("title") == "2"
    assert page.locator(".of-circuit .token").nth(0).get_attribute("title") == "0.5"
    assert page.locator(".of-attention .token").nth(0).get_attribute("title") == "90 %"
    page.locator(".of-attention .token").nth(1).click()
    assert page.locator(".of-attention .token").nth(0).get_attribute("title") == "10 %"
    assert page.url.endswith("#node=0:10.attn_k.657")
    page.keyboard.press("Escape")
    assert page.locator(CHOSEN).count() == 0


def test_nodes_are_found_by_name_token_text_and_note(open_page, full):
    page = open_page(full)
    for words, name in (
        ("mlp.post_act:863", "0.mlp.post_act:863"), ("banana", "0.mlp.act_in:205"),
        ("kiwi", "0.mlp.post_act:863"), ("looks for", "10.attn.k:657"),
        ("L10H82.v0", "10.attn.v:656"),
    ):  # fmt: skip
        page.keyboard.press("Escape")
        page.locator("body").press("/")
        page.locator(".search input").fill(words)
        page.keyboard.press("Enter")
        assert page.text_content(CHOSEN) == name
        assert page.locator(".node.chosen.off").count() == 0
    page.locator(".search input").fill("no such thing")
    assert page.text_content(".found .none") == "nothing found"


def test_arrow_keys_walk_and_enter_chooses(open_page, full):
    page = open_page(full)
    page.locator("[data-node='0.mlp_in.205']").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    first = page.text_content(CHOSEN)
    assert first.startswith("0.mlp.post_act:")
    page.keyboard.press("Escape")
    x = [page.locator(f"[data-node='0.mlp_neuron.{n}']").bounding_box()["x"] for n in (863, 2790)]
    page.keyboard.press("ArrowRight" if first.endswith("863") == (x[0] < x[1]) else "ArrowLeft")
    page.keyboard.press("Enter")
    assert {first, page.text_content(CHOSEN)} == {"0.mlp.post_act:863", "0.mlp.post_act:2790"}


def test_tokens_stand_below_and_logits_above(open_page, full):
    page = open_page(full)
    below = page.locator("[data-end='embedding.205']")
    assert below.locator("text").text_content() == "·banana  −fig"
    boxes = [page.locator(x).bounding_box()["y"] for x in
             ("[data-end='logits.83']", "[data-node='10.attn_out.83']",
              "[data-node='0.mlp_in.205']", "[data-end='embedding.205']")]  # fmt: skip
    assert boxes == sorted(boxes)
    below.click()
    assert page.text_content(CHOSEN) == "0.mlp.act_in:205"
    assert page.locator(".tokens-of.on code").all_text_contents() == ["·banana", "fig"]


def test_notes_are_kept_shown_and_saved(open_page, full):
    page = open_page(full)
    page.locator("[data-node='10.attn_k.657']").click()
    assert page.locator(".note textarea").input_value() == "looks for the quote"
    page.locator("[data-node='10.attn_v.656']").click()
    page.locator(".note textarea").fill("moves it <b>")
    page.reload()
    page.wait_for_selector(".node.noted >> nth=1", state="attached")
    page.locator(".menu summary", has_text="save").click()
    with page.expect_download() as saved:
        page.locator(".item", has_text="notes").click()
    found = json.loads(saved.value.path().read_text(encoding="utf-8"))
    assert found == {"10.attn.k:657": "looks for the quote", "10.attn.v:656": "moves it <b>"}


def test_picture_and_tables_are_saved(open_page, full):
    import xml.etree.ElementTree as ET

    page = open_page(full)
    found = {}
    for name in ("picture (SVG)", "picture (PNG)", "edges (CSV)", "Neuronpedia"):
        page.locator(".menu summary", has_text="save").click()
        with page.expect_download() as saved:
            page.locator(".item", has_text=name).click()
        found[name] = saved.value.path().read_bytes()
    assert ET.fromstring(found["picture (SVG)"]).tag.endswith("svg")
    assert b"<circle" in found["picture (SVG)"]
    assert found["picture (PNG)"].startswith(b"\x89PNG")
    lines = found["edges (CSV)"].decode().splitlines()
    assert lines[0] == "source,target,matrix,weight"
    assert "10.attn.act_in:985,10.attn.k:657,W_K,1.56" in lines
    neurons = [json.loads(line) for line in found["Neuronpedia"].decode().splitlines()]
    assert {"layer": "0-mlp", "index": "863"}.items() <= neurons[2].items()


def test_a_crowd_is_ranked_and_a_chosen_node_shows_all_of_its_edges(open_page, random_circuit_of):
    from tl_sparse.views import PageCircuit

    circuit = random_circuit_of(400, 6000)
    page = open_page(PageCircuit(circuit, "dense"))
    note = page.text_content(".hidden-note")
    assert note.startswith(f"5,000 of {circuit.n_edges:,} edges shown")
    assert f"the weakest {circuit.n_edges - 5000:,} are hidden" in note
    assert float(page.locator(".drawing").get_attribute("data-drawn")) < 1000  # milliseconds
    slider = page.locator(".threshold")
    slider.evaluate("x => { x.value = x.max; x.dispatchEvent(new Event('input')); }")
    assert page.text_content(".hidden-note").startswith(f"0 of {circuit.n_edges:,} edges shown")
    node = circuit.edges.iloc[0]
    name = f"{node['layer']}.{node['source_site']}.{node['source']}"
    page.evaluate(f"location.hash = '#node={name}'")
    page.wait_for_selector(CHOSEN)
    joined = (circuit.edges["layer"] == node["layer"]) & (
        (circuit.edges["source_site"] == node["source_site"])
        & (circuit.edges["source"] == node["source"])
    )
    assert f"is read by ({joined.sum()})" in page.text_content(".panel")


def test_twenty_thousand_edges_stay_a_small_page_that_says_what_it_hides(open_page, circuit_of):
    from tl_sparse.views import Page, PageCircuit, page_html

    rng = np.random.default_rng(0)
    nodes = [(0, site, i) for site in ("mlp_in", "mlp_neuron") for i in range(150)]
    pairs = rng.permutation(150 * 150)[:20_000]
    weights = rng.normal(size=20_000)
    edges = [
        (0, "mlp_in", int(p // 150), "mlp_neuron", int(p % 150), w)
        for p, w in zip(pairs, weights, strict=True)
    ]
    circuit = PageCircuit(circuit_of(nodes, edges), "dense")
    html = page_html(Page("", circuits=(circuit,)))
    assert len(html) < 1_000_000
    page = open_page(html=html)
    note = page.text_content(".hidden-note")
    assert note.startswith("5,000 of 20,000 edges shown")
    assert "the weakest 15,000 are hidden" in note
    page.locator("[data-node='0.mlp_neuron.7']").dispatch_event("click")
    own = int((pairs % 150 == 7).sum())
    assert f"reads from ({own})" in page.text_content(".panel")
    page.locator(".panel .more").click()
    assert page.locator(".panel .edge").count() == own
    drawn = page.evaluate("""() => {
        const context = document.querySelector('canvas').getContext('2d');
        const { width, height } = context.canvas;
        return context.getImageData(0, 0, width, height).data.some((x) => x);
    }""")
    assert drawn
    page.wait_for_function(f"document.querySelector('.shown').textContent.includes('{own}') ||"
                           " document.querySelectorAll('.node.on').length > 1")  # fmt: skip
    assert page.locator(".node.on").count() == own + 1
    assert float(page.locator(".drawing").get_attribute("data-drawn")) < 1000  # milliseconds


def test_texts_where_a_node_is_zero_are_no_examples_of_it(open_page, full):
    from tl_sparse.views.examples import TokenExample

    zero, some = TokenExample(("x", "y"), (0.0, 0.0), 1, ""), TokenExample(("z",), (2.0,), 0, "")
    texts = {"0.mlp_neuron.863": {"top": [some, zero], "bottom": [zero]},
             "0.mlp_neuron.2790": {"top": [zero], "bottom": [zero]}}  # fmt: skip
    page = open_page(replace(full, texts=texts))
    page.locator("[data-node='0.mlp_neuron.863']").click()
    assert page.locator(".panel .text-example").all_text_contents() == ["z"]
    assert page.locator(".panel h6").all_text_contents() == ["top"]
    page.locator("[data-node='0.mlp_neuron.2790']").click()
    assert page.locator(".panel .text-example").count() == 0
    assert "zero everywhere in the text" in page.text_content(".panel")


def test_a_circuit_without_edges_has_no_table_of_them(open_page, heads):
    from tl_sparse.views import PageCircuit

    page = open_page(PageCircuit(heads, "circuit"))
    assert page.locator(".tables summary").all_text_contents() == ["Nodes 5 rows"]


def test_filters_hide_sites_and_layers(open_page, full):
    page = open_page(full)
    page.locator(".menu summary", has_text="filter").click()
    page.locator(".menu label", has_text="L10").click()
    expect = pytest.importorskip("playwright.sync_api").expect
    expect(page.locator(".node:visible")).to_have_count(6)  # drawn anew in the next frame
    assert "6 nodes hidden" in page.text_content(".hidden-note")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_small_window_hides_nothing(open_page, full, scheme):
    page = open_page(full, width=800, height=600, scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("[data-node='10.attn_k.657']").click()
    drawing, panel, examples = (page.locator(x).bounding_box() for x in
                                (".drawing", ".panel", ".examples"))  # fmt: skip
    assert drawing["y"] + drawing["height"] <= panel["y"]
    assert panel["y"] + panel["height"] <= examples["y"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_circuits_stand_side_by_side_with_linked_examples(open_page, full):
    page = open_page(replace(full, title="sparse"), replace(full, title="dense", key="other"))
    boxes = [page.locator(".drawing").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    page.locator(".examples").nth(0).locator(".of-model .token").nth(1).hover()
    assert page.locator(".examples").nth(1).locator(".of-model .pointed").text_content() == '("'
    page.locator(".which").select_option("1")
    assert page.locator(".drawing:visible").count() == 1


def test_a_notebook_shows_the_page_in_a_frame(open_page, full):
    from tl_sparse.views import circuit_html

    page = open_page(html=f"<!doctype html><title>n</title>{circuit_html(full.circuit)}")
    frame = page.frame_locator("iframe")
    frame.locator("[data-node='10.attn_k.657']").click()
    assert frame.locator(CHOSEN).text_content() == "10.attn.k:657"
    assert page.locator("img").is_hidden()


def test_a_graph_of_any_nodes_is_drawn_in_rows_and_columns(open_page):
    from tl_sparse.views import GraphTable, PageCircuit

    nodes = pd.DataFrame(
        [("a", "7", 0, 0), ("b", "8", 0, 1), ("c", "9", 3, 1)],
        columns=["id", "label", "row", "column"],
    ).assign(name=["0.mlp/7", "0.mlp/8", "logit"], attribution=[0.5, -0.25, 1.0])
    edges = pd.DataFrame([("a", "c", 0.5), ("b", "c", -0.25)],
                         columns=["source", "target", "weight"])  # fmt: skip
    graph = GraphTable("traced", nodes, edges, ("mlp 0", "", "", "logits"), ("The", " cat"))
    page = open_page(PageCircuit(graph, "circuit"))
    left, right, top = (page.locator(f"[data-node='{x}']").bounding_box() for x in "abc")
    assert left["x"] < right["x"]
    assert top["y"] < right["y"]
    assert "·cat" in page.text_content(".drawing")
    page.locator("[data-node='b']").click()
    assert page.text_content(CHOSEN) == "0.mlp/8"
    assert "−0.25" in page.text_content(".node-facts")
