"""A pair of small models, and text for them, that every test of training starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


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
