"""``BridgedDense``: the dense model with the sparse model's nodes as hook points of its own.

So everything that takes hooks, node indices or circuits can be asked about the dense model in the
sparse model's terms: means, ablations, pruning, and the faithfulness suite.
"""

from __future__ import annotations

import copy
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.bridges.directions import (
    Pair,
    norm_ratios,
    read_hook,
    site_directions,
    write_hook,
)
from tl_sparse.bridges.reading import BridgedHook
from tl_sparse.compat import HookPoint, has_hooks
from tl_sparse.model.added_points import AddedPoints
from tl_sparse.nodes.prompts import Prompts, PromptsLike
from tl_sparse.sites import NodeIndex


class BridgedPoints(nn.Module):
    """The hook points of one sublayer: what it reads and writes in the sparse model's channels, and
    the rest of the dense activation."""

    def __init__(self) -> None:
        super().__init__()
        self.hook_bridged_in, self.hook_error_in = HookPoint(), HookPoint()
        self.hook_bridged_out, self.hook_error_out = HookPoint(), HookPoint()


class BridgedDense(AddedPoints):
    """The dense model of a bridged pair, hooked in the sparse model's channels as well.

    Beside the dense model's own hooks every sublayer (named by the sparse model's layer) has
    ``blocks.0.attn.hook_bridged_in`` and ``..._out``: channel c there is the sparse model's node c
    of ``attn_in`` and ``attn_out``, as the dense model is read through the encoder; and
    ``hook_error_in`` and ``..._out``: the rest of the dense activation. What a hook changes moves
    the dense activation along the channel's direction. Without hooks there, and wherever nothing is
    changed, it is the dense model to the bit.

    It is run on tokens, without a cache of keys and values.
    """

    def __init__(self, pair: Pair, reference: PromptsLike | Prompts) -> None:
        """Hook points for a pair.

        Args:
            pair: The models and their bridges; none of them is changed.
            reference: Text over which the ratio of the two streams' sizes is averaged.
        """
        super().__init__()
        self.dense, self.sparse, self.bridges = pair.dense, pair.sparse, pair.bridges
        ratios = norm_ratios(pair, reference)
        cfg: Any = pair.dense.cfg
        n_layers = int(pair.sparse.cfg.n_layers)  # type: ignore[union-attr, arg-type]
        if cfg.n_layers < n_layers:
            cfg = copy.copy(cfg)
            cfg.n_layers = n_layers  # nodes are numbered by the sparse model's layers
        self.cfg = cfg
        points: dict[str, nn.Module] = {}
        where: dict[str, tuple[int, bool]] = {}
        places: dict[tuple[int, bool], tuple[HookPoint, HookPoint]] = {}
        blocks = [nn.ModuleDict({"attn": BridgedPoints(), "mlp": BridgedPoints()})
                  for _ in range(n_layers)]  # fmt: skip
        sparse_places = {site.sparse: number for number, site in enumerate(pair.bridges.sites)}
        for place, number in sparse_places.items():
            for reads, half in ((True, place), (False, place - 1)):
                if not 0 <= half < 2 * n_layers:
                    continue
                part = "mlp" if half % 2 else "attn"
                side = "in" if reads else "out"
                both = []
                for kind in ("bridged", "error"):
                    point = getattr(blocks[half // 2][part], f"hook_{kind}_{side}")
                    point.name = f"blocks.{half // 2}.{part}.hook_{kind}_{side}"
                    points[point.name] = point
                    where[point.name] = (number, reads)
                    both.append(point)
                places[number, reads] = (both[0], both[1])
                self.register_buffer(
                    f"directions_{number}_{side}", site_directions(pair, number, reads, ratios)
                )
        self.blocks = nn.ModuleList(blocks)
        self._places, self._where = places, where
        self.add_points(points)

    @property
    def inner(self) -> nn.Module:  # type: ignore[override]
        """The dense model."""
        return self.dense

    def directions(self, name: str) -> Float[Tensor, "d_sparse d_dense"]:
        """The directions of the channels at one of the bridges' points, by its name."""
        site, reads = self._where[name]
        found: Tensor = getattr(self, f"directions_{site}_{'in' if reads else 'out'}")
        return found

    def dense_hook(self, name: str) -> str:
        """The hook of the dense model at which one of the bridges' points changes it."""
        site, reads = self._where[name]
        place = self.bridges.sites[site].dense
        return read_hook(self.dense, place) if reads else write_hook(self.dense, place)

    def index(self, errors: bool = True, writes: bool = True) -> NodeIndex:
        """The sparse model's nodes in the dense model, layer by layer: reads, and ``writes`` too.

        With ``errors`` the channels of what bridges miss come behind those of each site.
        """
        d_sparse, d_dense = (int(m.cfg.d_model) for m in (self.sparse, self.dense))  # type: ignore[union-attr, arg-type]
        widths = {}
        for name in self._points:
            error, side = "hook_error" in name, name.rpartition("_")[2]
            if (errors or not error) and (writes or side == "in"):
                widths[name] = d_dense if error else d_sparse
        order = sorted(widths, key=_when)
        return NodeIndex.over(self, {name: widths[name] for name in order})

    def forward(
        self, tokens: Int[Tensor, "batch pos"], return_type: str | None = "logits", **options: Any
    ) -> Any:
        """The dense model, changed as the hooks on the bridges' points say."""
        dense: Any = self.dense
        with dense.hooks(fwd_hooks=self._bridged()):
            return dense(tokens, return_type=return_type, **options)

    def _bridged(self) -> list[FwdHook]:
        """Hooks on the dense model at those sites alone where somebody looks."""
        hooks: list[FwdHook] = []
        for (site, reads), (point, error) in self._places.items():
            if not (has_hooks(point) or has_hooks(error)):
                continue
            hooks += BridgedHook(
                self, site, reads, self.directions(str(point.name)), point,
                error if has_hooks(error) else None,
            ).hooks()  # fmt: skip
        return hooks


def _when(name: str) -> tuple[int, int, str, int]:
    """Layer, part, side, and errors last."""
    _, layer, part, point = name.split(".")
    side = point.rpartition("_")[2]
    return int(layer), int(part == "mlp"), side, int("error" in point)
