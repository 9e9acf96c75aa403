"""What the page's script knows of a circuit, as JSON values."""

from __future__ import annotations

import base64
from collections.abc import Hashable, Mapping, Sequence
from math import isfinite, isnan
from typing import Any

import numpy as np
import pandas as pd

from tl_sparse.node import Node, released_names
from tl_sparse.sites import SITES
from tl_sparse.views.graph_table import GraphTable, graph_layout
from tl_sparse.views.layout import Layout, circuit_layout
from tl_sparse.views.page_circuit import SIDES, PageCircuit, PageExample
from tl_sparse.views.style import (
    OTHER,
    SITE_STYLES,
    node_labels,
    node_names,
    node_places,
    site_style,
)
from tl_sparse.views.text import printable, visible

READS = [site.name for site in SITES if site.reads]
WRITES = [site.name for site in SITES if site.writes]
SHOWN_WORDS = 2  # tokens that stand in the drawing; the panel has all
NUMBERS = {
    "mean": "what it is set to when it is removed: its mean over text",
    "τ": "its learned mask parameter, in [-1, 1]",
    "loss if removed": "what the circuit's loss rises by, in nats, when this node alone is removed",
}  # fmt: skip
GRAPH_COLUMNS = ("id", "label", "row", "column", "name", "what", "kind", "colour", "square",
                 "layer", "hook", "x", "y")  # fmt: skip


def payload(page_circuit: PageCircuit, number: int) -> dict[str, Any]:
    """A circuit's values for the script: drawing, nodes, all edges, and what is recorded of them.

    Raises:
        ValueError: tables that cannot be laid out; activations, texts, tokens or effects of nodes
            that are none of the circuit's, of the wrong length or not finite.
    """
    circuit = page_circuit.circuit
    layout = None
    if isinstance(circuit, GraphTable):
        drawn = of_graph(circuit)
    else:
        layout = circuit_layout(circuit.nodes, circuit.edges)
        drawn = of_circuit(layout)
    ids = [node["id"] for node in drawn["nodes"]]
    place = {name: i for i, name in enumerate(ids)}
    known(place, page_circuit)
    tokens = tokens_of(page_circuit.tokens, place)
    for i, node in enumerate(drawn["nodes"]):
        node["id"] = printable(node["id"])
        node["note"] = str(page_circuit.notes.get(node["name"], ""))
        if (effect := page_circuit.effects.get(ids[i])) is not None and isfinite(effect):
            what = "loss if removed"
            node["numbers"].append([what, short(effect), NUMBERS[what]])
    examples = page_circuit.examples
    return drawn | {
        "number": number, "title": printable(page_circuit.title), "task": printable(circuit.task),
        "key": page_circuit.key or f"{circuit.task}/{page_circuit.title}",
        "tokens": tokens, "ends": [] if layout is None else ends_of(layout, tokens),
        "texts": {place[node]: texts_of(lists) for node, lists in page_circuit.texts.items()},
        "examples": [example_of(example) for example in examples],
        "activations": values_of(examples, "activations", place),
        "circuit_activations": values_of(examples, "circuit_activations", place),
        "attention": attention_of(examples),
    }  # fmt: skip


def of_circuit(layout: Layout) -> dict[str, Any]:
    """Drawing, nodes and edges of a circuit of hooks."""
    matrices, ends = edges_of(layout.edges, layout.nodes["id"])
    nodes = nodes_of(layout, ends)
    heads = layout.heads.itertuples()
    return {
        "graph": False, "width": layout.width, "height": layout.height,
        "rows": [[f"L{r.layer} {printable(str(r.label))}", float(r.y)]
                 for r in layout.rows.itertuples()],
        "columns": [],
        "lanes": [[int(r.channel), *map(fine, (r.x, r.y0, r.y1, r.top)), bool(r.enters),
                   bool(r.leaves)] for r in layout.lanes.itertuples()],
        "heads": [[f"head {h.head}", *map(fine, (h.x0, h.x1, h.y0, h.y1))] for h in heads],
        "nodes": nodes, "matrices": matrices, "edges": ends,
        "lone": sum(node["alone"] for node in nodes),
    }  # fmt: skip


