"""Screenshots of the page for a sparse, a dense, a head and a feature circuit, and a traced graph.

    python benchmarks/page_pictures.py OUT

Each at 1400x900, at 800x600 and dark, as it opens and with a node chosen; the pages are kept beside
them. Needs playwright (in the extra "dev") and a Chromium on the path.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chromium import launched
from playwright.sync_api import sync_playwright

import tl_sparse as tls
from tl_sparse import heads, tracing
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.views import Page, page_html

ROOT = Path(__file__).parents[1]
VIEWS = {"wide": (1400, 900, "light"), "small": (800, 600, "light"), "dark": (1400, 900, "dark")}
TASK = "single_double_quote"


def text_for(model: Any) -> Any:
    """Text in which top examples are looked for."""
    return tls.data.validation_text(tls.data.CorpusConfig(), model.tokenizer, 128, context=64)


def sparse(path: Path) -> None:
    """The circuit that a notebook reads."""
    model = tls.SparseTransformer.from_pretrained("python-sparse")
    circuit = tls.Circuit.load(ROOT / "notebooks" / "quote_circuit", model)
    circuit.write_page(path, model, tokens=text_for(model))


def dense(path: Path) -> None:
    """The dense model's, pruned, beside the sparse one's."""
    model = tls.SparseTransformer.from_pretrained("python-dense")
    circuit = tls.prune(model, TASK)
    other = tls.SparseTransformer.from_pretrained("python-sparse")
    found = tls.Circuit.load(ROOT / "notebooks" / "quote_circuit", other)
    beside = tls.circuits.page_circuit(found, other, title="sparse")
    circuit.write_page(path.with_name("both.html"), model, beside=(beside,), label="dense")
    circuit.write_page(path, model, tokens=text_for(model))


def head(path: Path) -> None:
    """Whole heads, named by their codes."""
    model = tls.SparseTransformer.from_pretrained("python-sparse")
    dataset = heads.contrastive(TASK, model, 40)
    outputs = heads.extract_head_outputs(model, dataset)
    found = heads.identify(heads.DiscreteSAE.fit(outputs, epochs=100).codes(outputs))
    circuit = found.circuit(model, dataset, found.top(5))
    task = heads.contrastive_task(TASK, model.tokenizer)
    circuit.write_page(path, model, task)


def feature(path: Path) -> None:
    """Features of dictionaries as nodes, and one prompt's graph of them."""
    model = tls.SparseTransformer.from_pretrained("python-dense")
    splice = tracing.Splice(model, tracing.load_dictionaries("python-dense", model))
    task = tls.tasks.get(TASK, model)
    graphs = tracing.trace_each(splice, task.batch(8, split="train", seed=0))
    tokens = text_for(model)
    world = tracing.SplicedModel(splice, "original")
    circuit = tracing.feature_circuit(world, graphs, task.name, tokens[:32])
    circuit.write_page(path, world, task, tokens[:32])
    graphs[0].write_page(path.with_name("graph.html"))


PAGES: dict[str, Callable[[Path], None]] = {
    "sparse": sparse, "dense": dense, "head": head, "feature": feature,
}  # fmt: skip


def pictures(folder: Path, browser: Any) -> None:
    """Every page of the folder in every view, with a node chosen and without."""
    for file in sorted(folder.glob("*.html")):
        for name, (width, height, scheme) in VIEWS.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page = context.new_page()
            page.goto(file.resolve().as_uri())
            page.wait_for_selector(".drawing[data-drawn]")
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{file.stem}-{name}.png")
            marks = page.locator(".node")
            marks.nth(marks.count() // 2).dispatch_event("click")
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"{file.stem}-{name}-chosen.png", full_page=True)
            context.close()


def main() -> None:
    """Write the pages that are not there yet, and pictures of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        if not (folder / f"{name}.html").exists():
            make(folder / f"{name}.html")
    crowd = folder / "crowd.html"
    if not crowd.exists():
        from page import random_circuit

        from tl_sparse.views import PageCircuit

        circuit = PageCircuit(random_circuit(300, 20_000), "circuit")
        write_atomic(crowd, page_html(Page("A crowd", circuits=(circuit,))))
    with sync_playwright() as playwright:
        browser = launched(playwright)
        pictures(folder, browser)
        browser.close()


if __name__ == "__main__":
    main()
