"""Which tokens write a channel of the residual stream, and which logits read it."""

from __future__ import annotations

from functools import cache
from numbers import Integral
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from tl_sparse.node import Node, NodeName
from tl_sparse.nodes.connections import check_k
from tl_sparse.nodes.places import norms_of, part_of
from tl_sparse.sites import SITE


def channel_tokens(model: nn.Module, channel: int | NodeName, k: int | None = None) -> pd.DataFrame:
    """Tokens whose embeddings write a channel, and tokens whose logits read it, by size.

    Args:
        model: A SparseTransformer or another TransformerLens model.
        channel: Its number, or any node that stands at one (``6.attn.act_in:1249``).
        k: Only the k of largest absolute weight of each kind; None: all.

    Returns:
        A row a nonzero weight: role ("writes": a row of W_E; "reads": a column of W_U), token (its
        id), text (None for an id without a token, and without a tokenizer), has_token, weight, and
        effective (of a logit: times the final norm's weight at the channel).

    Raises:
        ValueError: there is no such channel.
    """
    check_k(k)
    part: Any = model
    channel = stream_channel(part, channel)
    scale = final_scale(part)[channel]
    rows = {"writes": (part.W_E[:, channel], 1.0), "reads": (part.W_U[channel], float(scale))}
    frames = [
        token_rows(model, weights.detach(), k).assign(
            role=role, effective=lambda f, s=s: f.weight * s
        )
        for role, (weights, s) in rows.items()
    ]
    found = pd.concat(frames, ignore_index=True)
    return found[["role", "token", "text", "has_token", "weight", "effective"]]