def of_graph(graph: GraphTable) -> dict[str, Any]:
    """Drawing, nodes and edges of a graph."""
    layout = graph_layout(graph)
    table = layout.nodes
    edges = layout.edges.assign(source_id=layout.edges["source"], target_id=layout.edges["target"])
    if "matrix" not in edges:
        edges["matrix"] = "weight"
    matrices, ends = edges_of(edges, table["id"])
    extra = [c for c in table.columns if c not in GRAPH_COLUMNS
             and pd.api.types.is_numeric_dtype(table[c])]  # fmt: skip
    nodes = []
    for row in table.to_dict("records"):
        name = printable(str(row.get("name", row["id"])))
        nodes.append({
            "id": str(row["id"]), "name": name, "label": printable(str(row["label"])),
            "what": printable(str(row.get("what", ""))), "kind": str(row.get("kind", "node")),
            "colour": str(row.get("colour", OTHER.colour)), "square": bool(row.get("square")),
            "layer": int(row.get("layer", row["row"])), "site": str(row.get("kind", "node")),
            "channel": None, "head": None, "reads": False, "writes": False, "alone": False,
            "standing": "", "tl": printable(str(row.get("hook", ""))),
            "hook": printable(str(row.get("hook", ""))), "code": name, "aliases": [],
            "row": int(row["row"]), "x": fine(row["x"]), "y": fine(row["y"]),
            "numbers": [[c, short(row[c]), ""] for c in extra if not pd.isna(row[c])],
        })  # fmt: skip
    used = sorted(set(table["row"]))
    names = [graph.rows[int(r)] if int(r) < len(graph.rows) else str(r) for r in used]
    return {
        "graph": True, "width": layout.width, "height": layout.height,
        "rows": [[printable(name), float(y)] for y, name in enumerate(names)],
        "columns": [[visible(str(c.label)), fine(c.x)] for c in layout.columns.itertuples()],
        "lanes": [], "heads": [], "nodes": nodes, "matrices": matrices, "edges": ends, "lone": 0,
    }  # fmt: skip


def nodes_of(layout: Layout, edges: list[list[Any]]) -> list[dict[str, Any]]:
    """A record per node, with every name that it has."""
    nodes = layout.nodes
    into, from_ = np.zeros(len(nodes), int), np.zeros(len(nodes), int)
    for source, target, *_ in edges:
        from_[source] += 1
        into[target] += 1
    layers, kinds = node_places(nodes)
    released = released_names(nodes["layer"], nodes["site"], nodes["channel"])
    rows = zip(
        nodes.to_dict("records"), node_names(nodes), node_labels(nodes), released, layers, kinds,
        strict=True,
    )  # fmt: skip
    found = []
    for i, (row, what, label, name, layer, kind) in enumerate(rows):
        style, site = site_style(row["site"]), str(row["site"])
        head = None if pd.isna(row["head"]) else int(row["head"])
        inside = None if pd.isna(row["head_channel"]) else int(row["head_channel"])
        channel, whole = int(row["channel"]), head is not None and inside is None
        name = printable(f"L{layer}H{head}" if whole else name)
        place = f"{head}, {':' if whole else inside}" if head is not None else str(channel)
        standing = standing_of(site, head is not None, into[i], from_[i]) if edges else ""
        alone = bool(edges) and not into[i] and not from_[i]
        found.append({
            "id": row["id"], "name": name, "label": label, "what": what, "kind": kind,
            "colour": style.colour, "square": style.symbol == "square", "layer": int(layer),
            "site": site, "channel": channel, "head": head, "reads": site in READS,
            "writes": site in WRITES, "alone": alone, "standing": standing,
            "hook": printable(str(row["hook"])), "tl": printable(f"{row['hook']}[..., {place}]"),
            "code": repr(name) if whole else f"Node({name!r})", "aliases": aliases(row, name),
            "row": int(row["row"]), "x": fine(row["x"]), "y": fine(row["y"]),
            "numbers": [[words, short(row[column]), NUMBERS[words]]
                        for column, words in (("mean", "mean"), ("tau", "τ"))
                        if not isnan(float(row.get(column, np.nan)))],
        })  # fmt: skip
    return found


