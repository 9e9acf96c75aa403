"""``DictionaryObjective``: what dictionaries are trained for, as an objective of the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.storage.fingerprint import fingerprint
from tl_sparse.tracing.dictionary_config import DictionaryTrainingConfig, Place
from tl_sparse.tracing.learned import LearnedDictionaries
from tl_sparse.tracing.splice import keep_in
from tl_sparse.training.objective import Moment

FOLDER = "dictionaries"
MEASURED = ("fvu", "l0", "dead")
"""Columns of the metrics, one each for every place."""


class DictionaryObjective:
    """The sum of the losses of several dictionaries of one frozen model (see
    :class:`DictionaryTrainingConfig`); they share nothing but its forward pass."""

    is_loss_of_model = False

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Place],
        sizes: Mapping[str, int],
        config: DictionaryTrainingConfig,
    ) -> None:
        self.places, self.config = tuple(chosen), config
        self.of = fingerprint(model)
        self.learned = LearnedDictionaries(chosen, sizes, config)
        self.companions: Mapping[str, LearnedDictionaries] = {FOLDER: self.learned}
        self.columns: Sequence[str] = tuple(
            f"{name}/{place.hook_out}" for place in chosen for name in MEASURED
        )

    def description(self) -> dict[str, Any]:
        """The settings, the places, and which model it is."""
        return {
            "dictionary_training": asdict(self.config),
            "places": [asdict(place) for place in self.places],
            "dictionaries_of": self.of,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group: nothing decays."""
        return [{"params": list(self.learned.parameters()), "weight_decay": 0.0}]

    def start(self, device: torch.device) -> None:
        """Put the dictionaries there."""
        self.learned.to(device)

    def backward(
        self, model: nn.Module, tokens: Int[Tensor, "sequence pos"], moment: Moment
    ) -> dict[str, Float[Tensor, ""]]:
        """Add the gradients of all dictionaries on one batch."""
        with moment.autocast(), torch.no_grad():
            seen = activations_at(model, tokens, self.places)
        measured: dict[str, Float[Tensor, ""]] = {}
        total = []
        for place, dictionary in zip(self.places, self.learned.dictionaries, strict=True):
            x, y = (seen[hook].float().flatten(0, 1) for hook in (place.hook_in, place.hook_out))
            dictionary.start(x, y)
            with moment.autocast():
                losses = dictionary.losses(x, y)
            (losses["loss"] / moment.parts).backward()
            dictionary.drop_parallel_gradient()
            total.append(losses["loss"].detach())
            measured |= {f"{name}/{place.hook_out}": losses[name] for name in MEASURED}
        return {"loss": torch.stack(total).sum(), **measured}


def activations_at(
    model: nn.Module, tokens: Int[Tensor, "sequence pos"], chosen: Sequence[Place]
) -> dict[str, Tensor]:
    """The activations that dictionaries at these places read and explain, from one forward pass."""
    seen: dict[str, Tensor] = {}
    names = sorted({hook for place in chosen for hook in (place.hook_in, place.hook_out)})
    run: Any = model
    run.run_with_hooks(tokens, return_type=None, fwd_hooks=[keep_in(seen, name) for name in names])
    return seen
