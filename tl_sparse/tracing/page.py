"""A traced graph as a page to click through: rows of sites, a column for each token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.tracing.graph import TracedGraph
from tl_sparse.views import Page, PageCircuit, page_html


def write_graph_page(
    graph: TracedGraph, path: str | Path, labels: Mapping[str, str] | None = None
) -> Path:
    """Write a traced graph as one self-contained page; returns its path.

    Args:
        graph: The graph.
        path: The file.
        labels: Node's id to words for it, such as an annotation's.
    """
    page = Page(f"What {graph.root} is made of", circuits=(page_graph(graph, labels),))
    write_atomic(Path(path), page_html(page))
    return Path(path)


def page_graph(graph: TracedGraph, labels: Mapping[str, str] | None = None) -> PageCircuit:
    """A traced graph for :func:`~tl_sparse.views.page_html`, its labels as notes."""
    key = f"{graph.root}/{'-'.join(map(str, graph.prompt))}"
    return PageCircuit(graph.table(), "circuit", notes=dict(labels or {}), key=key)
