"""Which channels AbsTopK keeps in one model and not in another, on the same tokens.

For models that should be one and the same: in half precision, or with another kernel, sums are
rounded otherwise, and among channels of nearly the same size AbsTopK then keeps others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.model.abstopk import AbsTopK
from tl_sparse.views.display import frame_html


@dataclass(frozen=True)
class ChangedSelections:
    """How often AbsTopK keeps another channel in the second of two models."""

    kept: dict[str, int]
    """Channels that the first model keeps, over all tokens, by the module's name."""
    changed: dict[str, int]
    """How many of them the second one drops."""
    largest_difference: float
    """Largest difference of two logits."""

    @property
    def share(self) -> float:
        """Share of the kept channels that changed, over all places."""
        return sum(self.changed.values()) / max(1, sum(self.kept.values()))

    def to_dataframe(self) -> pd.DataFrame:
        """A row per place of AbsTopK: place, kept, changed, share."""
        places = list(self.kept)
        frame = pd.DataFrame(
            {
                "place": places,
                "kept": [self.kept[place] for place in places],
                "changed": [self.changed[place] for place in places],
            }
        )
        return frame.assign(share=frame["changed"] / frame["kept"].clip(lower=1))

    def __repr__(self) -> str:
        return (
            f"ChangedSelections({sum(self.changed.values()):,} of {sum(self.kept.values()):,} "
            f"({self.share:.2%}) at {len(self.kept)} places; logits differ by up to "
            f"{self.largest_difference:.3g})"
        )

    def _repr_html_(self) -> str:
        return frame_html("Changed selections", repr(self), self.to_dataframe())


@torch.no_grad()
def changed_selections(
    model: nn.Module,
    other: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    *,
    batch_size: int = 4,
) -> ChangedSelections:
    """Run two models of one shape on the same tokens and compare what AbsTopK keeps.

    ``other`` may be a copy in half precision (``copy.deepcopy(model).half()``). A difference early
    in the model moves what later places see, so all are counted as a user of the model meets them.
    Channels that are exactly zero count as dropped. SparseTransformers only: no other model has
    AbsTopK.

    Raises:
        ValueError: AbsTopK stands at other places in the two models, or nowhere; or no tokens.
    """
    names = list(places(model))
    if not names or names != list(places(other)):
        raise ValueError(
            f"AbsTopK must stand at the same places in both models; the first has {len(names)}"
        )
    if tokens.numel() == 0 or batch_size < 1:
        raise ValueError(f"nothing to run: tokens {tuple(tokens.shape)}, batch_size={batch_size}")
    kept, changed, largest = dict.fromkeys(names, 0), dict.fromkeys(names, 0), 0.0
    with eval_mode(model), eval_mode(other):
        for batch in tokens.split(batch_size):
            (one, logits), (two, others) = selected(model, batch), selected(other, batch)
            largest = max(largest, float((logits - others).abs().max()))
            for name in names:
                kept[name] += int(one[name].sum())
                changed[name] += int((one[name] & ~two[name]).sum())
    return ChangedSelections(kept, changed, largest)


def places(model: nn.Module) -> Iterator[str]:
    """Names of the modules where AbsTopK drops channels."""
    for name, module in model.named_modules():
        if isinstance(module, AbsTopK) and module.active:
            yield name


def selected(
    model: nn.Module, tokens: Int[Tensor, "sequence pos"]
) -> tuple[dict[str, Bool[Tensor, "..."]], Tensor]:
    """The channels kept at every place, on the CPU, and the logits in double precision."""
    found: dict[str, Tensor] = {}
    run: Any = model
    with recorded(model, found):
        logits = run(tokens.to(next(model.parameters()).device))
    return found, logits.double().cpu()


@contextmanager
def recorded(model: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block, what AbsTopK lets pass is written down by its name."""
    handles = [
        model.get_submodule(name).register_forward_hook(partial(write_down, found, name))
        for name in places(model)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def write_down(
    found: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor
) -> None:
    """A forward hook of an AbsTopK: which channels are not zero behind it."""
    found[name] = (output != 0).cpu()
