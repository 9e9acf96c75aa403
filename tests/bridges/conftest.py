"""Pairs of small models, and text for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def make_pair(small_model: Any) -> Callable[..., Any]:
    """``make_pair(sparse="abstopk", dense="plain", tokenizer=None, **config)``: models of 8 and 16
    channels, in double precision if ``double``."""
    from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig

    def make(
        sparse: str = "abstopk", dense: str = "plain", tokenizer: Any = None, double: bool = False,
        layers: tuple[int, int] = (2, 2), **config: Any,
    ) -> Any:  # fmt: skip
        models = (
            small_model(dense, d_model=8, n_heads=2, d_head=4, seed=1, n_layers=layers[0]),
            small_model(sparse, tokenizer=tokenizer, n_layers=layers[1]),
        )
        models = tuple(model.double() if double else model for model in models)
        bridges = Bridges(BridgesConfig.of(*models, **config))
        return BridgedPair(*models, bridges.double() if double else bridges)

    return make


@pytest.fixture
def corpus(make_tokenizer: Any) -> Any:
    """Random words, each of which makes the next one likelier."""
    from tl_sparse.data import CorpusConfig, TokenizedCorpus
    from tl_sparse.data.tokens import CorpusStats

    tokenizer = make_tokenizer()
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 3, 3000)
    ids = (3 + np.cumsum(steps) % (len(tokenizer) - 3)).astype(np.uint16)
    stats = CorpusStats(0, 0, 0, 0, 0, 0, 2000, 1000, 0)
    return TokenizedCorpus(
        ids[:2000], ids[2000:], tokenizer, CorpusConfig(), "some words", stats, (), Path()
    )


@pytest.fixture
def rotated(small_model):
    """A model, another one whose residual stream is the first one's times an orthogonal matrix and
    which computes the same, and the matrix."""

    def make():
        model, other = small_model(), small_model()
        turn = torch.linalg.qr(torch.randn(16, 16))[0]
        with torch.no_grad():
            for each in (model, other):
                for name, parameter in each.named_parameters():
                    if ".ln" in name or "ln_" in name:
                        parameter.fill_(1.0)  # an RMSNorm without weights turns with its stream
            other.embed.W_E.copy_(model.embed.W_E @ turn)
            other.unembed.W_U.copy_(turn.T @ model.W_U)
            for mine, its in zip(model.blocks, other.blocks, strict=True):
                for name in ("W_Q", "W_K", "W_V"):
                    getattr(its.attn, name).copy_(turn.T @ getattr(mine.attn, name))
                its.attn.W_O.copy_(mine.attn.W_O @ turn)
                its.attn.b_O.copy_(mine.attn.b_O @ turn)
                its.mlp.W_in.copy_(turn.T @ mine.mlp.W_in)
                its.mlp.W_out.copy_(mine.mlp.W_out @ turn)
                its.mlp.b_out.copy_(mine.mlp.b_out @ turn)
        return model, other, turn

    return make


@pytest.fixture
def many_tokens():
    """Token ids [30, 12] for the small models."""
    return torch.randint(3, 30, (30, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def twins(small_model: Callable[..., Any]) -> Any:
    """A model of 16 channels with norm weights, and its twin of 24; see tests/bridges/twins.py."""
    from tests.bridges.twins import turned_pair

    return turned_pair(small_model("plain"), 24)


@pytest.fixture
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Presented and counterfactual tokens [4, 6]."""
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.randint(3, 30, (4, 6), generator=generator) for _ in range(2))
