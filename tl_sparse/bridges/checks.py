"""Whether two models, and bridges, fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tl_sparse.bridges.config import BridgesConfig
from tl_sparse.bridges.segments import Segments


def check_vocabularies(dense: nn.Module, sparse: nn.Module) -> None:
    """Refuse models whose tokens are not the same.

    Raises:
        ValueError: their vocabularies differ in size or in a token.
    """
    sizes = [(int(m.cfg.d_vocab), logits_of(m)) for m in (dense, sparse)]  # type: ignore[union-attr, arg-type]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the models' vocabularies differ: {sizes[0][0]} and {sizes[1][0]} tokens "
            f"({sizes[0][1]} and {sizes[1][1]} logits); bridges need one tokenizer"
        )
    vocabularies = [t.get_vocab() for m in (dense, sparse) if (t := getattr(m, "tokenizer", None))]
    if len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        other = sum(vocabularies[1].get(word) != i for word, i in vocabularies[0].items())
        raise ValueError(
            f"the models' tokenizers differ: {other} of {len(vocabularies[0])} tokens have another "
            "id, or none, in the other model; bridges need one tokenizer"
        )


def logits_of(model: Any) -> int:
    """Logits that a model has for every token."""
    out = getattr(model.cfg, "d_vocab_out", None)
    return int(model.cfg.d_vocab if out in (None, -1) else out)


def check_sizes(segments: Mapping[str, Segments], config: BridgesConfig) -> None:
    """ValueError unless bridges are for models of these sizes."""
    for side, end in segments.items():
        width = int(end.model.cfg.d_model)  # type: ignore[union-attr, arg-type]
        wanted = getattr(config, f"d_{side}"), getattr(config, f"n_{side}")
        if (width, end.n_layers) != wanted:
            raise ValueError(
                f"the bridges are for a {side} model of {wanted[1]} layers of {wanted[0]} "
                f"channels; this one has {end.n_layers} of {width}"
            )
        if config.mid and not end.has_mid:
            raise ValueError(f"the {side} model has no stream between attention and MLP: make the "
                             "bridges with mid=False")  # fmt: skip
