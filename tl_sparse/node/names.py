"""Names of nodes, read: layer, site and channel (or head) of every form that people use."""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any

from tl_sparse.sites import SITE, SITES, layer_of, site_at

LAST = -1
"""The layer of a node of the final residual stream, until a model says which is its last."""
HEAD_SITES = {row.short: row for row in SITES if row.short}
BY_OPENAI = {row.openai.removeprefix("{layer}."): row for row in SITES if row.openai}
IN_BLOCK = re.compile(r"blocks\.(\d+)\.")
CHANNEL = re.compile(r"(?P<place>.+?)(?::(?P<a>\d+)|\[(?P<b>\d+)\]|\.(?P<c>\d+))")
HEAD = re.compile(r"(?:L(?P<l>\d+)H(?P<h>\d+)|(?P<l2>\d+)\.attn\.head(?P<h2>\d+))"
                  r"(?:\.(?P<site>[a-z])(?P<channel>\d+)?)?")  # fmt: skip
NEURONPEDIA = re.compile(r"(?P<layer>\d+)-mlp/(?P<channel>\d+)")
FORMS = (
    "'4.attn.act_in:1249', '4.attn_in.1249', (4, 'attn_in', 1249), "
    "'blocks.4.attn.hook_act_in:1249', 'L10H82.v3', '6-mlp/5543' or 'final_resid:1079'"
)


def parsed(name: str) -> dict[str, Any]:
    """The fields of the node of that name; ValueError if it is the name of none."""
    text = name.strip()
    if found := NEURONPEDIA.fullmatch(text):
        return {
            "layer": int(found["layer"]),
            "site": "mlp_neuron",
            "channel": int(found["channel"]),
        }
    if found := HEAD.fullmatch(text):
        layer, head = int(found["l"] or found["l2"]), int(found["h"] or found["h2"])
        if found["channel"] is None:
            raise ValueError(
                f"{name!r} names a group of nodes; a node of it is L{layer}H{head}.v0, and "
                "resolve(model, name) lists them"
            )
        if found["site"] not in HEAD_SITES:
            raise ValueError(
                f"{name!r}: a head's channels are {', '.join(HEAD_SITES)}, not {found['site']}"
            )
        return {
            "layer": layer, "site": HEAD_SITES[found["site"]].name, "head": head,
            "head_channel": int(found["channel"]),
        }  # fmt: skip
    if (found := CHANNEL.fullmatch(text)) is None:
        raise no_node(name)
    layer, site = placed(found["place"], name)
    return {"layer": layer, "site": site, "channel": int(found["a"] or found["b"] or found["c"])}


def placed(place: str, name: Any) -> tuple[int, str]:
    """Layer and site (or hook) of the part of a name before the channel."""
    inside = IN_BLOCK.match(place)
    row = site_at(place)
    if row is not None and row.where != "last":
        return int(inside[1]) if inside else 0, row.name
    if inside or "hook" in place:  # a feature's, or the residual stream: whether final, on() says
        return int(inside[1]) if inside else layer_of(place, 0), place
    numbered = re.fullmatch(r"(\d+)\.(.+)", place)
    within = numbered[2] if numbered else place
    row = BY_OPENAI.get(within) or SITE.get(within)
    if row is not None and (numbered or row.where != "every"):
        return int(numbered[1]) if numbered else LAST if row.where == "last" else 0, row.name
    if numbered is None:
        raise no_node(name)
    layer = int(numbered[1])
    there = [r for r in SITES if r.where == "every"]
    raise ValueError(
        f"{name!r:.80}: layer {layer} has no {within!r:.40}; its places are "
        + ", ".join(f"{row.openai.format(layer=layer)} ({row.name})" for row in there)
    )


def of_parts(parts: Any) -> dict[str, Any]:
    """The fields of (layer, site, channel)."""
    if not is_parts(parts) or not isinstance(parts[2], Integral) or isinstance(parts[2], bool):
        raise no_node(parts)
    layer, site, channel = int(parts[0]), parts[1], int(parts[2])
    if channel < 0 or layer < LAST:
        raise ValueError(f"{parts!r:.80}: layers and channels count on from 0")
    if not (site in SITE or IN_BLOCK.match(site) or "hook" in site):
        layer, site = placed(f"{layer}.{site}", parts)
    elif (row := site_at(site)) is not None and row.where != "last":
        site = row.name
    return {"layer": layer, "site": site, "channel": channel}


def is_parts(value: Any) -> bool:
    """Whether a value is written as one (layer, site, channel)."""
    return (
        isinstance(value, tuple | list) and len(value) == 3 and isinstance(value[0], Integral)
        and not isinstance(value[0], bool) and isinstance(value[1], str)
    )  # fmt: skip


def no_node(name: Any) -> ValueError:
    """The error for what is no name of a node."""
    return ValueError(f"{name!r:.80} is no name of a node; write it as {FORMS}")