def aliases(row: Mapping[Hashable, Any], name: str) -> list[str]:
    """Other names under which people know a node."""
    site, layer, channel = str(row["site"]), int(row["layer"]), int(row["channel"])
    style = site_style(site)
    names = []
    if not pd.isna(row["head_channel"]) and style.short:
        names.append(f"L{layer}H{row['head']}.{style.short}{row['head_channel']}")
    if site in SITE_STYLES:
        node = Node((layer, site, channel))
        names += [node.ours, *([node.neuronpedia] if node.neuronpedia else [])]
    return [other for other in names if other != name]


def standing_of(site: str, of_head: bool, into: int, from_: int) -> str:
    """Why a node stands without edges on one side, in words; empty where that needs none."""
    if site in READS:
        return "" if from_ else "No kept node reads this channel here."
    if site in WRITES:
        return "" if into else ("No kept node writes this channel here: it is what biases and the "
                                "means of removed nodes add.")  # fmt: skip
    silent = not into and site in SITE_STYLES
    words = ["It reads no kept node: at every token it is what its bias and the means of removed "
             "nodes make it."] if silent else []  # fmt: skip
    by_pattern = of_head and site in ("attn_q", "attn_k")
    if not from_ and not by_pattern and site in SITE_STYLES:
        words.append("No kept channel is written by it.")
    if by_pattern:
        words.append("It acts through the attention pattern, for which there are no edges.")
    return " ".join(words)


def edges_of(edges: pd.DataFrame, ids: pd.Series) -> tuple[list[str], list[list[Any]]]:
    """Names of the matrices, and a row per edge: places of its ends and its matrix, weight."""
    place = pd.Series(range(len(ids)), index=ids, dtype=int)
    codes, names = pd.factorize(edges["matrix"].astype(str))
    columns = (
        place[edges["source_id"]].tolist(), place[edges["target_id"]].tolist(), codes.tolist(),
        map(short, edges["weight"].astype(float)),
    )  # fmt: skip
    return [printable(name) for name in names], [list(row) for row in zip(*columns, strict=True)]


def tokens_of(tokens: pd.DataFrame, place: Mapping[str, int]) -> dict[int, dict[str, Any]]:
    """Place of a node to side to its tokens, the largest of either sign first."""
    found: dict[int, dict[str, Any]] = {}
    for (node, side), rows in tokens.groupby(["node", "side"], sort=False):
        found.setdefault(place[str(node)], {})[str(side)] = signed(rows)
    return found


def signed(rows: pd.DataFrame) -> dict[str, Any]:
    """Tokens with positive and with negative weights, the largest first."""
    ranked = rows.iloc[np.argsort(-rows["weight"].abs().to_numpy(float), kind="stable")]
    pairs = [(visible(str(t)), short(w)) for t, w in zip(ranked["text"], ranked["weight"],
                                                         strict=True)]  # fmt: skip
    return {
        "positive": [[t, w] for t, w in pairs if w > 0],
        "negative": [[t, w] for t, w in pairs if w < 0],
        "largest": max((abs(w) for _, w in pairs), default=0.0),
    }


