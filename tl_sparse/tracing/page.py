"""A traced graph as a page to click through: rows of sites, a column for each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tl_sparse.views import GraphTable, PageCircuit


class Drawn(Protocol):
    """A traced graph, as far as a page needs to know it."""

    @property
    def root(self) -> str:
        """Name of the root."""
        ...

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids."""
        ...

    def table(self) -> GraphTable:
        """What a drawing is made from."""
        ...


def page_graph(graph: Drawn, labels: Mapping[str, str] | None = None) -> PageCircuit:
    """A traced graph for :func:`~tl_sparse.views.page_html`, its labels as notes."""
    key = f"{graph.root}/{'-'.join(map(str, graph.prompt))}"
    return PageCircuit(graph.table(), "circuit", notes=dict(labels or {}), key=key)
