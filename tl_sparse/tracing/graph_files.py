"""Traced graphs in files and in other libraries' hands: JSON of our own, networkx."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.storage.json_files import plain, read_json, real
from tl_sparse.tracing.graph import EDGE_COLUMNS, KINDS, NODE_COLUMNS, TracedGraph

if TYPE_CHECKING:
    import networkx as nx

SCHEMA_VERSION = 1
MAX_BYTES = 1 << 28
TEXTS = {"id", "kind", "site", "token", "source", "target"}
WHOLE = {"layer", "pos", "head", "index"}
TABLES = ("nodes", "edges", "rows", "heads")
COLUMNS = {"nodes": NODE_COLUMNS, "edges": EDGE_COLUMNS}


def save_graph(graph: TracedGraph, path: str | Path) -> None:
    """Write a graph to one JSON file, every number to the bit.

    Raises:
        OSError: there is no room for it on the disk.
        ValueError: something else than a file is in its place, or settings that are no plain
            values.
    """
    values = {
        "schema_version": SCHEMA_VERSION,
        "tl_sparse_version": version("tl-sparse"),
        "prompt": list(graph.prompt), "words": list(graph.words), "root": graph.root,
        "value": graph.value, "mass": dict(graph.mass), "settings": dict(graph.settings),
        **{name: columns_of(name, getattr(graph, name)) for name in TABLES},
    }  # fmt: skip
    try:
        text = json.dumps(plain(values), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"the graph's settings must be plain values: {error}") from error
    write_atomic(Path(path), text)


def columns_of(name: str, table: pd.DataFrame) -> dict[str, list[Any]]:
    """A table as lists, by its columns; a graph that was traced without edges has none."""
    names = COLUMNS.get(name, ()) if table.empty else table.columns
    return {str(each): table[each].tolist() if each in table else [] for each in names}


def load_graph(path: str | Path) -> TracedGraph:
    """A graph from a file of :func:`save_graph`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of another version, or contradicts itself.
    """
    values = read_json(path, MAX_BYTES)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema_version {values.get('schema_version')!r:.80}; this "
                         f"version of tl_sparse reads {SCHEMA_VERSION}")  # fmt: skip
    try:
        tables = {name: table_of(name, values[name]) for name in TABLES}
        prompt, words = values["prompt"], values["words"]
        if not all_of(int, prompt) or not all_of(str, words) or len(prompt) != len(words):
            raise ValueError("prompt and words must be as many tokens and texts")
        if not isinstance(values["root"], str) or not isinstance(values["settings"], dict):
            raise ValueError("root must be a text, settings an object")
        mass = {str(kind): real(x) for kind, x in values["mass"].items()}
        graph = TracedGraph(
            prompt=tuple(prompt), words=tuple(words), root=values["root"],
            value=real(values["value"]), mass=mass, settings=values["settings"], **tables,
        )  # fmt: skip
        check_graph(graph)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no traced graph: {error}") from error
    return graph


def all_of(kind: type, values: Any) -> bool:
    """Whether it is a list of values of a type (bool is no int)."""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def table_of(name: str, columns: Any) -> pd.DataFrame:
    """A table from lists, each of its column's type; ValueError if one is not."""
    if not isinstance(columns, Mapping):
        raise ValueError(f"{name} must be columns")
    table: dict[str, list[Any]] = {}
    for column, values in columns.items():
        if column in TEXTS or column in WHOLE:
            if not all_of(str if column in TEXTS else int, values):
                raise ValueError(f"{name}.{column} must be a list of "
                                 f"{'texts' if column in TEXTS else 'integers'}")  # fmt: skip
            table[column] = values
        elif isinstance(values, list):
            table[column] = [real(value) for value in values]
        else:
            raise ValueError(f"{name}.{column} must be a list")
    if len({len(values) for values in table.values()}) > 1:
        raise ValueError(f"{name} has columns of different lengths")
    if missing := [column for column in COLUMNS.get(name, ()) if column not in table]:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    return pd.DataFrame(table)


def check_graph(graph: TracedGraph) -> None:
    """ValueError unless ids are unique, edges join nodes, and positions lie in the prompt."""
    ids = graph.nodes["id"]
    if not ids.is_unique:
        raise ValueError("two nodes have one id")
    if graph.root not in set(ids):
        raise ValueError("the root is not among the nodes")
    if strange := sorted(set(graph.nodes["kind"]) - set(KINDS)):
        raise ValueError(f"unknown kind {strange[0]!r:.80}; known: {', '.join(KINDS)}")
    if bool((graph.nodes["pos"] >= len(graph.prompt)).any()):
        raise ValueError("a node is behind the prompt's end")
    ends = {*graph.edges["source"], *graph.edges["target"]} - set(ids)
    if ends:
        raise ValueError(f"an edge ends at {min(ends)!r:.80}, which is no node")


def to_networkx(graph: TracedGraph) -> nx.DiGraph:
    """The graph for networkx: nodes by their ids with the columns of ``graph.nodes``, edges with
    ``weight`` and ``attribution``, and the graph's root, value, words and mass as its own
    attributes."""
    import networkx as nx  # slow to import, and seldom needed

    found: nx.DiGraph = nx.DiGraph(
        root=graph.root, value=graph.value, words=list(graph.words), mass=dict(graph.mass)
    )
    for row in graph.nodes.to_dict("records"):
        found.add_node(row["id"], **{str(k): v for k, v in row.items() if k != "id"})
    for row in graph.edges.to_dict("records"):
        found.add_edge(row["source"], row["target"], weight=row["weight"],
                       attribution=row["attribution"])  # fmt: skip
    return found


def finite(value: float) -> float | None:
    """A number for JSON; None of one that is none."""
    return float(value) if math.isfinite(value) else None
