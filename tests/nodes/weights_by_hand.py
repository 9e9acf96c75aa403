"""The connections of a SparseTransformer, entry by entry, for comparison."""

from collections.abc import Iterator
from typing import Any

import torch

Row = tuple[str, str, str, float]
"""Source, target, matrix, weight."""


def entries(tensor: torch.Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every nonzero entry and where it is."""
    values = tensor.tolist()
    for at in torch.nonzero(tensor).tolist():
        value = values
        for i in at:
            value = value[i]
        yield tuple(at), value


def every_weight(model: Any) -> list[Row]:
    """One row for each nonzero weight and bias of a model."""
    d_model, d_head = model.config.d_model, model.config.d_head
    rows: list[Row] = []
    rows += [(f"token:{t}", f"hook_embed:{c}", "embed.W_E", w) for (t, c), w in entries(model.W_E)]
    if model.config.positional_embedding_type != "none":
        lane = "hook_pos_concat" if model.config.concat_positions else "hook_pos_embed"
        rows += [
            (f"position:{p}", f"{lane}:{c}", "pos_embed.W_pos", w)
            for (p, c), w in entries(model.W_pos)
        ]
    for n, block in enumerate(model.blocks):
        attn, at = block.attn, f"blocks.{n}.attn."
        for name in "QKV":
            target = f"{n}.attn.{name.lower()}"
            rows += [
                (f"{n}.attn.act_in:{c}", f"{target}:{h * d_head + d}", f"{at}W_{name}", w)
                for (h, c, d), w in entries(getattr(attn, f"W_{name}"))
            ]
            if model.config.d_pos:
                rows += [
                    (f"{n}.attn.act_in:{d_model + p}", f"{target}:{h * d_head + d}",
                     f"{at}W_{name}", w)
                    for (h, p, d), w in entries(getattr(attn, f"W_{name}_pos"))
                ]  # fmt: skip
            rows += [
                (f"{at}b_{name}", f"{target}:{h * d_head + d}", f"{at}b_{name}", w)
                for (h, d), w in entries(getattr(attn, f"b_{name}"))
            ]
        rows += [
            (f"{n}.attn.v:{h * d_head + d}", f"{n}.attn.resid_delta:{c}", f"{at}W_O", w)
            for (h, d, c), w in entries(attn.W_O)
        ]
        rows += bias(f"{n}.attn.resid_delta", f"{at}b_O", attn.b_O)
        rows += norm_bias(f"{n}.attn.act_in", f"blocks.{n}.ln1", block.ln1)
        if model.config.attn_only:
            continue
        mlp, at = block.mlp, f"blocks.{n}.mlp."
        reads = torch.cat([mlp.W_in, mlp.W_in_pos]) if model.config.d_pos else mlp.W_in
        rows += [
            (f"{n}.mlp.act_in:{c}", f"{n}.mlp.post_act:{i}", f"{at}W_in", w)
            for (c, i), w in entries(reads)
        ]
        rows += bias(f"{n}.mlp.post_act", f"{at}b_in", mlp.b_in)
        rows += [
            (f"{n}.mlp.post_act:{i}", f"{n}.mlp.resid_delta:{c}", f"{at}W_out", w)
            for (i, c), w in entries(mlp.W_out)
        ]
        rows += bias(f"{n}.mlp.resid_delta", f"{at}b_out", mlp.b_out)
        rows += norm_bias(f"{n}.mlp.act_in", f"blocks.{n}.ln2", block.ln2)
    rows += norm_bias("final_resid", "ln_final", model.ln_final)
    rows += [
        (f"final_resid:{c}", f"logit:{t}", "unembed.W_U", w) for (c, t), w in entries(model.W_U)
    ]
    rows += bias("logit", "unembed.b_U", model.b_U)
    if model.config.bigram_table != "none":
        rows += [
            (f"token:{a}", f"logit:{b}", "bigram.W_B", w) for (a, b), w in entries(model.bigram.W_B)
        ]
    return rows


def bias(target: str, name: str, vector: torch.Tensor) -> list[Row]:
    return [(name, f"{target}:{c}", name, w) for (c,), w in entries(vector)]


def norm_bias(target: str, name: str, norm: Any) -> list[Row]:
    vector = getattr(norm, "b", None)
    return [] if vector is None else bias(target, f"{name}.b", vector)


def later_reads(name: str, n_layers: int, d_model: int) -> list[str]:
    """The nodes that read what a node writes to the residual stream; none if it writes none."""
    place, channel = name.rsplit(":", 1)
    if place == "hook_pos_concat":
        reads = [f"{n}.{part}.act_in" for n in range(n_layers) for part in ("attn", "mlp")]
        return [f"{read}:{d_model + int(channel)}" for read in reads]
    if place in ("hook_embed", "hook_pos_embed"):
        reads = [f"{n}.{part}.act_in" for n in range(n_layers) for part in ("attn", "mlp")]
    elif place.endswith("resid_delta"):
        layer = int(place.split(".")[0])
        reads = [f"{layer}.mlp.act_in"] if ".attn." in place else []
        reads += [f"{n}.{p}.act_in" for n in range(layer + 1, n_layers) for p in ("attn", "mlp")]
    else:
        return []
    return [f"{read}:{channel}" for read in [*reads, "final_resid"]]


def all_steps(model: Any, direction: str) -> dict[str, list[tuple[str, str, str, float]]]:
    """For each node its (other end, through, matrix, weight), through the residual stream too."""
    rows = every_weight(model)
    size = (model.config.n_layers, model.config.d_model)
    links = [(w, r) for w in {row[1] for row in rows} for r in later_reads(w, *size)]
    found: dict[str, list] = {}
    for source, target, matrix, weight in rows:
        near, far = (source, target) if direction == "forward" else (target, source)
        found.setdefault(near, []).append((far, "", matrix, weight))
    direct = {name: list(steps) for name, steps in found.items()}
    for write, read in links:
        asked, near = (write, read) if direction == "forward" else (read, write)
        for far, _, matrix, weight in direct.get(near, []):
            found.setdefault(asked, []).append((far, near, matrix, weight))
    return found
