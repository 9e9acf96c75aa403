"""Circuits that are known without pruning, and what the suite is run on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.analyses.conftest import chain, circuit_of

__all__ = ["chain", "circuit_of"]


@pytest.fixture
def tested(random_tokens: Any) -> Callable[..., Any]:
    """``tested(model, task, circuit, **config)``: a CircuitUnderTest, small, with text."""

    def build(model: Any, task: Any, circuit: Any, **config: Any) -> Any:
        from tl_sparse.faithfulness import EvaluationConfig, under_test

        small = {"pairs": 8, "draws": 200, "controls": 4, "subsets": 6, "attack_steps": 6}
        chosen = EvaluationConfig(**(small | config))
        return under_test(model, circuit, task, chosen, random_tokens)

    return build


@pytest.fixture
def whole(chain: Any, tested: Any) -> Any:
    """The CircuitUnderTest of the chain of six nodes in the planted model."""
    model, task, circuit = chain
    torch.manual_seed(0)
    return tested(model, task, circuit)
