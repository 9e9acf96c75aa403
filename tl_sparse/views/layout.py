"""Where the nodes of a circuit go: rows of computation crossed by lanes of residual channels."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_sparse.sites import SITE_NAMES, SITES
from tl_sparse.views.placement import barycentre, order_lanes, place_items

ROWS: dict[str, tuple[str, ...]] = {
    "embedding": ("embed",),
    "attn in": ("attn_in",),
    "q k v": ("attn_q", "attn_k", "attn_v"),
    "attn out": ("attn_out",),
    "mlp in": ("mlp_in",),
    "neurons": ("mlp_neuron",),
    "mlp out": ("mlp_out",),
    "final stream": ("final_resid",),
}
"""Rows of one layer in the order of the forward pass, and the sites that stand in each."""

READS: tuple[str, ...] = tuple(s.name for s in SITES if s.kind == "residual" and s.read_by)
WRITES: tuple[str, ...] = tuple(s.name for s in SITES if s.kind == "residual" and s.written_by)

NODE_COLUMNS = ("layer", "site", "channel", "head", "head_channel", "hook", "tau", "mean")
EDGE_COLUMNS = ("layer", "source_site", "source", "target_site", "target", "matrix", "weight")

_SLOT = {site: slot for slot, sites in enumerate(ROWS.values()) for site in sites}
_QKV_SLOT = 2
_FIRST_MLP_SLOT = 4
_FULL_ROW = 56  # nodes side by side before a row is staggered over several levels
_MAX_LEVELS = 8
_LEVEL_STEP = 0.26  # height of one level of a staggered row, in row heights
_BLOCK_STEP = 0.62  # between two blocks only lanes run, so the rows can stand closer
_HEAD_MARGIN = 0.7


@dataclass(frozen=True, eq=False)
class Layout:
    """A drawn circuit in abstract units: x in node spacings, y in row heights, y growing upward."""

    nodes: pd.DataFrame
    """The circuit's nodes with `id` ("layer.site.channel"), `row`, `x` and `y` added."""
    edges: pd.DataFrame
    """The circuit's edges with `source_id`, `target_id`, `x0`, `y0`, `x1` and `y1` added."""
    lanes: pd.DataFrame
    """Residual channels: `channel`, `x`, `y0` (first touch), `y1` (last read, or y0 when nothing
    reads it), `top` (last touch), `enters` (read before any kept write: the value comes from the
    embedding or an ablated write) and `leaves` (the last touch is a write: on to the logits)."""
    heads: pd.DataFrame
    """A box an attention head: `layer`, `head`, `x0`, `x1`, `y0`, `y1`."""
    rows: pd.DataFrame
    """The rows in use, bottom to top: `layer`, `label`, `y`."""
    width: float
    """Extent of x: every node lies in [0, width]."""
    height: float
    """Extent of y: every node lies in [0, height]."""


def node_ids(layer: pd.Series, site: pd.Series, channel: pd.Series) -> pd.Series:
    """Ids "layer.site.channel", one a row of the three aligned columns."""
    parts = layer.astype(str), site.astype(str), channel.astype(str)
    return parts[0] + "." + parts[1] + "." + parts[2]


def strongest_edges(edges: pd.DataFrame, max_edges: int) -> pd.DataFrame:
    """The `max_edges` edges of largest |weight|, in their old order (ties: the earlier edge).

    Raises ValueError when `max_edges` is negative.
    """
    if max_edges < 0:
        raise ValueError(f"max_edges must be 0 or more, got {max_edges}")
    if len(edges) <= max_edges:
        return edges
    order = np.argsort(-edges["weight"].abs().to_numpy(float), kind="stable")
    return edges.iloc[np.sort(order[:max_edges])]


