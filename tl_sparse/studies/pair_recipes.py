"""The recipes of pairs and trios, by name, and how each was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

from tl_sparse.data import WHOLE_NAMES, CorpusConfig
from tl_sparse.studies.pair_config import (
    PairConfig,
    PairRecipe,
    bridged_training,
    dense_training,
)
from tl_sparse.training.config import TrainingConfig


def pair_recipe(name: str, /, out: str, **changes: Any) -> PairConfig:
    """The config of a recipe, with any field changed.

    Raises:
        ValueError: an unknown recipe; the message lists those that exist.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
    recipe = cast(PairRecipe, name)
    return replace(PairConfig(out=out, recipe=recipe, **RECIPES[recipe]()), **changes)


def _second() -> dict[str, Any]:
    return {
        "seeds": (0,),
        "corpus": CorpusConfig(idiom_share=0.75, idioms="second", required_words=WHOLE_NAMES),
        "sparse_training": TrainingConfig.recipe(
            "cpu", steps=24_000, eval_every=400, save_every=400
        ),
        "dense_training": replace(dense_training(), steps=8000, eval_every=40),
        "bridged": True,
    }


def _accelerator() -> dict[str, Any]:
    """Sixteen times the tokens of a step, and three times the steps: 2.4 billion tokens."""
    second, batch = _second(), 512
    longer: dict[str, Any] = {
        "batch_size": batch, "eval_every": 1000, "save_every": 2000, "log_every": 200,
    }  # fmt: skip
    return second | {
        "sparse_training": replace(second["sparse_training"], steps=72_000, **longer),
        "dense_training": replace(
            second["dense_training"], steps=40_000, batch_size=batch, eval_every=100, log_every=100,
            save_every=2000,
        ),
        "bridged_training": replace(bridged_training(), steps=12_000, **longer),
    }  # fmt: skip


RECIPES: Mapping[PairRecipe, Callable[[], dict[str, Any]]] = {
    "first": dict,
    "second": _second,
    "accelerator": _accelerator,
}

_FIRST = (
    "How this recipe was chosen: of the sparse ones two were trained to their ends, this one and a "
    "wider one at half the density, which ended at a higher loss and was left. Thirteen dense "
    "ones, of width 24 to 64 and with peak learning rates from 0.005 to 0.04, were begun with seed "
    "0 and several given up on the way; of those of width 64 that were stopped at the sparse "
    "model's loss, the one that solved most held-out tasks was kept: with seed 0 the dense results "
    "are a selection. (A dense model of width 32 solves more of the sparse model's tasks at this "
    "loss, with circuits of fewer edges than these.) The recipe was fixed before a dense model of "
    "another seed was trained by it."
)

_SECOND = (
    "How this recipe was chosen: the sparse run is the first recipe's, five times as long, on the "
    "second mix of idioms, of which there is more, so that both models have practised the tasks "
    "more by the time they reach a loss. Short runs of sparse and dense models on drafts of that "
    "mix decided what it has. The dense run's schedule is long, so that its learning rate is still "
    "high, and the tasks are practised, until shortly before it reaches the sparse model's loss. "
    "Width, density and learning rates were not varied."
)

HOW_CHOSEN: Mapping[PairRecipe, str] = {
    "first": _FIRST,
    "second": _SECOND,
    "accelerator": "How this recipe was chosen: it is the second, in larger batches and for "
    "longer; nothing of it was varied.",
}
"""What the cards of models by a recipe say of it."""
