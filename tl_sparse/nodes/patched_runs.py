"""Many patched runs in shared forward passes, each from where its first change begins.

One run of the base prompts is recorded. A patched run differs from it in nothing before its first
node, nor at any position before the first one that is patched. So in a SparseTransformer it starts
at that node's block; where only the ends of prompts are patched, it runs these alone, on recorded
keys and values of what stands before; and what follows the last attention is of the last tokens.
Other models run in full, many patches side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.interventions import FwdHook
from tl_sparse.ablation.logit_diff import logits_at
from tl_sparse.ablation.partial_forward import PLACE, PartialForward, Prefix
from tl_sparse.ablation.prompt_packing import PackedPairs
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.node import Node
from tl_sparse.nodes.patched_hooks import Layout, Put, Read, Values, keep, taken
from tl_sparse.nodes.prompts import Prompts
from tl_sparse.sites import SITES, layer_of, site_at

SLOTS = 2048  # tokens of one forward pass: more save no time on a CPU, and cost memory
FLOATS = 2**27  # recorded at once
MOST_BESIDE = 128  # patches beside each other in one row, whose mask is their number squared

Change = tuple[Node, int, float]
"""A node, the source that it is moved to (by number), and how far."""


@dataclass(frozen=True, eq=False)
class Entries:
    """What is set at one hook: an entry for every node of every patch."""

    patch: Int[Tensor, " entry"]
    """Which patch it belongs to."""
    channel: Int[Tensor, " entry"]
    """The node's channel."""
    source: Int[Tensor, " entry"]
    """Which source it is moved to."""
    strength: Float[Tensor, " entry"]
    """How far: 0 is base, 1 the source."""


def entries_of(patches: Sequence[Sequence[Change]]) -> dict[str, Entries]:
    """The patches' nodes by hook; the hooks in the order in which they run."""
    found: dict[str, list[tuple[int, int, int, float]]] = {}
    for number, changes in enumerate(patches):
        for node, source, strength in changes:
            row = (number, int(node.channel or 0), source, strength)
            found.setdefault(node.hook, []).append(row)
    hooks = {}
    for name in sorted(found, key=when):
        numbers, channels, sources, strengths = zip(*found[name], strict=True)
        hooks[name] = Entries(
            torch.tensor(numbers), torch.tensor(channels), torch.tensor(sources),
            torch.tensor(strengths, dtype=torch.float64),
        )  # fmt: skip
    return hooks


def when(hook: str) -> tuple[int, int]:
    """Layer and place within it: hooks at sites in the order in which they run."""
    row = site_at(hook)
    return layer_of(hook, 1 << 30), -1 if row is None else SITES.index(row)


def columns_of(nodes: Sequence[Node]) -> dict[str, Int[Tensor, " _"]]:
    """The channels of nodes by hook, each once and in order."""
    found: dict[str, set[int]] = {}
    for node in nodes:
        found.setdefault(node.hook, set()).add(int(node.channel or 0))
    return {name: torch.tensor(sorted(channels)) for name, channels in found.items()}


def run_once(
    model: nn.Module,
    prompts: Prompts,
    at: Int[Tensor, "prompt chosen"],
    columns: Mapping[str, Int[Tensor, " _"]],
    hooks: Sequence[FwdHook] = (),
) -> tuple[Values, Float[Tensor, "prompt d_vocab"]]:
    """A run of prompts: channels at positions, and the logits at the last tokens."""
    seen: dict[str, Tensor] = {}
    readers: list[FwdHook] = [(name, partial(keep, seen, name)) for name in columns]  # type: ignore[misc]
    logits = logits_at(model, prompts.tokens, prompts.last, [*hooks, *readers])
    return taken(seen, at, columns), logits.float()


