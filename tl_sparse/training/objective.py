"""What a trainer minimises: next-token cross-entropy, unless it is given another objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """Which part of which step a backward pass belongs to."""

    step: int
    """0-based optimiser step."""
    steps: int
    """Steps of the whole run."""
    seed: tuple[int, ...]
    """Of whatever is drawn at random: the run's seed, the step, the part; the process last."""
    parts: int
    """Backward passes of the step: every loss is divided by it."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """The precision to compute losses in."""


@runtime_checkable
class Companion(Protocol):
    """A module that is trained beside the model, and saved and loaded with it."""

    def parameters(self) -> Any:
        """Its parameters."""

    def named_parameters(self) -> Any:
        """The same, with names."""

    def to(self, device: torch.device) -> Any:
        """Move it."""

    def save_pretrained(self, folder: Path) -> None:
        """Write it to a folder, all or nothing, its numbers as they are."""

    def load_pretrained(self, folder: Path) -> None:
        """Take the numbers from what :meth:`save_pretrained` wrote."""


@runtime_checkable
class Objective(Protocol):
    """What a trainer minimises, and what is trained beside the model for it."""

    @property
    def companions(self) -> Mapping[str, Companion]:
        """What is trained beside the model, by the name of the folder it is saved in."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of what :meth:`backward` measures besides the loss: columns of the metrics."""

    @property
    def is_loss_of_model(self) -> bool:
        """Whether it is computed by one call of the model, which torch can wrap to average its
        gradients over processes; if not, the trainer averages them."""

    def description(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed, as plain values; {}: nothing."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups of the companions' parameters (``train_step.make_optimizer``)."""

    def start(self, device: torch.device) -> None:
        """Get ready to train on a device."""

    def backward(
        self, model: nn.Module, tokens: Int[Tensor, "sequence pos"], moment: Moment
    ) -> dict[str, Float[Tensor, ""]]:
        """Add the gradients of one batch; what was measured: "loss", and some of the columns."""


class NextToken:
    """Next-token cross-entropy, and nothing beside the model."""

    companions: Mapping[str, Companion] = {}
    columns: Sequence[str] = ()
    is_loss_of_model = True

    def description(self) -> dict[str, Any]:
        """Nothing that other runs do not have."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """None."""
        return []

    def start(self, device: torch.device) -> None:
        """Nothing to do."""

    def backward(
        self, model: nn.Module, tokens: Int[Tensor, "sequence pos"], moment: Moment
    ) -> dict[str, Float[Tensor, ""]]:
        """Add the gradient of the mean loss (nats per token)."""
        with moment.autocast():
            loss = model(tokens, return_type="loss")
        (loss / moment.parts).backward()
        return {"loss": loss.detach()}