@torch.no_grad()
def extreme_tokens(model: nn.Module, channels: Int[Tensor, " channel"], k: int = 6) -> pd.DataFrame:
    """Of many channels at once: the tokens with the k largest and the k smallest weights.

    The columns of :func:`channel_tokens`, with the channel first; weights that are zero are left
    out, and so are channels after those of embedding and unembedding (positions).

    Raises:
        ValueError: a negative channel, or ``k`` below 1.
    """
    check_k(k)
    part: Any = model
    if bool((channels < 0).any()):
        raise ValueError("channels count on from 0")
    there = channels[channels < part.cfg.d_model].unique().to(part.W_E.device)
    scale = final_scale(part)[there].float()
    frames = []
    for role, table, scales in (("writes", part.W_E[:, there].T, torch.ones_like(scale)),
                                ("reads", part.W_U[there], scale)):  # fmt: skip
        table = table.detach().float()
        ends = [table.topk(min(k, table.shape[1]), largest=largest) for largest in (True, False)]
        weights, ids = (torch.cat(x, 1) for x in zip(*ends, strict=True))
        right = torch.arange(weights.shape[1], device=weights.device) < ends[0].values.shape[1]
        row, column = torch.nonzero(torch.where(right, weights > 0, weights < 0), as_tuple=True)
        token, weight = ids[row, column].cpu(), weights[row, column]
        texts = token_texts(getattr(model, "tokenizer", None), token)
        frames.append(
            pd.DataFrame(
                {
                    "channel": there[row].cpu().numpy(),
                    "role": role,
                    "token": token.numpy(),
                    "text": pd.Series(texts, dtype=object),
                    "has_token": [text is not None for text in texts],
                    "weight": weight.cpu().numpy(),
                    "effective": (weight * scales[row]).cpu().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def bigram_row(model: nn.Module, token: int | str, k: int | None = None) -> pd.DataFrame:
    """What the bigram table adds to the logits after a token, by size.

    The columns are token, text, has_token and weight, as in :func:`channel_tokens`.

    Raises:
        ValueError: the model has no bigram table, or there is no such token.
    """
    check_k(k)
    part: Any = model
    if "bigram" not in part._modules:
        raise ValueError(f"this {type(model).__name__} has no bigram table")
    return token_rows(model, part.bigram.W_B[token_id(part, token)].detach(), k)


def token_rows(model: Any, weights: Float[Tensor, " token"], k: int | None) -> pd.DataFrame:
    """A row for each nonzero weight of a token."""
    ids = torch.nonzero(weights).flatten().cpu()
    values = weights.float().cpu()[ids]
    order = values.abs().argsort(descending=True, stable=True)[:k]
    texts = token_texts(getattr(model, "tokenizer", None), ids[order])
    return pd.DataFrame(
        {
            "token": ids[order].numpy(),
            "text": pd.Series(texts, dtype=object),
            "has_token": [text is not None for text in texts],
            "weight": values[order].numpy(),
        }
    )


def token_texts(tokenizer: Any, ids: Int[Tensor, " token"]) -> list[str | None]:
    """The text of each token; None for an id without one, and if there is no tokenizer."""
    return [None if tokenizer is None else token_text(tokenizer, i) for i in ids.tolist()]


def token_text(tokenizer: Any, token: int) -> str | None:
    """The text of a token; None if the tokenizer has none of this id."""
    try:
        if tokenizer.convert_ids_to_tokens(token) is None:
            return None
        text = str(tokenizer.decode([token]))
    except (KeyError, IndexError):  # what some tokenizers raise for such an id
        return None
    return (
        text if "\ufffd" not in text else bytes_text(tokenizer.convert_ids_to_tokens(token), text)
    )


def bytes_text(piece: str, text: str) -> str:
    r"""What a token of half a letter is: its bytes, such as ``\xe2\x80``, where the vocabulary
    writes bytes as GPT-2's does; ``text`` otherwise."""
    known = byte_of_sign()
    if not set(piece) <= set(known):
        return text
    return "".join(f"\\x{known[sign]:02x}" for sign in piece)


@cache
def byte_of_sign() -> dict[str, int]:
    """What each sign of GPT-2's byte alphabet stands for: itself if it is a byte, else the bytes
    that are left, in order."""
    signs = sorted(ByteLevel.alphabet())
    known = {sign: ord(sign) for sign in signs if ord(sign) < 256}
    left = sorted({*range(256)} - {*known.values()})
    return known | dict(zip(signs[len(known) :], left, strict=True))


def token_id(model: Any, token: int | str) -> int:
    """The id of a token given by its id or its text."""
    if isinstance(token, str):
        if model.tokenizer is None:
            raise ValueError(f"token {token!r}: the model has no tokenizer; give its id")
        ids = model.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"{token!r} is {len(ids)} tokens; name one")
        return int(ids[0])
    if not isinstance(token, Integral) or not 0 <= token < model.cfg.d_vocab:
        raise ValueError(f"token {token!r}: this model has 0 to {model.cfg.d_vocab - 1}")
    return int(token)


def stream_channel(model: Any, channel: int | NodeName) -> int:
    """The channel of the residual stream that a number or a node means."""
    d_model = model.cfg.d_model
    if isinstance(channel, Integral) and not isinstance(channel, bool):
        name, at = f"channel {channel}", int(channel)
    else:
        node = Node(channel).on(model)
        name, at = str(node), int(node.channel or 0)
        if node.site not in SITE or SITE[node.site].kind != "residual":
            raise ValueError(
                f"{name} is no channel of the residual stream; writers() and readers() name those "
                "that it is connected to"
            )
    if not 0 <= at < d_model:
        raise ValueError(
            f"{name}: embedding and unembedding have channels 0 to {d_model - 1} "
            "(those after them are positions)"
        )
    return at


def final_scale(model: Any) -> Float[Tensor, " channel"]:
    """The final norm's weight; ones where there is none."""
    for name, *_, norm in norms_of(model):
        if name == "ln_final" and (weight := part_of(norm, ("w", "weight"))) is not None:
            return weight.detach()
    return torch.ones(model.cfg.d_model)
