"""Which room of the package imports which, read from the source: arrows must point down.

    python tests/rooms.py            # prints every arrow up and every circle

Lazy imports inside functions and imports for type checkers count like any other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOMS = (
    "cli", "studies", "tracing", "heads", "faithfulness", "bridges", "analyses", "ground_truth",
    "circuits", "nodes", "training", "ablation", "sparsity", "model", "checkpoints", "tasks",
    "data", "views", "config", "node", "sites", "compat", "storage", "imports", "progress",
)  # fmt: skip
"""From top to bottom: a room may import those below it."""
PACKAGE = Path(__file__).parents[1] / "tl_sparse"


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a module imports, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_graph(package: Path = PACKAGE) -> nx.DiGraph:
    """Modules of a package; an edge from each to those that it imports."""
    paths = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(paths)
    for name, path in paths.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for target in imported(ast.parse(path.read_text(encoding="utf-8")), inside):
            while target and target not in paths:
                target = target.rpartition(".")[0]
            if target and target != name:
                graph.add_edge(name, target)
    return graph


def room(module: str) -> str:
    """The room that a module is in; the package's own face is above all."""
    return module.split(".")[1] if "." in module else ""


def arrows_up(graph: nx.DiGraph) -> list[str]:
    """Imports of a room that is not below, and rooms that have no place in the order."""
    rank = {name: place for place, name in enumerate(ROOMS)}
    homeless = sorted({room(m) for m in graph if room(m) and room(m) not in rank})
    found = [f"{name} has no place among the rooms" for name in homeless]
    for source, target in sorted(graph.edges):
        here, there = room(source), room(target)
        if not here or here == there or here in homeless or there in homeless:
            continue
        if not there or rank[there] < rank[here]:
            found.append(f"{source} imports {target}")
    return found


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """Groups of modules that import each other, directly or not; the largest first."""
    groups = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))


def main() -> int:
    """Print what is wrong; 0 if nothing is."""
    graph = import_graph()
    up, round_ = arrows_up(graph), circles(graph)
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    rooms = sorted({room(module) for module in graph} - {""})
    print(f"{len(rooms)} rooms, {len(graph)} modules, {lines:,} lines")
    print(f"{len(up)} arrows up", *up, sep="\n  ")
    print(f"{len(round_)} circles", *(f"{len(g)}: {', '.join(g)}" for g in round_), sep="\n  ")
    return int(bool(up or round_))


if __name__ == "__main__":
    sys.exit(main())
