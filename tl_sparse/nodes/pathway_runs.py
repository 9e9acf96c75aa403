"""The patched runs of a pathway: which there are, on which prompts, and how far they move it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.node import Node
from tl_sparse.nodes.measure import Measure
from tl_sparse.nodes.patched_runs import (
    BaseRun,
    Change,
    chunks,
    columns_of,
    entries_of,
    gathered,
    run_once,
)
from tl_sparse.nodes.patching import SOURCE
from tl_sparse.nodes.prompts import Positions, Prompts, at_some, places
from tl_sparse.tasks.padding import real_positions

NEAREST = 16  # channels of like activity that a null's node is drawn from
Table: TypeAlias = Float[np.ndarray, "run prompt stage"]


@dataclass(frozen=True, eq=False)
class Runs:
    """The patched runs, and which of them is which."""

    patches: list[list[Change]]
    """What each sets: source 0 is the source, 1 the control."""
    alone: list[int]
    """Each stage alone at source; the first is the run that the others are compared with."""
    restored: list[int]
    """The first at source, one middle stage at base."""
    held: int
    """The first at source, all middle stages at base."""
    control: int | None
    """The first as it is in control prompts."""
    null_first: list[int]
    """Random nodes at source in place of the first stage."""
    null_middle: list[int]
    """The first at source, random nodes at base in place of the middle stages."""

    @classmethod
    def of(
        cls,
        stages: Sequence[Sequence[Node]],
        nulls: Sequence[Sequence[Sequence[Node]]],
        with_control: bool,
        to_answer: bool,
    ) -> Runs:
        """The runs for a pathway and random stages in place of its own; ``to_answer``: its end is
        the answer, so that the last stage is in the middle, too."""
        patches: list[list[Change]] = []

        def run(moved: Sequence[Node], held: Sequence[Sequence[Node]] = (), source: int = 0) -> int:
            held_nodes = [node for stage in held for node in stage]
            patches.append(
                [(node, source, 1.0) for node in moved] + [(n, source, 0.0) for n in held_nodes]
            )
            return len(patches) - 1

        end = len(stages) if to_answer else -1
        first, middle = stages[0], stages[1:end]
        alone = [run(stage) for stage in stages]
        return cls(
            patches,
            alone,
            [run(first, [stage]) for stage in middle],
            run(first, middle),
            run(first, source=1) if with_control else None,
            [run(null[0]) for null in nulls],
            [run(first, null[1:end]) for null in nulls] if middle else [],
        )


@dataclass(frozen=True, eq=False)
class Bank:
    """The prompts, and how runs of them are made."""

    model: nn.Module
    rows: Prompts
    sources: Mapping[str, Prompts]
    positions: Positions
    look: Measure | None
    batch: int | None

    @torch.no_grad()
    def random_sets(
        self, stages: Sequence[Sequence[Node]], draws: int, seed: int
    ) -> list[list[list[Node]]]:
        """Stages of random nodes of the same hooks and about the same activity; none where some
        hook has too few others."""
        index: dict[str, list[int]] = {}
        for node in (node for stage in stages for node in stage):
            index.setdefault(node.hook, []).append(int(node.channel or 0))
        activity = self.activity(list(index))
        generator = torch.Generator().manual_seed(seed)
        if any(len(activity[hook]) - len(mine) < len(mine) for hook, mine in index.items()):
            return []
        found = []
        for _ in range(draws):
            taken = {hook: set(mine) for hook, mine in index.items()}
            found.append(
                [
                    [draw(node, activity, taken, generator).on(self.model) for node in stage]
                    for stage in stages
                ]
            )
        return found

    def activity(self, hooks: Sequence[str]) -> dict[str, Float[Tensor, " _"]]:
        """Mean size of every channel at hooks, over base and source."""
        total: dict[str, Any] = {}

        def add(x: Tensor, hook: Any = None, *, name: str, real: Tensor) -> None:
            size = (x.detach().flatten(2).abs() * real[..., None]).double().sum((0, 1)).cpu()
            total[name] = total.get(name, 0) + size

        with eval_mode(self.model), torch.no_grad():
            for prompts in (self.rows, self.sources[SOURCE]):
                for chosen in chunks(self.model, prompts, 0):
                    some = prompts.rows(chosen)
                    real = real_positions(some.tokens.shape[1], some.last)
                    readers = [(n, partial(add, name=n, real=real)) for n in hooks]
                    run: Any = self.model
                    run.run_with_hooks(some.tokens, return_type=None, fwd_hooks=readers)
        if silent := [name for name in hooks if name not in total]:
            raise ValueError(f"hooks {', '.join(silent)} never fired on this model")
        return total

    @torch.no_grad()
    def moved(
        self, patches: Sequence[Sequence[Change]], stages: Sequence[Sequence[Node]], bar: Any
    ) -> tuple[Table, Float[np.ndarray, "prompt stage"]]:
        """How far every stage moves towards source in every run, and how far that would be: sums of
        products over nodes and positions. The last column is the answer's, where it is asked for.
        """
        read = [node for stage in stages for node in stage]
        columns = columns_of([*read, *(node for patch in patches for node, _, _ in patch)])
        entries, n_stages = entries_of(patches), len(stages) + (self.look is not None)
        of_stage = torch.repeat_interleave(
            torch.arange(len(stages)), torch.tensor([len(stage) for stage in stages])
        ).to(self.rows.last.device)
        moved = np.zeros((len(patches), len(self.rows), n_stages))
        whole = np.zeros((len(self.rows), n_stages))
        at = {n: places(self.positions, self.rows, p, n) for n, p in self.sources.items()}
        with eval_mode(self.model), torch.no_grad():
            for chosen in chunks(self.model, self.rows, len(columns)):
                some, number = self.rows.rows(chosen), chosen.cpu().numpy()
                here = at_some(at[SOURCE][0], chosen, some)
                run = BaseRun.of(self.model, some, here, columns)
                there = {}
                for name, prompts in self.sources.items():
                    rows = prompts.rows(chosen)
                    there[name] = run_once(
                        self.model, rows, at_some(at[name][1], chosen, rows), columns
                    )
                values, logits = there[SOURCE]
                base = gathered(run.values, run.columns, read)
                way = gathered(values, run.columns, read) - base
                way = way * (here <= some.last[:, None])[..., None]  # nothing of padding
                whole[number] = self.summed(way * way, of_stage, logits, run.logits, chosen)
                for group in run.passes(entries, len(patches), self.batch):
                    sources = [values for values, _ in there.values()]
                    ends, x = run.patched(entries, group, sources, read)
                    product = (x - base) * way
                    for i, one in enumerate(group.tolist()):
                        moved[one, number] = self.summed(
                            product[i], of_stage, ends[i], run.logits, chosen
                        )
                bar.update(len(chosen))
        return moved, whole

    def summed(
        self,
        products: Float[Tensor, "prompt chosen node"],
        of_stage: Int[Tensor, " node"],
        logits: Float[Tensor, "prompt d_vocab"],
        base: Float[Tensor, "prompt d_vocab"],
        chosen: Int[Tensor, " prompt"],
    ) -> Float[np.ndarray, "prompt stage"]:
        """Products summed by stage, and how much the answer differs from base."""
        total = products.new_zeros(len(products), int(of_stage.max()) + 1)
        total.index_add_(1, of_stage, products.sum(1))
        if self.look is not None:
            change = self.look(logits, chosen) - self.look(base, chosen)
            total = torch.cat([total, change[:, None].to(total)], 1)
        return total.double().cpu().numpy()


def draw(
    node: Node,
    activity: Mapping[str, Float[Tensor, " _"]],
    taken: Mapping[str, set[int]],
    generator: torch.Generator,
) -> Node:
    """A node of the same hook, among the nearest in activity that are not taken; it then is."""
    size = activity[node.hook]
    distance = size.clamp(min=1e-12).log() - size[int(node.channel or 0)].clamp(min=1e-12).log()
    distance = distance.abs()
    distance[list(taken[node.hook])] = torch.inf
    nearest = distance.argsort(stable=True)[: min(NEAREST, int(distance.isfinite().sum()))]
    channel = int(nearest[torch.randint(len(nearest), (), generator=generator)])
    taken[node.hook].add(channel)
    return Node(node.layer, node.site, channel)