@dataclass(frozen=True, eq=False)
class BaseRun:
    """One recorded run of the base prompts, from which patched ones start."""

    model: nn.Module
    """The model."""
    prompts: Prompts
    """The base prompts."""
    at: Int[Tensor, "prompt chosen"]
    """The positions that are patched (and read)."""
    values: Values
    """What is patched or read there."""
    logits: Float[Tensor, "prompt d_vocab"]
    """At the last tokens."""
    run: PartialForward | None = None
    """The recorded streams; None of models other than a SparseTransformer."""
    columns: Mapping[str, Int[Tensor, " _"]] = field(default_factory=dict)
    """The channels of ``values``."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        prompts: Prompts,
        at: Int[Tensor, "prompt chosen"],
        columns: Mapping[str, Int[Tensor, " _"]],
    ) -> BaseRun:
        """Run and record.

        Raises:
            ValueError: a hook never fired.
        """
        columns = {name: channels.to(at.device) for name, channels in columns.items()}
        if not isinstance(model, SparseTransformer):
            values, logits = run_once(model, prompts, at, columns)
            return cls(model, prompts, at, values, logits, None, columns)
        rows = torch.arange(len(prompts), device=at.device)
        slots = torch.arange(prompts.tokens.shape[1], device=at.device)
        packed = PackedPairs(
            pairs=rows, tokens=prompts.tokens, positions=slots.repeat(len(rows), 1), mask=None,
            last=prompts.last[:, None], real=slots <= prompts.last[:, None],
        )  # fmt: skip
        layers = range(model.config.n_layers)
        cached = [f"blocks.{i}.attn.hook_{x}" for i in layers for x in "kv"]
        run, final = PartialForward(model, packed).recording([], [*columns, *cached])
        logits = run.last_logits(final)[:, 0]
        return cls(model, prompts, at, taken(run.seen, at, columns), logits, run, columns)

    @property
    def tail(self) -> int:
        """How many positions at the end of each prompt can differ from base."""
        return int((self.prompts.last[:, None] - self.at).max()) + 1

    @property
    def only_ends(self) -> bool:
        """Whether runs of the prompts' ends, on recorded keys and values, are worth while."""
        return self.run is not None and 2 * self.tail <= int(self.prompts.last.min()) + 1

    def passes(
        self, entries: Mapping[str, Entries], n_patches: int, batch: int | None
    ) -> Iterator[Int[Tensor, " patch"]]:
        """The patches that go together in one forward pass, those that begin late together."""
        starts = torch.full((n_patches,), len(entries))
        for place, each in reversed(list(enumerate(entries.values()))):
            starts[each.patch] = place
        slots = self.tail if self.only_ends else self.prompts.tokens.shape[1]
        rows = max(1, SLOTS // slots) if batch is None else batch
        at_once = max(1, rows // len(self.prompts))
        yield from starts.argsort(stable=True).split(
            min(at_once, MOST_BESIDE) if self.only_ends else at_once
        )

    def patched(
        self,
        entries: Mapping[str, Entries],
        chosen: Int[Tensor, " patch"],
        sources: Sequence[Values],
        read: Sequence[Node] = (),
    ) -> tuple[Float[Tensor, "patch prompt d_vocab"], Float[Tensor, "patch prompt chosen node"]]:
        """The last logits under some of the patches, and what nodes are there."""
        copies, device = len(chosen), self.at.device
        ends, every = self.only_ends, self.prompts.tokens.shape[1]
        first = self.prompts.last + 1 - self.tail
        layout = Layout(
            copies, ends, self.tail if ends else every,
            self.at - first[:, None] if ends else self.at, self.at == self.prompts.last[:, None],
        )  # fmt: skip
        place = torch.full((int(chosen.max()) + 1,), -1)
        place[chosen] = torch.arange(copies)
        hooks: list[FwdHook] = []
        for name, each in entries.items():
            mine = torch.nonzero(each.patch < len(place)).flatten()
            mine = mine[place[each.patch[mine]] >= 0]
            if len(mine):
                copy = place[each.patch[mine]].to(device)
                hooks.append((name, self._put(name, each, mine, copy, layout, sources)))
        begin = when(hooks[0][0]) if hooks else (1 << 30, 0)
        kept: dict[str, Tensor] = {}
        wanted = columns_of(read)
        for name, channels in wanted.items():
            column = torch.searchsorted(self.columns[name], channels.to(device))
            kept[name] = self.values[name][..., column].expand(copies, -1, -1, -1).clone()
            if when(name) >= begin:
                hooks.append((name, Read(layout, channels.to(device), kept[name])))  # type: ignore[arg-type]
        hooks.sort(key=lambda pair: when(pair[0]))  # stable: what is set is set before it is read
        cut = not read or bool(layout.last.all())
        logits = self._logits(layout, first, hooks, cut)
        none = logits.new_zeros(copies, *self.at.shape, 0)
        return logits, gathered(kept, wanted, read) if read else none

    def _put(
        self, name: str, each: Entries, mine: Tensor, copy: Tensor, layout: Layout,
        sources: Sequence[Values],
    ) -> Put:  # fmt: skip
        device = self.at.device
        channel = each.channel[mine].to(device)
        column = torch.searchsorted(self.columns[name], channel)
        base = self.values[name][..., column].movedim(-1, 0)
        there = torch.stack([values[name] for values in sources])
        source = there.movedim(-1, 1)[each.source[mine].to(device), column]
        strength = each.strength[mine].to(base)[:, None, None]
        # lerp is exact at 0 and 1
        return Put(layout, copy, channel, torch.lerp(base, source, strength))

    def _logits(
        self, layout: Layout, first: Tensor, hooks: Sequence[FwdHook], cut: bool
    ) -> Float[Tensor, "copy prompt d_vocab"]:
        if not hooks:
            return self.logits.expand(layout.copies, -1, -1)
        if self.run is None:
            tokens = self.prompts.tokens.repeat(layout.copies, 1)
            last = self.prompts.last.repeat(layout.copies)
            logits = logits_at(self.model, tokens, last, hooks).float()
            return logits.unflatten(0, (layout.copies, -1))
        if layout.beside:
            layer = layer_of(hooks[0][0], len(self.run.model.blocks))
            run = beside(self.run, first, layout.slots, layout.copies, layer)
            return run.last_logits(run.changed_stream(hooks, 1, cut)).transpose(0, 1)
        resid = self.run.changed_stream(hooks, layout.copies, cut)
        return self.run.last_logits(resid)[:, 0].unflatten(0, (layout.copies, -1))


def beside(
    run: PartialForward, first: Int[Tensor, " prompt"], slots: int, copies: int, layer: int
) -> PartialForward:
    """Runs of the prompts' ends from a layer on: copies of these beside each other in every row,
    each of which sees what stands before it in its prompt, and itself."""
    packed, device = run.packed, first.device
    at = (first[:, None] + torch.arange(slots, device=device)).repeat(1, copies)
    rows, before = torch.arange(len(first), device=device)[:, None], int(first.max())
    one = torch.ones(slots, slots, dtype=torch.bool, device=device).tril()
    own = torch.block_diag(*[one] * copies).expand(len(first), -1, -1)
    past = (torch.arange(before, device=device) < first[:, None])[:, None]
    mask = torch.cat([past.expand(-1, copies * slots, -1), own.bool()], 2)
    last = (torch.arange(copies, device=device) + 1) * slots - 1
    ends = PackedPairs(
        packed.pairs, packed.tokens[rows, at], packed.positions[rows, at], mask,
        last.repeat(len(first), 1), packed.real[rows, at],
    )  # fmt: skip
    name = f"blocks.{layer}."
    streams = [f"{name}hook_resid_{x}" for x in ("pre", "mid", "post")] + [name + PLACE]
    seen = {name: run.seen[name][rows, at] for name in streams if name in run.seen}
    prefix = tuple(
        Prefix(*(run.seen[f"blocks.{i}.attn.hook_{x}"][:, :before] for x in "kv"))
        for i in range(len(run.model.blocks))
    )
    return PartialForward(run.model, ends, seen=seen, prefix=prefix)


def gathered(
    values: Mapping[str, Float[Tensor, "..."]],
    columns: Mapping[str, Int[Tensor, " _"]],
    nodes: Sequence[Node],
) -> Float[Tensor, "... node"]:
    """Values of nodes, in their order, out of those by hook; there is at least one."""
    names = list(dict.fromkeys(node.hook for node in nodes))
    places: dict[tuple[str, int], int] = {}
    start = 0
    for name in names:
        channels = columns[name].tolist()
        places |= {(name, channel): start + i for i, channel in enumerate(channels)}
        start += len(channels)
    order = [places[node.hook, int(node.channel or 0)] for node in nodes]
    return torch.cat([values[name] for name in names], -1)[..., order]


def chunks(model: nn.Module, prompts: Prompts, n_hooks: int) -> Iterator[Tensor]:
    """Numbers of the prompts that are recorded at once, at so many hooks besides the streams."""
    cfg: Any = model.cfg
    per_layer = 3 * cfg.d_model + 2 * cfg.n_heads * cfg.d_head
    wide = max(cfg.d_model, cfg.d_mlp or 0, cfg.n_heads * cfg.d_head)
    each = prompts.tokens.shape[1] * (cfg.n_layers * per_layer + n_hooks * wide)
    rows = torch.arange(len(prompts), device=prompts.last.device)
    yield from rows.split(max(1, FLOATS // each))
