"""``BridgesConfig``: what bridges there are between two models, and of which form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from tl_sparse.bridges.places import BridgeSite, LayerMap, bridge_sites, even_layer_map
from tl_sparse.bridges.segments import Segments
from tl_sparse.storage.json_dataclass import check_fields

MAX_LAYERS, MAX_CHANNELS = 10_000, 1 << 20  # more are no model's, but a damaged file's
EncoderKind = Literal["linear", "abstopk", "threshold"]


@dataclass(frozen=True)
class BridgesConfig:
    """What bridges there are between two models, and of which form."""

    d_dense: int
    """Channels of the dense model's residual stream."""
    d_sparse: int
    """Channels of the sparse model's residual stream."""
    n_dense: int
    """Layers of the dense model."""
    n_sparse: int
    """Layers of the sparse model."""
    layer_map: LayerMap = ()
    """(dense layer, sparse layer) of the layers that go together; (): as many as the shallower
    model has, spread evenly."""
    mid: bool = True
    """Whether there are sites between attention and MLP: two for each pair of layers, and one."""
    encoder: EncoderKind = "abstopk"
    """What follows the encoder's linear map: AbsTopK, a learned threshold, or nothing (linear)."""
    density: float = 0.25
    """Share of the channels that AbsTopK keeps."""
    sharpness: float | None = None
    """Slope of the learned thresholds, per unit of activation; None: hard thresholds."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("d_dense", "d_sparse", "n_dense", "n_sparse"):
            most = MAX_LAYERS if name.startswith("n_") else MAX_CHANNELS
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)!r:.40} must be from 1 to {most:,}")
        if not 0 < self.density <= 1 or int(self.density * self.d_sparse) < 1:
            raise ValueError(f"density={self.density} of {self.d_sparse} channels must keep 1 to "
                             "all of them")  # fmt: skip
        if self.sharpness is not None and not self.sharpness > 0:
            raise ValueError(f"sharpness={self.sharpness} must be positive, or None")
        check_fields(self)
        pairs = self.layer_map or even_layer_map(self.n_dense, self.n_sparse)
        object.__setattr__(self, "layer_map", tuple(tuple(pair) for pair in pairs))
        assert self.sites

    @classmethod
    def of(cls, dense: nn.Module, sparse: nn.Module, **changes: Any) -> BridgesConfig:
        """The config for two models; ``changes`` are fields.

        AbsTopK keeps the share of channels that the sparse model's attention reads, if nothing
        else is asked for.

        Raises:
            TypeError: a model is none of TransformerLens'.
            ValueError: a field does not fit.
        """
        ends = [Segments(model) for model in (dense, sparse)]
        widths = [int(end.model.cfg.d_model) for end in ends]  # type: ignore[union-attr, arg-type]
        kept = getattr(getattr(sparse, "config", None), "activation_density", None)
        fields: dict[str, Any] = {
            "d_dense": widths[0], "d_sparse": widths[1],
            "n_dense": ends[0].n_layers, "n_sparse": ends[1].n_layers,
            "mid": all(end.has_mid for end in ends),
            "density": 0.25 if kept is None else kept.attn_in,
        }  # fmt: skip
        return cls(**fields | changes)

    @cached_property
    def sites(self) -> tuple[BridgeSite, ...]:
        """The sites, in the order of computation."""
        return bridge_sites(self.n_dense, self.n_sparse, self.layer_map, self.mid)
