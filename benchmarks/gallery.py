"""The pages of the documentation's gallery, from circuits that are stored in the repository.

    python benchmarks/gallery.py              # writes build/gallery (part of `make docs`)
    python benchmarks/gallery.py --store      # first prunes the dense circuit anew

A sparse and a dense circuit of one task, a circuit of heads, a traced graph of features, and a
faithfulness report; of each the page and, but for the report, a static picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tl_sparse as tls
from tl_sparse import tracing
from tl_sparse.ablation.text import sequences_of
from tl_sparse.circuits import circuit_of_heads, page_circuit
from tl_sparse.data.bundled_text import bundled_text
from tl_sparse.faithfulness import EvaluationConfig
from tl_sparse.ground_truth import known_heads
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.views import Page, PageCircuit, circuit_svg, graph_svg, page_html

ROOT = Path(__file__).parents[1]
TASK = "single_double_quote"
STORED = {
    "sparse": ROOT / "notebooks" / "quote_circuit",
    "dense": ROOT / "notebooks" / "dense_quote_circuit",
}
CHECKS = ("sufficiency", "necessity", "minimality", "component_effects")
SEQUENCES = 32
"""Of the text that comes with the package, in which top examples are looked for."""


def store() -> None:
    """Prune the dense circuit as the sparse one was, to just the target, and store it."""
    model = tls.SparseTransformer.from_pretrained("python-dense")
    tls.prune(model, TASK, tls.PruningConfig(headroom=0.0)).save(STORED["dense"])


def write(out: Path) -> None:
    """Every page and picture."""
    out.mkdir(parents=True, exist_ok=True)
    shown = {name: stored_circuit(name) for name in STORED}
    for name, circuit in shown.items():
        title = f"How the {name} model closes a quote"
        write_page(out / f"{name}.html", title, circuit)
        write_atomic(out / f"{name}.svg", circuit_svg(circuit.circuit, tooltips=False))
    write_page(out / "both.html", "How a quote is closed: two models", *shown.values())
    write_heads(out)
    write_features(out)
    write_report(out, shown["sparse"])


def write_page(path: Path, title: str, *circuits: PageCircuit) -> None:
    """A page of circuits."""
    write_atomic(path, page_html(Page(title, circuits=circuits)))


def stored_circuit(name: str) -> PageCircuit:
    """The stored circuit of a bundled model, with all that a page shows of it."""
    model = tls.SparseTransformer.from_pretrained(f"python-{name}")
    text = sequences_of(model, bundled_text())[:SEQUENCES]
    return page_circuit(tls.Circuit.load(STORED[name], model), model, tokens=text, title=name)


def write_heads(out: Path) -> None:
    """The heads of induction, in a model of which every head was patched."""
    known = known_heads("trained induction")
    task = known.task()
    tokens = task.batch(32, split="held_out", seed=0).tokens
    circuit = circuit_of_heads(known.model, known.name, known.heads, tokens)
    circuit.write_page(out / "heads.html", known.model, task, title="The heads of induction")
    write_atomic(out / "heads.svg", circuit_svg(circuit.table(), tooltips=False))


def write_features(out: Path) -> None:
    """A traced graph of the dense model's dictionaries."""
    model = tls.SparseTransformer.from_pretrained("python-dense")
    splice = tracing.Splice(model, tracing.load_dictionaries("python-dense", model))
    prompts = tls.tasks.get(TASK, model).batch(1, split="held_out", seed=0)
    graph = tracing.trace_each(splice, prompts, tracing.LogitDiff("'", '"'))[0]
    graph.write_page(out / "features.html")
    write_atomic(out / "features.svg", graph_svg(graph.table(), tooltips=False))


def write_report(out: Path, shown: PageCircuit) -> None:
    """Some checks of the sparse circuit (all seventeen would take minutes)."""
    model = tls.SparseTransformer.from_pretrained("python-sparse")
    circuit = tls.Circuit.load(STORED["sparse"], model)
    config = EvaluationConfig(checks=CHECKS, pairs=8, controls=4, constant_steps=1)
    report = tls.evaluate(model, circuit, tls.tasks.get(TASK, model), config, progress=False)
    report.write_page(out / "report.html", [shown])


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gallery")
    parser.add_argument("--store", action="store_true", help="prune the dense circuit anew")
    options = parser.parse_args()
    if options.store:
        store()
    write(options.out)


if __name__ == "__main__":
    main()
