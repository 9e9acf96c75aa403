"""Figures of bridges, from tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go


def path_figure(table: pd.DataFrame) -> go.Figure:
    """KL from the dense model by site, from the rows of ``PathTable.to_dataframe``."""
    from tl_sparse.views.chart import Look, Panel, chart

    once = table[(table["site"] != "") & (table["back"] == "")]
    own = once["bridges"].isin(["", "own"])
    points = pd.DataFrame(
        {
            "series": once["kind"].where(own, once["kind"] + ", " + once["bridges"]),
            "x": once["site"], "y": once["kl"],
            "y_low": once["kl"] - once["kl_se"], "y_high": once["kl"] + once["kl_se"],
        }
    )  # fmt: skip
    sparse = table[table["kind"] == "sparse"]["kl"]
    level = (float(sparse.iloc[0]), "the sparse model alone") if len(sparse) else None
    means = {f"mean→{letter}": Look("joined", dash="dot") for letter in "sd"}
    panel = Panel(points, "site of the change", "KL(dense ‖ path), nats", y_level=level)
    return chart("Hybrids of the two models", [panel], looks=means, look=Look("joined"))


def fvu_figure(table: pd.DataFrame) -> go.Figure:
    """Fraction of variance unexplained by site, from ``Reconstruction.to_dataframe``."""
    from tl_sparse.views.chart import Look, Panel, chart

    names = {"encoder": "encoder, dense → sparse", "decoder": "decoder, sparse → dense"}
    points = pd.concat(
        [
            pd.DataFrame(
                {
                    "series": label, "x": table["site"], "y": table[name],
                    "y_low": table[name] - table[f"{name}_se"],
                    "y_high": table[name] + table[f"{name}_se"],
                }
            )
            for name, label in names.items()
        ]
    )  # fmt: skip
    panel = Panel(points, "site", "fraction of variance unexplained")
    return chart("What the bridges leave unexplained", [panel], look=Look("joined"))