def ends_of(layout: Layout, lists: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tokens below and logits above the drawing: one mark a residual channel that comes from the
    embedding, or goes on to the logits."""
    residual = layout.nodes[layout.nodes["site"].isin(READS + WRITES)].reset_index()
    found = []
    for lane in layout.lanes.itertuples():
        own = residual[residual["channel"] == lane.channel].sort_values("y")
        for side, there, row in (("embedding", lane.enters, 0), ("logits", lane.leaves, -1)):
            node = int(own["index"].iloc[row])
            if not there or not (here := lists.get(node, {}).get(side)):
                continue
            most = [*here["positive"][:SHOWN_WORDS], *here["negative"][:SHOWN_WORDS]]
            most = sorted(most, key=lambda pair: -abs(pair[1]))[:SHOWN_WORDS]
            words = "  ".join(f"{'' if w > 0 else '−'}{t}" for t, w in most)
            found.append({"side": side, "channel": int(lane.channel), "node": node,
                          "x": fine(lane.x), "words": words, **here})  # fmt: skip
    return found


def texts_of(lists: Mapping[str, Sequence[Any]]) -> list[list[Any]]:
    """Lists of texts as [name, [tokens, values, own token, note] ...]."""
    return [
        [
            printable(name),
            [
                [
                    [visible(token) for token in one.tokens],
                    [None if isnan(value) else short(value) for value in one.values],
                    one.own,
                    printable(one.note),
                ]
                for one in examples
            ],
        ]
        for name, examples in lists.items()
    ]


def example_of(example: PageExample) -> dict[str, Any]:
    """An example's texts and probabilities."""
    return {
        "tokens": [visible(token) for token in example.tokens],
        "correct": visible(example.correct_token), "incorrect": visible(example.incorrect_token),
        "p_model": short(example.p_model),
        "p_circuit": None if example.p_circuit is None else short(example.p_circuit),
        "bigram": [[visible(text), short(weight)] for text, weight in example.bigram],
    }  # fmt: skip


def values_of(
    examples: tuple[PageExample, ...], name: str, place: Mapping[str, int]
) -> dict[int, list[list[float] | None]]:
    """Place of a node → one list an example, None where the example did not record the node."""
    recorded: dict[int, list[list[float] | None]] = {}
    for i, example in enumerate(examples):
        for node, values in (getattr(example, name) or {}).items():
            array = np.asarray(values, dtype=float)
            if array.shape != (len(example.tokens),):
                raise ValueError(
                    f"example {i} has {len(example.tokens)} tokens but activations of shape "
                    f"{array.shape} for node {node}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"activations of node {node} in example {i} are not finite")
            rows = recorded.setdefault(place[node], [None] * len(examples))
            rows[i] = [short(value) for value in array]
    return recorded


def attention_of(examples: tuple[PageExample, ...]) -> dict[str, list[str | None]]:
    """Head → its pattern in every example: rows of the lower triangle, a byte a weight, base64."""
    found: dict[str, list[str | None]] = {}
    for i, example in enumerate(examples):
        for head, pattern in (example.attention or {}).items():
            array, n = np.asarray(pattern, dtype=float), len(example.tokens)
            if array.shape != (n, n) or not ((array >= -1e-6) & (array <= 1 + 1e-6)).all():
                raise ValueError(
                    f"the pattern of {head} in example {i} must be [{n}, {n}] of weights in [0, 1]"
                )
            packed = np.round(array[np.tril_indices(n)] * 255).clip(0, 255).astype(np.uint8)
            rows = found.setdefault(printable(head), [None] * len(examples))
            rows[i] = base64.b64encode(packed.tobytes()).decode()
    return found


def known(place: Mapping[str, int], page_circuit: PageCircuit) -> None:
    """ValueError for what is said of nodes that the circuit does not have, or cannot be."""
    some = next(iter(place), "0.mlp_in.5")
    for i, example in enumerate(page_circuit.examples):
        for name in ("p_model", "p_circuit"):
            if (p := getattr(example, name)) is not None and not 0 <= p <= 1:
                raise ValueError(f"{name} of example {i} must lie in [0, 1], got {p}")
        said = [*(example.activations or {}), *(example.circuit_activations or {})]
        check_known(said, place, f"example {i} has activations of", some)
    if bad := set(page_circuit.tokens["side"]) - set(SIDES):
        raise ValueError(f"side {bad.pop()!r} of tokens must be {' or '.join(SIDES)}")
    check_known(page_circuit.tokens["node"], place, "tokens are given of", some)
    check_known(page_circuit.texts, place, "texts are given of", some)
    check_known(page_circuit.effects, place, "effects are given of", some)


def check_known(nodes: Any, place: Mapping[str, int], words: str, some: str) -> None:
    """ValueError for a node that is none."""
    for node in nodes:
        if node not in place:
            raise ValueError(
                f"{words} {node!r}, which is not a node of the circuit; node ids look like {some}"
            )


def short(value: float) -> float:
    """Four digits."""
    return float(f"{float(value):.4g}")


def fine(value: Any) -> float:
    """A place in the drawing."""
    return round(float(value), 3)