def circuit_layout(nodes: pd.DataFrame, edges: pd.DataFrame) -> Layout:
    """Place a circuit: layers go upward, residual channels are vertical lanes.

    Every edge joins one residual channel to one head or neuron, so the picture is a stack of
    two-row graphs that share their lanes. The order of lanes, heads and neurons comes from
    barycentre sweeps weighted by |weight|, the best sweep wins; heads and neurons are then
    placed as near to their barycentre as their widths allow. Time is linear in the edges.

    Raises ValueError on missing columns, unknown sites, repeated nodes, a q/k/v node without a
    head, edges whose ends are not both kept nodes, and weights that are not finite.
    """
    _require(nodes, NODE_COLUMNS, "nodes")
    _require(edges, EDGE_COLUMNS, "edges")
    nodes = nodes.reset_index(drop=True).copy()
    edges = edges.reset_index(drop=True).copy()
    _check_sites(nodes)
    nodes["id"] = node_ids(nodes["layer"], nodes["site"], nodes["channel"])
    if nodes["id"].duplicated().any():
        raise ValueError(f"node {nodes['id'][nodes['id'].duplicated()].iloc[0]} is given twice")
    source, target = _edge_ends(nodes, edges)

    slot = nodes["site"].map(_SLOT).to_numpy(int)
    row_key, row = np.unique(nodes["layer"].to_numpy(int) * len(ROWS) + slot, return_inverse=True)
    levels = np.clip(-(-np.bincount(row, minlength=len(row_key)) // _FULL_ROW), 1, _MAX_LEVELS)
    residual = nodes["site"].isin(READS + WRITES).to_numpy()
    channels, lane = np.unique(nodes["channel"].to_numpy(int)[residual], return_inverse=True)
    lane_of = np.full(len(nodes), -1)
    lane_of[residual] = lane

    item_name = nodes["channel"].where(slot != _QKV_SLOT, nodes["head"]).astype(int)
    item_of = pd.DataFrame({"row": row, "name": item_name})[~residual].groupby(["row", "name"])
    item = np.full(len(nodes), -1)
    item[~residual] = item_of.ngroup().to_numpy(int)
    item_row, item_size = _items(item, row)

    ends = np.where(residual[source], source, target), np.where(residual[source], target, source)
    strength = _relative_strength(edges)
    lane_order = order_lanes(
        lane_of[ends[0]], item[ends[1]], strength, item_row, len(channels), len(row_key)
    )

    is_head = row_key[item_row] % len(ROWS) == _QKV_SLOT
    item_width = item_size / levels[item_row] + _HEAD_MARGIN * is_head
    lane_levels = int(np.clip(-(-len(channels) // _FULL_ROW), 1, _MAX_LEVELS))
    row_widths = np.bincount(item_row, item_width, minlength=len(row_key))
    width = float(max(len(channels) / lane_levels, row_widths.max(initial=0.0), 1.0))

    lane_x = (lane_order + 0.5) * width / max(len(channels), 1)
    item_x = place_items(
        barycentre(item[ends[1]], lane_x[lane_of[ends[0]]], strength, len(item_row), width),
        item_row,
        item_width,
        width,
    )
    x = np.empty(len(nodes))
    x[residual] = lane_x[lane]
    wanted = barycentre(ends[1], lane_x[lane_of[ends[0]]], strength, len(nodes), width)
    _place_within_items(x, nodes, item, row, levels, item_x, item_size, wanted)

    row_y = _row_heights(row_key, np.where(_is_residual(row_key), lane_levels, levels))
    y = row_y[row] + _stagger(x, row, residual, levels, lane_order, lane_of, lane_levels)
    nodes["row"], nodes["x"], nodes["y"] = row, x, y
    edges["source_id"] = nodes["id"].to_numpy()[source]
    edges["target_id"] = nodes["id"].to_numpy()[target]
    edges["x0"], edges["y0"], edges["x1"], edges["y1"] = x[source], y[source], x[target], y[target]
    rows = pd.DataFrame(
        {
            "layer": row_key // len(ROWS),
            "label": np.array(list(ROWS), dtype=object)[row_key % len(ROWS)],
            "y": row_y,
        }
    )
    return Layout(
        nodes=nodes,
        edges=edges,
        lanes=_lanes(nodes[residual], channels, lane_x),
        heads=_head_boxes(nodes, item, item_x, item_width, is_head),
        rows=rows,
        width=width,
        height=float(y.max(initial=0.0)),
    )


def _require(table: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; needed are {', '.join(columns)}")


def _check_sites(nodes: pd.DataFrame) -> None:
    unknown = nodes["site"][~nodes["site"].isin(SITE_NAMES)]
    if len(unknown):
        raise ValueError(f"unknown site {unknown.iloc[0]!r}; sites are {', '.join(SITE_NAMES)}")
    headless = nodes[nodes["site"].isin(ROWS["q k v"]) & nodes["head"].isna()]
    if len(headless):
        first = headless.iloc[0]
        raise ValueError(
            f"{first['site']} node {first['channel']} of layer {first['layer']} has no head"
        )


def _edge_ends(
    nodes: pd.DataFrame, edges: pd.DataFrame
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
    """Row numbers in `nodes` of both ends of every edge."""
    index = pd.Index(nodes["id"])
    ends = []
    for end in ("source", "target"):
        ids = node_ids(edges["layer"], edges[f"{end}_site"], edges[end])
        rows = index.get_indexer(pd.Index(ids)).astype(int)
        if (rows < 0).any():
            raise ValueError(f"edge {end} {ids[rows < 0].iloc[0]} is not a node of the circuit")
        ends.append(rows)
    residual = nodes["site"].isin(READS + WRITES).to_numpy()
    bad = residual[ends[0]] == residual[ends[1]]
    if bad.any():
        a, b = (nodes["id"].to_numpy()[end[bad][0]] for end in ends)
        raise ValueError(f"edge {a} to {b} does not join a residual channel to a head or neuron")
    if not np.isfinite(edges["weight"].to_numpy(float)).all():
        raise ValueError("edge weights must be finite")
    return ends[0], ends[1]


def _relative_strength(edges: pd.DataFrame) -> Float[np.ndarray, " edge"]:
    """|weight| over the largest of its matrix: layers and matrices differ in scale."""
    size = edges["weight"].abs().astype(float)
    largest = size.groupby([edges["layer"], edges["matrix"]]).transform("max")
    return np.maximum((size / largest.where(largest > 0, 1.0)).to_numpy(float), 1e-3)


def _is_residual(row_key: Int[np.ndarray, " row"]) -> np.ndarray:
    slots = [_SLOT[site] for site in READS + WRITES]
    return np.isin(row_key % len(ROWS), slots)


def _items(
    item: Int[np.ndarray, " node"], row: Int[np.ndarray, " node"]
) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " item"]]:
    """Row and node count of every item (a head or a neuron)."""
    inside = item >= 0
    size = np.bincount(item[inside])
    item_row = np.zeros(len(size), dtype=int)
    item_row[item[inside]] = row[inside]
    return item_row, size


def _place_within_items(
    x: Float[np.ndarray, " node"],
    nodes: pd.DataFrame,
    item: Int[np.ndarray, " node"],
    row: Int[np.ndarray, " node"],
    levels: Int[np.ndarray, " row"],
    item_x: Float[np.ndarray, " item"],
    item_size: Int[np.ndarray, " item"],
    wanted: Float[np.ndarray, " node"],
) -> None:
    """Fill x of heads' channels (q, k and v each together) and of neurons, by barycentre."""
    inside = np.flatnonzero(item >= 0)
    kind = nodes["site"].map({site: i for i, site in enumerate(SITE_NAMES)}).to_numpy(int)
    block = pd.Series(wanted[inside]).groupby([item[inside], kind[inside]]).transform("mean")
    order = inside[np.lexsort((wanted[inside], kind[inside], block.to_numpy(float), item[inside]))]
    start = np.cumsum(item_size) - item_size
    place = np.arange(len(order)) - start[item[order]] - (item_size[item[order]] - 1) / 2
    x[order] = item_x[item[order]] + place / levels[row[order]]


def _row_heights(
    row_key: Int[np.ndarray, " row"], levels: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """Height of every row; rows of one block stand a full step apart, blocks closer."""
    if len(row_key) == 0:
        return np.zeros(0)
    block = row_key // _FIRST_MLP_SLOT
    half = (levels - 1) * _LEVEL_STEP / 2
    step = np.where(np.diff(block) == 0, 1.0, _BLOCK_STEP) + half[1:] + half[:-1]
    return half[0] + np.concatenate([[0.0], np.cumsum(step)])


def _stagger(
    x: Float[np.ndarray, " node"],
    row: Int[np.ndarray, " node"],
    residual: np.ndarray,
    levels: Int[np.ndarray, " row"],
    lane_order: Int[np.ndarray, " lane"],
    lane_of: Int[np.ndarray, " node"],
    lane_levels: int,
) -> Float[np.ndarray, " node"]:
    """Height above or below the middle of the row: neighbours stand on different levels."""
    n_levels = np.where(residual, lane_levels, levels[row])
    order = np.lexsort((x, row))
    rank = np.empty(len(x), dtype=int)
    rank[order] = np.arange(len(x))
    rank[residual] = lane_order[lane_of[residual]]
    return (rank % n_levels - (n_levels - 1) / 2) * _LEVEL_STEP


def _lanes(
    residual: pd.DataFrame, channels: Int[np.ndarray, " lane"], x: Float[np.ndarray, " lane"]
) -> pd.DataFrame:
    read = residual["site"].isin(READS)
    touch = residual.groupby("channel")["y"].agg(["min", "max"]).reindex(channels)
    y0, top = touch["min"].to_numpy(float), touch["max"].to_numpy(float)
    last_read = residual[read].groupby("channel")["y"].max().reindex(channels).to_numpy(float)
    first_read = residual[read].groupby("channel")["y"].min().reindex(channels).to_numpy(float)
    return pd.DataFrame(
        {
            "channel": channels,
            "x": x,
            "y0": y0,
            "y1": np.where(np.isnan(last_read), y0, last_read),
            "top": top,
            "enters": first_read == y0,
            "leaves": last_read != top,
        }
    )


def _head_boxes(
    nodes: pd.DataFrame,
    item: Int[np.ndarray, " node"],
    item_x: Float[np.ndarray, " item"],
    item_width: Float[np.ndarray, " item"],
    is_head: np.ndarray,
) -> pd.DataFrame:
    inside = nodes.assign(item=item)[nodes["site"].isin(ROWS["q k v"])]
    box = inside.groupby("item").agg(
        layer=("layer", "first"), head=("head", "first"), y0=("y", "min"), y1=("y", "max")
    )
    which = np.flatnonzero(is_head)
    half = item_width[which] / 2 - 0.08
    box["x0"], box["x1"] = item_x[which] - half, item_x[which] + half
    return box.reset_index(drop=True)
