"""Colours, labels and hover texts shared by the Plotly figure, the SVG and the page."""

import re
from dataclasses import dataclass
from math import isnan

import numpy as np
import pandas as pd
from jaxtyping import Float

from tl_sparse.node import released_names
from tl_sparse.sites import SITES
from tl_sparse.views.text import number, printable

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
    site.name: SiteStyle(site.label, site.short, site.colour, "square" if site.writes else "circle")
    for site in SITES
}


RELEASED = [site.name for site in SITES if site.openai]
"""Sites that OpenAI's release has a name for."""


OTHER = SiteStyle("node", "", "#4aa3df", "circle")
"""Nodes of hooks that are no site of the table."""
OTHERS = (
    (re.compile("mlp"), SiteStyle("MLP node", "", "#1d9a6c", "circle")),
    (re.compile(r"attn|hook_[zqkv]\b"), SiteStyle("attention node", "", "#b55fb5", "circle")),
    (re.compile("embed"), SiteStyle("embedding node", "", "#6b7688", "circle")),
)
"""Those whose hook names a part of the model: the colours of neurons, values and the residual
stream."""


def site_style(site: str) -> SiteStyle:
    """How nodes of a site, or of another hook, look."""
    if site in SITE_STYLES:
        return SITE_STYLES[site]
    return next((style for part, style in OTHERS if part.search(site)), OTHER)


def node_places(nodes: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """The layer of every node, and the words for its site: of a hook that is no site of the table
    ("blocks.3.attn.hook_z") its block (3) and the rest of its name ("attn.z")."""
    known = nodes["site"].isin(list(SITE_STYLES))
    hook = nodes["hook"].astype(str)
    block = hook.str.extract(r"^blocks\.(\d+)\.")[0].astype("Int64")
    words = hook.str.replace(r"^blocks\.\d+\.|hook_", "", regex=True).map(printable)
    labels = nodes["site"].map(lambda site: site_style(site).label)
    return block.where(~known).fillna(nodes["layer"]).astype(int), labels.where(known, words)


def node_labels(nodes: pd.DataFrame) -> list[str]:
    """Short label of every node: its channel, in a head with the site's letter before it ("v93");
    of a whole head, which has no channel, "H5"."""
    shorts = nodes["site"].map(lambda site: site_style(site).short)
    whole = nodes["head"].notna() & nodes["head_channel"].isna()
    place = nodes["channel"].where(~whole, nodes["head"]).astype(int).astype(str)
    return (shorts.where(~whole, "H") + place).tolist()


def node_names(nodes: pd.DataFrame) -> list[str]:
    """Full name of every node, e.g. "layer 10 · key 657 of head 82", "layer 0 · neuron 863" or
    "layer 3 · attn.z head 5"."""
    layer, words = node_places(nodes)
    head = "head " + nodes["head"].astype(str)
    channel = nodes["channel"].astype(str)
    which = channel.where(nodes["head"].isna(), head)
    which = which.where(nodes["head_channel"].isna(), channel + " of " + head)
    return ("layer " + layer.astype(str) + " · " + words + " " + which).tolist()


def node_facts(nodes: pd.DataFrame) -> list[str]:
    """Name in OpenAI's release, mean and mask parameter of every node as one line, as far as they
    are known."""
    known = [(words, nodes[name].astype(float).tolist())
             for name, words in (("mean", "mean"), ("tau", "τ")) if name in nodes]  # fmt: skip
    named = nodes["site"].isin(RELEASED) & (nodes["head"].isna() | nodes["head_channel"].notna())
    names = released_names(nodes["layer"], nodes["site"], nodes["channel"])
    return [
        " · ".join(
            [
                *([name] if has_name else []),
                *(f"{words} {number(v[i])}" for words, v in known if not isnan(v[i])),
            ]
        )
        for i, (name, has_name) in enumerate(zip(names, named, strict=True))
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
