"""Where the nodes of a circuit go: rows of computation crossed by lanes of residual channels."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from tl_sparse.sites import SITE_NAMES, SITES
from tl_sparse.views.placement import barycentre, order_lanes, place_items
from tl_sparse.views.style import node_places

ROWS: dict[str, tuple[str, ...]] = {
    row: tuple(site.name for site in SITES if site.row == row)
    for row in dict.fromkeys(site.row for site in SITES)
}
"""Rows of one layer in the order of the forward pass, and the sites that stand in each."""

READS: tuple[str, ...] = tuple(site.name for site in SITES if site.reads)
WRITES: tuple[str, ...] = tuple(site.name for site in SITES if site.writes)
OF_HEADS: tuple[str, ...] = tuple(site.name for site in SITES if site.kind == "head")

NODE_COLUMNS = ("layer", "site", "channel", "head", "head_channel", "hook")
EDGE_COLUMNS = ("layer", "source_site", "source", "target_site", "target", "matrix", "weight")

_ROW_OF = {site: label for label, sites in ROWS.items() for site in sites}
_LANE_ROWS = tuple(dict.fromkeys(_ROW_OF[site] for site in READS + WRITES))
_FIRST_MLP_SLOT = list(ROWS).index(_ROW_OF["mlp_in"])
_PULLS = 8  # sweeps over edges between nodes outside the table
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

    Edges between sites of the table join one residual channel to one head or neuron, so the picture
    is a stack of two-row graphs that share their lanes. The order of lanes, heads and neurons comes
    from barycentre sweeps weighted by |weight|, the best sweep wins; heads and neurons are then
    placed as near to their barycentre as their widths allow. Time is linear in the edges.

    Nodes of any other site or hook stand in a row per layer and hook above the layer's own. Few
    channels, and whole heads (a head without a head_channel), have fixed columns; many, such as
    features, stand near those that they have edges with. Edges between different layers say so in
    columns source_layer and target_layer.

    Raises:
        ValueError: missing columns, repeated nodes, a q/k/v node without a head, edges whose ends
            are not both kept nodes, weights that are not finite.
    """
    _require(nodes, NODE_COLUMNS, "nodes")
    _require(edges, EDGE_COLUMNS, "edges")
    nodes = nodes.reset_index(drop=True).copy()
    edges = edges.reset_index(drop=True).copy()
    _check_heads(nodes)
    nodes["id"] = node_ids(nodes["layer"], nodes["site"], nodes["channel"])
    if nodes["id"].duplicated().any():
        raise ValueError(f"node {nodes['id'][nodes['id'].duplicated()].iloc[0]} is given twice")
    source, target = _edge_ends(nodes, edges)

    rows, row = _rows(nodes)
    levels = np.clip(-(-np.bincount(row, minlength=len(rows)) // _FULL_ROW), 1, _MAX_LEVELS)
    residual = nodes["site"].isin(READS + WRITES).to_numpy()
    channels, lane = np.unique(nodes["channel"].to_numpy(int)[residual], return_inverse=True)
    lane_of = np.full(len(nodes), -1)
    lane_of[residual] = lane

    column = nodes["head"].astype("Int64").fillna(nodes["channel"]).astype(int)
    item = np.full(len(nodes), -1)
    item_of = pd.DataFrame({"row": row, "name": column})[~residual].groupby(["row", "name"])
    item[~residual] = item_of.ngroup().to_numpy(int)
    item_row, item_size = _items(item, row)

    strength = _relative_strength(edges)
    joins = residual[source] != residual[target]  # a lane and a head or neuron
    ends = np.where(residual[source], source, target), np.where(residual[source], target, source)
    of_lane, of_item, pull = lane_of[ends[0]][joins], ends[1][joins], strength[joins]
    lane_order = order_lanes(of_lane, item[of_item], pull, item_row, len(channels), len(rows))

    is_head = np.zeros(len(item_row), dtype=bool)
    is_head[item[~residual & nodes["head_channel"].notna().to_numpy()]] = True
    item_width = item_size / levels[item_row] + _HEAD_MARGIN * is_head
    lane_levels = int(np.clip(-(-len(channels) // _FULL_ROW), 1, _MAX_LEVELS))
    row_widths = np.bincount(item_row, item_width, minlength=len(rows))
    whole = nodes["head"].notna() & nodes["head_channel"].isna()
    other = rows["slot"].to_numpy(int)[item_row] >= len(ROWS)
    other[item[whole.to_numpy() & ~residual]] = True
    item_column = np.zeros(len(item_row), dtype=int)
    item_column[item[~residual]] = column[~residual]
    n_columns = int(item_column[other].max(initial=0)) + 1 if other.any() else 0
    n_columns *= n_columns <= _FULL_ROW
    width = float(max(len(channels) / lane_levels, row_widths.max(initial=0.0), n_columns, 1.0))

    lane_x = (lane_order + 0.5) * width / max(len(channels), 1)
    middle = barycentre(item[of_item], lane_x[of_lane], pull, len(item_row), width)
    middle[other] = (item_column[other] + 0.5) * width / n_columns if n_columns else width / 2
    item_x = place_items(middle, item_row, item_width, width)
    if not n_columns:
        links = item[source[~joins]], item[target[~joins]]
        item_x = _pulled(item_x, links, strength[~joins], item_row, item_width, width)
    x = np.empty(len(nodes))
    x[residual] = lane_x[lane]
    wanted = barycentre(of_item, lane_x[of_lane], pull, len(nodes), width)
    _place_within_items(x, nodes, item, row, levels, item_x, item_size, wanted)

    row_levels = np.where(rows["label"].isin(_LANE_ROWS), lane_levels, levels)
    rows["y"] = _row_heights(rows, row_levels)
    y = rows["y"].to_numpy(float)[row]
    y = y + _stagger(x, row, residual, levels, lane_order, lane_of, lane_levels)
    nodes["row"], nodes["x"], nodes["y"] = row, x, y
    edges["source_id"] = nodes["id"].to_numpy()[source]
    edges["target_id"] = nodes["id"].to_numpy()[target]
    edges["x0"], edges["y0"], edges["x1"], edges["y1"] = x[source], y[source], x[target], y[target]
    return Layout(
        nodes=nodes,
        edges=edges,
        lanes=_lanes(nodes[residual], channels, lane_x),
        heads=_head_boxes(nodes, item, item_x, item_width, is_head),
        rows=rows[["layer", "label", "y"]],
        width=width,
        height=float(y.max(initial=0.0)),
    )


def _require(table: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; needed are {', '.join(columns)}")


def _check_heads(nodes: pd.DataFrame) -> None:
    headless = nodes[nodes["site"].isin(OF_HEADS) & nodes["head"].isna()]
    if len(headless):
        first = headless.iloc[0]
        raise ValueError(
            f"{first['site']} node {first['channel']} of layer {first['layer']} has no head"
        )


def _rows(nodes: pd.DataFrame) -> tuple[pd.DataFrame, Int[np.ndarray, " node"]]:
    """The rows in use, bottom to top (layer, slot, label), and the row of every node.

    Hooks that are no site of the table have a row each, above the others of their layer.
    """
    layer, words = node_places(nodes)
    label = nodes["site"].map(_ROW_OF).fillna(words)
    order = list(dict.fromkeys([*ROWS, *label]))
    slot = label.map(order.index).astype(int)
    rows = pd.DataFrame({"layer": layer, "slot": slot, "label": label})
    row = rows.groupby(["layer", "slot"]).ngroup().to_numpy(int)
    return rows.drop_duplicates(["layer", "slot"]).sort_values(
        ["layer", "slot"], ignore_index=True
    ), row


def _edge_ends(
    nodes: pd.DataFrame, edges: pd.DataFrame
) -> tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]]:
    """Row numbers in `nodes` of both ends of every edge."""
    index = pd.Index(nodes["id"])
    ends = []
    for end in ("source", "target"):
        layer = edges.get(f"{end}_layer", edges["layer"])
        ids = node_ids(layer, edges[f"{end}_site"], edges[end])
        rows = index.get_indexer(pd.Index(ids)).astype(int)
        if (rows < 0).any():
            raise ValueError(f"edge {end} {ids[rows < 0].iloc[0]} is not a node of the circuit")
        ends.append(rows)
    residual = nodes["site"].isin(READS + WRITES).to_numpy()
    known = nodes["site"].isin(SITE_NAMES).to_numpy()
    bad = (residual[ends[0]] == residual[ends[1]]) & known[ends[0]] & known[ends[1]]
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
    kind = nodes["site"].map(dict(zip(SITE_NAMES, range(len(SITE_NAMES)), strict=True)))
    kind = kind.fillna(len(SITE_NAMES)).to_numpy(int)
    block = pd.Series(wanted[inside]).groupby([item[inside], kind[inside]]).transform("mean")
    order = inside[np.lexsort((wanted[inside], kind[inside], block.to_numpy(float), item[inside]))]
    start = np.cumsum(item_size) - item_size
    place = np.arange(len(order)) - start[item[order]] - (item_size[item[order]] - 1) / 2
    x[order] = item_x[item[order]] + place / levels[row[order]]


def _pulled(
    x: Float[np.ndarray, " item"],
    links: tuple[Int[np.ndarray, " edge"], Int[np.ndarray, " edge"]],
    strength: Float[np.ndarray, " edge"],
    item_row: Int[np.ndarray, " item"],
    item_width: Float[np.ndarray, " item"],
    width: float,
) -> Float[np.ndarray, " item"]:
    """Positions after items that edges join directly have pulled each other into place."""
    here, there = np.concatenate(links), np.concatenate(links[::-1])
    for _ in range(_PULLS if len(here) else 0):
        wanted = barycentre(here, x[there], np.tile(strength, 2), len(x), np.nan)
        x = place_items(np.where(np.isnan(wanted), x, wanted), item_row, item_width, width)
    return x


def _row_heights(rows: pd.DataFrame, levels: Int[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    """Height of every row; rows of one block stand a full step apart, blocks closer."""
    if len(rows) == 0:
        return np.zeros(0)
    slot = rows["slot"].to_numpy(int)
    part = (slot >= _FIRST_MLP_SLOT).astype(int) + (slot >= len(ROWS))
    block = rows["layer"].to_numpy(int) * 3 + part
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
    inside = nodes.assign(item=item)[np.isin(item, np.flatnonzero(is_head))]
    box = inside.groupby("item").agg(
        layer=("layer", "first"), head=("head", "first"), y0=("y", "min"), y1=("y", "max")
    )
    which = np.flatnonzero(is_head)
    half = item_width[which] / 2 - 0.08
    box["x0"], box["x1"] = item_x[which] - half, item_x[which] + half
    return box.reset_index(drop=True)
