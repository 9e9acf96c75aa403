"""Colours, labels and hover texts shared by the Plotly figure, the SVG and the page."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_sparse.views.text import number

POSITIVE = "#2f6fd0"
NEGATIVE = "#d43d3d"
LANE = "#8b8f98"


@dataclass(frozen=True)
class SiteStyle:
    """How the nodes of one site look; the colours are readable on white and on near-black."""

    label: str
    """Words for legends and hover texts."""
    short: str
    """What stands before the channel in a small label."""
    colour: str
    """Fill colour."""
    symbol: str
    """"circle", or "square" for writes into the residual stream."""


SITE_STYLES: dict[str, SiteStyle] = {
    "embed": SiteStyle("embedding writes", "", "#6b7688", "square"),
    "attn_in": SiteStyle("attention reads", "", "#a3acba", "circle"),
    "attn_q": SiteStyle("query", "q", "#e39a1c", "circle"),
    "attn_k": SiteStyle("key", "k", "#c9b400", "circle"),
    "attn_v": SiteStyle("value", "v", "#b765b0", "circle"),
    "attn_out": SiteStyle("attention writes", "", "#6b7688", "square"),
    "mlp_in": SiteStyle("mlp reads", "", "#a3acba", "circle"),
    "mlp_neuron": SiteStyle("neuron", "", "#1f9d78", "circle"),
    "mlp_out": SiteStyle("mlp writes", "", "#6b7688", "square"),
    "final_resid": SiteStyle("final norm reads", "", "#a3acba", "circle"),
}
"""Blue and red are left to the signs of edges and activations."""


def site_style(site: str) -> SiteStyle:
    """How nodes of a site look; sites outside the table go by their own names."""
    return SITE_STYLES.get(site, SiteStyle(site, "", "#1f9d78", "circle"))


def node_labels(nodes: pd.DataFrame) -> list[str]:
    """Short label of every node: the channel, for q/k/v the letter and the channel in its head."""
    shorts = nodes["site"].map(lambda site: site_style(site).short)
    channel = nodes["head_channel"].fillna(nodes["channel"]).astype(int).astype(str)
    return (shorts + channel).tolist()


def node_names(nodes: pd.DataFrame) -> list[str]:
    """Full name of every node, e.g. "layer 10 · key 1 of head 82" or "layer 0 · neuron 863"."""
    words = nodes["site"].map(lambda site: site_style(site).label)
    layer = "layer " + nodes["layer"].astype(str) + " · " + words + " "
    of_head = nodes["head_channel"].astype(str) + " of head " + nodes["head"].astype(str)
    return (layer + of_head.where(nodes["head"].notna(), nodes["channel"].astype(str))).tolist()


def node_facts(nodes: pd.DataFrame) -> list[str]:
    """Mean and mask parameter of every node as one line, as far as they are known."""
    known = [(name, nodes[name].astype(float)) for name in ("mean", "tau") if name in nodes]
    words = {"mean": "mean", "tau": "τ"}
    return [
        " · ".join(f"{words[name]} {number(values.iloc[i])}" for name, values in known)
        for i in range(len(nodes))
    ]


def strength(weights: Float[np.ndarray, " edge"]) -> Float[np.ndarray, " edge"]:
    """|weight| over the largest |weight|, in [0, 1]."""
    size = np.abs(weights)
    largest = size.max(initial=0.0)
    return size / largest if largest > 0 else size


def edge_width(relative: Float[np.ndarray, " edge"], crowd: int) -> Float[np.ndarray, " edge"]:
    """Line width in pixels of edges of relative strength, thinner in a crowd of edges."""
    widest = 4.2 if crowd <= 150 else 3.2
    thinnest = 1.1 if crowd <= 150 else 0.45
    return thinnest + (widest - thinnest) * relative


def edge_opacity(relative: Float[np.ndarray, " edge"], crowd: int) -> Float[np.ndarray, " edge"]:
    """Opacity of edges of relative strength: a crowd of weak edges must not hide the strong."""
    faintest = float(np.clip(0.75 - 0.12 * np.log10(max(crowd, 10) / 10) * 2, 0.18, 0.75))
    return faintest + (0.95 - faintest) * relative


def shown_note(shown: int, total: int) -> str:
    """Says how many edges a picture shows when it does not show all; empty when it does."""
    if shown == total:
        return ""
    return f"only the {shown:,} strongest of {total:,} edges are drawn"
