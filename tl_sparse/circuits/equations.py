"""A compiled circuit written out: every kept node as a formula of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import Tensor

from tl_sparse.circuits.compiled import CompiledCircuit
from tl_sparse.circuits.folding import Group

COLUMNS = ["layer", "site", "channel", "formula"]


class Equations(pd.DataFrame):
    """A table of formulas that is shown in full: pandas cuts texts after fifty letters."""

    @property
    def _constructor(self) -> type[Equations]:
        return Equations

    def __repr__(self) -> str:
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            return self.to_string(index=False, justify="left")

    def _repr_html_(self) -> str | None:
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            html: str | None = super()._repr_html_()
            return html


def circuit_equations(compiled: CompiledCircuit) -> Equations:
    """Every computed node, the stream and the logits as formulas: layer, site, channel, formula.

    ``stream[c]`` is a tracked channel where it is read, ``attend[h](x)`` head h's weighted sum of x
    over positions, ``mass[h]`` its weight on all positions together (below 1 with a sink).
    """
    found: list[tuple[int | None, str, int, str]] = []
    for group in compiled.groups:
        formulas = reads(compiled, group) if group.projection is None else written(group)
        for channel, formula in zip(group.channels, formulas, strict=True):
            found.append((group.layer, group.site, channel, formula))
    writers = [group for group in compiled.groups if group.site.endswith("out")]
    for channel in compiled.tracked:
        terms = [
            f"L{group.layer}.{group.site}[{channel}]"
            for group in writers
            if channel in group.channels
        ]
        found.append((None, "stream", channel, " + ".join([f"embed[{channel}]", *terms])))
    names = [f"stream[{channel}]" for channel in compiled.tracked]
    for column, token in enumerate(compiled.token_ids.tolist()):
        inner = total(compiled.W_U[:, column], names, ["table[token]"])
        if compiled.ln_final.centred:
            inner += f" - {number(compiled.W_U_sum[column])}*mean"
        outer = [f"({inner}) / scale" if compiled.ln_final.normalised else inner]
        if float(compiled.b_U[column]):
            outer.append(number(compiled.b_U[column]))
        if compiled.W_B is not None:
            outer.append("bigram[token]")
        found.append((None, "logit", token, " + ".join(outer)))
    return Equations(found, columns=COLUMNS).astype({"layer": "Int64"})


def number(x: Tensor) -> str:
    """Four significant digits."""
    return f"{float(x):.4g}"


def total(weights: Tensor, names: Sequence[str], first: Sequence[str] = ()) -> str:
    """A weighted sum; terms of weight 0 are left out."""
    terms = [f"{number(weights[i])}*{names[i]}" for i in torch.nonzero(weights).flatten().tolist()]
    return " + ".join([*first, *terms]) or "0"


def written(group: Group) -> Iterator[str]:
    """The formulas of a projection's kept outputs."""
    projection = group.projection
    assert projection is not None
    for column in range(projection.n_kept):
        bias = projection.bias[:, column]
        first = ["bias[position]"] if len(bias) > 1 else [number(bias[0])] if bias.any() else []
        formula = total(projection.weight[:, column], group.sources, first)
        if projection.act is not None:
            formula = f"{getattr(projection.act, '__name__', 'act')}({formula})"
        yield formula if projection.k is None else f"AbsTopK({formula})"


def reads(compiled: CompiledCircuit, group: Group) -> Iterator[str]:
    """The formulas of a read's kept channels."""
    block = compiled.blocks[group.layer]
    module, stage = (
        (block.attn, block.ln1) if group.site.startswith("attn") else (block.mlp, block.ln2)
    )
    read = module.read
    for channel in group.channels:
        if channel >= stage.d_model:
            formula = f"place[{channel - stage.d_model}]"
        else:
            place = compiled.tracked.index(channel)
            weight, bias, added = read.weight[place], read.bias[place], stage.added[:, place]
            inner = f"stream[{channel}]"
            if len(added) > 1:
                inner = f"({inner} + added[position])"
            elif added.any():
                inner = f"({inner} + {number(added[0])})"
            if stage.centred:
                inner = f"({inner} - mean)"
            formula = f"{number(weight)}*{inner}" + (" / scale" if stage.normalised else "")
            formula += f" + {number(bias)}" if float(bias) else ""
        yield formula if read.k is None else f"AbsTopK({formula})"
