"""The direct way from a sender to receivers: one run in which everything beside it is at base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from tl_sparse.ablation.frozen_layernorms import NoNormScales, frozen_norm_hooks, norm_hooks
from tl_sparse.ablation.interventions import FwdHook, Intervention
from tl_sparse.model.abstopk import AbsTopK, top_k_mask
from tl_sparse.node import Node
from tl_sparse.nodes.patched_hooks import Layout, Put, Values, keep, taken
from tl_sparse.nodes.patched_runs import columns_of
from tl_sparse.nodes.prompts import Prompts
from tl_sparse.sites import SITE

Held: TypeAlias = str
""""frozen" or "free"."""
Selection: TypeAlias = str
""""frozen" or "rerun"."""
WRITES = ("attn_out", "mlp_out")


@dataclass(frozen=True, eq=False)
class Way:
    """The way from a sender to receivers, everything beside it held at base."""

    model: nn.Module
    prompts: Prompts
    sends: Sequence[Node]
    receives: Sequence[Sequence[Node]]
    attention: Held
    abstopk: Selection
    norms: Held

    def carry(
        self,
        at: Int[Tensor, "prompt chosen"],
        ends: Int[Tensor, "prompt reached"],
        moved: Values,
        strength: float,
        columns: Mapping[str, Int[Tensor, " _"]],
    ) -> Values:
        """The receivers' values with the sender moved, at the positions that it can reach."""
        held, patterns = self._writes(), self._patterns()
        base: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        sent = columns_of(self.sends)
        names = [*held, *patterns, *sent]
        readers: list[Any] = [(name, partial(keep, base, name)) for name in names]
        with recording_selection(self._topks(), masks):
            self._run(readers)
        here = taken(base, at, sent)
        if silent := [name for name in names if name not in base]:
            raise ValueError(f"hooks {', '.join(silent)} never fired on this model")
        layout = Layout(
            1, False, self.prompts.tokens.shape[1], at, at == self.prompts.last[:, None]
        )
        hooks: list[Any] = self._scales()
        for name, channels in sent.items():
            there = torch.lerp(here[name], moved[name].to(here[name]), strength).movedim(-1, 0)
            zeros = torch.zeros(len(channels), dtype=torch.int64, device=at.device)
            hooks.append((name, Put(layout, zeros, channels.to(at.device), there)))
        seen: dict[str, Tensor] = {}
        # a write is read before it is held
        hooks += [(name, partial(keep, seen, name)) for name in columns]
        hooks += [(name, Intervention(source=base[name])) for name in [*held, *patterns]]
        with frozen_selection(self._topks(), masks):
            self._run(hooks)
        return taken(seen, ends, columns)

    def _run(self, hooks: Sequence[FwdHook]) -> None:
        run: Any = self.model
        run.run_with_hooks(self.prompts.tokens, return_type=None, fwd_hooks=list(hooks))

    def _writes(self) -> list[str]:
        """Hooks of what all blocks write but the sender's own."""
        points: Any = self.model.hook_dict
        own = (self.sends[0].layer, SITE[self.sends[0].site].part)
        cfg: Any = self.model.cfg
        found = []
        for layer in range(self.sends[0].layer, cfg.n_layers):
            for name in WRITES:
                hook = SITE[name].hook_in(layer, points)
                if (layer, SITE[name].part) != own and hook in points:
                    found.append(hook)
        return found

    def _patterns(self) -> list[str]:
        """Hooks of the attention patterns to hold: the sender's, and those before a receiver."""
        if self.attention == "free":
            return []
        behind = [n for group in self.receives for n in group if n.site in ("attn_z", "attn_out")]
        through = {node.layer for node in behind}
        through |= {node.layer for node in self.sends if node.site in ("attn_in", "attn_v")}
        return [f"blocks.{layer}.attn.hook_pattern" for layer in sorted(through)]

    def _scales(self) -> list[tuple[str, Intervention]]:
        """Hooks that hold the norms' scales."""
        if self.norms == "free" or not norm_hooks(self.model):
            return []
        try:
            return frozen_norm_hooks(self.model, self.prompts.tokens)
        except NoNormScales as error:
            raise ValueError(f"{error}: choose norms='free'") from error

    def _topks(self) -> dict[str, AbsTopK]:
        """The AbsTopK that keep their choice."""
        if self.abstopk == "rerun":
            return {}
        modules = self.model.named_modules()
        return {name: m for name, m in modules if isinstance(m, AbsTopK) and m.active}


@contextmanager
def recording_selection(
    modules: Mapping[str, AbsTopK], masks: dict[str, Bool[Tensor, "..."]]
) -> Iterator[None]:
    """What each AbsTopK passes, kept by name."""

    def look(module: AbsTopK, inputs: Any, output: Tensor, *, name: str) -> None:
        masks[name] = top_k_mask(inputs[0], module.k)

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(partial(look, name=name)))
        yield


@contextmanager
def frozen_selection(
    modules: Mapping[str, AbsTopK], masks: Mapping[str, Bool[Tensor, "..."]]
) -> Iterator[None]:
    """Each AbsTopK passes what it is told to."""

    def choose(module: AbsTopK, inputs: Any, output: Tensor, *, name: str) -> Tensor:
        return inputs[0] * masks[name]

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_hook(partial(choose, name=name)))
        yield
