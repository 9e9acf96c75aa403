"""``patch_nodes``: nodes of one run put into another, many of them in shared forward passes.

Source: activation patching (Vig et al. 2020; Meng et al. 2022), node by node as in Gao et al. 2025,
§4; on the released models it is how their users check what single nodes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.node import Node, NodeName, Nodes, resolve
from tl_sparse.node.names import is_parts
from tl_sparse.nodes.measure import Answers, Measure, measure_of
from tl_sparse.nodes.patched_runs import (
    BaseRun,
    Change,
    Values,
    chunks,
    columns_of,
    entries_of,
    run_once,
)
from tl_sparse.nodes.prompts import (
    Positions,
    Prompts,
    PromptsLike,
    at_some,
    partners,
    places,
    prompts_of,
)
from tl_sparse.progress import progress_bar
from tl_sparse.storage.finite import check_weights
from tl_sparse.views.display import frame_html
from tl_sparse.views.text import number

SOURCE = "source"


@dataclass(frozen=True)
class Patch:
    """One patched run: nodes moved from base to source, and nodes held at base."""

    nodes: Nodes
    """What is patched, under any names; groups too."""
    strength: float = 1.0
    """How far: base + strength x (source - base)."""
    source: str = SOURCE
    """Which source, where there are several."""
    restore: Nodes = ()
    """What is put back to what it is in base, in the same run: what the patch does by way of these
    nodes is undone."""

    def __str__(self) -> str:
        text = named(self.nodes)
        text += "" if self.strength == 1 else f" x {self.strength:g}"
        text += "" if self.source == SOURCE else f" from {self.source}"
        return text if not restored(self) else f"{text}, {named(self.restore)} at base"


PatchLike: TypeAlias = (
    Patch | NodeName | list[NodeName] | tuple[Nodes, float] | tuple[Nodes, float, str]
)
"""A patch; a node or a list of nodes (strength 1); (nodes, strength); (nodes, strength, source)."""


def named(nodes: Nodes) -> str:
    """Nodes in words, few of many."""
    names = [nodes] if isinstance(nodes, str | Node) or is_parts(nodes) else list(nodes)
    texts = [str(name) if isinstance(name, str) else str(Node(name)) for name in names]  # type: ignore[arg-type]
    return " + ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def restored(patch: Patch) -> bool:
    """Whether a patch holds anything at base."""
    return not (isinstance(patch.restore, tuple | list) and not patch.restore)


def patch_of(given: PatchLike) -> Patch:
    """A patch, however it is given.

    Raises:
        ValueError: it is nothing that a patch can be given as.
    """
    if isinstance(given, Patch):
        return given
    if isinstance(given, str | Node | list) or is_parts(given):
        return Patch(given)  # type: ignore[arg-type]
    if not isinstance(given, tuple) or not 2 <= len(given) <= 3:
        raise ValueError(
            f"{given!r:.80} is no patch: give nodes, (nodes, strength), (nodes, strength, source) "
            "or a Patch"
        )
    nodes, strength, *source = given
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise ValueError(f"{given!r:.80}: the strength must be a number; lists are groups of nodes")
    return Patch(nodes, float(strength), *source)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """What every patch does to every prompt."""

    patches: tuple[Patch, ...]
    """The patches, in the order in which they were given."""
    values: Float[Tensor, "patch prompt"]
    """The measure under each: logit(correct) - logit(incorrect) by default."""
    base: Float[Tensor, " prompt"]
    """The measure of the base prompts."""
    source: Mapping[str, Float[Tensor, " prompt"]]
    """The measure of the sources, by name."""
    prompts: tuple[str, ...]
    """The base prompts."""
    positions: str
    """Where they were patched, in words."""
    measure: str = "logit_diff"
    """What was measured."""
    notes: tuple[str, ...] = field(default=())
    """What one should know of it."""

    @property
    def effects(self) -> Float[Tensor, "patch prompt"]:
        """How much each patch moves the measure from base."""
        return self.values - self.base

    @property
    def shares(self) -> Float[Tensor, "patch prompt"]:
        """The same as a share of the way from base to source; not finite where these agree."""
        whole = torch.stack([self.source[patch.source] - self.base for patch in self.patches])
        return self.effects / whole

    def to_dataframe(self) -> pd.DataFrame:
        """A row per patch: means over prompts; ``share`` is that of the mean effects."""
        base = self.base.double().mean()
        rows = []
        for patch, values in zip(self.patches, self.values.double(), strict=True):
            whole = self.source[patch.source].double().mean() - base
            rows.append(
                [named(patch.nodes), patch.strength, patch.source,
                 named(patch.restore) if restored(patch) else "", float(values.mean()),
                 float(values.mean() - base), float((values.mean() - base) / whole)]
            )  # fmt: skip
        columns = ["nodes", "strength", "source", "restored", self.measure, "effect", "share"]
        return pd.DataFrame(rows, columns=columns)

    def examples(self) -> pd.DataFrame:
        """A row per patch and prompt."""
        n = len(self.prompts)
        return pd.DataFrame(
            {
                "patch": [str(patch) for patch in self.patches for _ in range(n)],
                "prompt": list(self.prompts) * len(self.patches),
                "base": self.base.repeat(len(self.patches)).tolist(),
                self.measure: self.values.flatten().tolist(),
                "effect": self.effects.flatten().tolist(),
            }
        )

    @property
    def line(self) -> str:
        """The facts in one line."""
        base, sources = float(self.base.mean()), []
        for name, values in self.source.items():
            sources.append(f"{name} {number(float(values.mean()))}")
        return (
            f"{len(self.patches)} patches of {len(self.prompts)} prompts at {self.positions}; mean "
            f"{self.measure}: base {number(base)}, {', '.join(sources)}"
        )

    def __repr__(self) -> str:
        return f"PatchingResult({self.line})"

    def _repr_html_(self) -> str:
        line = " · ".join([self.line, *self.notes])
        return frame_html("Patched nodes", line, self.to_dataframe())


@torch.no_grad()
def patch_nodes(
    model: nn.Module,
    base: PromptsLike | Prompts,
    source: PromptsLike | Prompts | Mapping[str, PromptsLike] | None,
    patches: Sequence[PatchLike],
    *,
    positions: Positions = "last",
    answers: Answers | None = None,
    measure: Measure | None = None,
    batch: int | None = None,
    progress: bool = False,
) -> PatchingResult:
    """Run the base prompts with nodes moved to what they are in the source prompts.

    Each patch is one run: at the chosen positions its nodes are base + strength x (source - base),
    both as they are in the unpatched runs; everything else follows. To restore nodes of a corrupted
    prompt (denoising), give the corrupted prompts as ``base`` and the clean ones as ``source``. A
    node is what its hook sees: behind AbsTopK where its site has one. The bigram table, where there
    is one, goes by the base prompt's own token.

    Patches share forward passes. In a ``SparseTransformer`` a run begins at its first patched node,
    and where only the ends of prompts are patched, these alone are run, on the recorded keys and
    values of the rest; results agree with single runs to rounding, by which AbsTopK may choose
    another of two nearly equal channels. Every other model of TransformerLens runs in full.

    Args:
        model: A ``SparseTransformer``, ``HookedTransformer`` or ``TransformerBridge``.
        base: A task's batch, tokens [prompt, pos], texts or lists of token ids.
        source: The same; prompt i is patched from row i of it. By name where there are several.
            None: of a task's batch each prompt's partner.
        patches: What is patched; see :class:`Patch`.
        positions: ``"last"``, some positions (negative ones from the last token of each prompt
            back), or None for all of them. Base and source may differ in length, but for None:
            positions from the end are aligned from the right.
        answers: Correct and incorrect next tokens; those of a task's batch.
        measure: What is measured instead of the logit difference.
        batch: Patched prompts in one forward pass; by default so many that memory stays small.
        progress: Whether a bar is shown.

    Raises:
        ValueError: a node, position or token that there is not; prompts that do not fit each other;
            no answers and no measure; NaN or infinite weights.
    """
    rows, sources = base_and_sources(model, base, source)
    asked = [patch_of(patch) for patch in patches]
    changes = changes_of(model, asked, list(sources))
    at = {name: places(positions, rows, there, name) for name, there in sources.items()}
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    check_weights(model)
    look, what = measure_of(measure, answers, rows, model)
    columns = columns_of([node for patch in changes for node, _, _ in patch])
    entries, device = entries_of(changes), rows.last.device
    values = torch.empty(len(asked), len(rows), device=device)
    ends = {name: torch.empty(len(rows), device=device) for name in ("", *sources)}
    with eval_mode(model), progress_bar(
        total=len(asked) * len(rows), desc="patched runs", disable=not progress
    ) as bar, torch.no_grad():  # fmt: skip
        for chosen in chunks(model, rows, len(columns)):
            some = rows.rows(chosen)
            here = next(iter(at.values()))[0]  # of base, with every source
            run = BaseRun.of(model, some, at_some(here, chosen, some), columns)
            ends[""][chosen] = look(run.logits, chosen).to(device)
            found: list[Values] = []
            for name, prompts in sources.items():
                there = prompts.rows(chosen)
                where = at_some(at[name][1], chosen, there)
                seen, logits = run_once(model, there, where, columns)
                found.append(seen)
                ends[name][chosen] = look(logits, chosen).to(device)
            for some_patches in run.passes(entries, len(asked), batch):
                logits, _ = run.patched(entries, some_patches, found)
                numbers = chosen.repeat(len(some_patches))
                outcome = look(logits.flatten(0, 1), numbers).view(len(some_patches), -1)
                values[some_patches.to(device)[:, None], chosen] = outcome.to(values)
                bar.update(outcome.numel())
    return PatchingResult(
        tuple(asked), values.cpu(), ends.pop("").cpu(), {k: x.cpu() for k, x in ends.items()},
        rows.texts, in_words(positions), what, notes_of(rows, sources, positions),
    )  # fmt: skip


def base_and_sources(
    model: nn.Module,
    base: PromptsLike | Prompts,
    source: PromptsLike | Prompts | Mapping[str, PromptsLike] | None,
) -> tuple[Prompts, dict[str, Prompts]]:
    """The prompts, and their sources by name.

    Raises:
        ValueError: see :func:`prompts_of` and :func:`partners`.
    """
    rows = prompts_of(model, base)
    if source is None:
        return rows, {SOURCE: partners(rows)}
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("no sources")
        return rows, {name: prompts_of(model, each, name) for name, each in source.items()}
    return rows, {SOURCE: prompts_of(model, source, SOURCE)}


def changes_of(
    model: nn.Module, patches: Sequence[Patch], sources: Sequence[str]
) -> list[list[Change]]:
    """What every patch sets: nodes in the model, moved to a source, or held at base.

    Raises:
        ValueError: no patches, one without nodes, a node that there is not or that is named twice,
            a source that there is not, or a strength that is not finite.
    """
    if not patches:
        raise ValueError("no patches: give at least one node")
    found = []
    for patch in patches:
        if patch.source not in sources:
            raise ValueError(
                f"{patch}: there is no source {patch.source!r}, only {', '.join(sources)}"
            )
        if not abs(patch.strength) < float("inf"):
            raise ValueError(f"{patch}: the strength must be finite")
        nodes = resolve(model, patch.nodes)
        held = resolve(model, patch.restore) if restored(patch) else []
        if not nodes:
            raise ValueError("a patch without nodes")
        if len({*nodes, *held}) < len(nodes) + len(held):
            raise ValueError(f"{patch}: a node is named twice, or both patched and restored")
        number = list(sources).index(patch.source)
        found.append(
            [(node, number, patch.strength) for node in nodes]
            + [(node, number, 0.0) for node in held]
        )
    return found


def in_words(positions: Positions) -> str:
    """The positions in words."""
    if positions is None:
        return "every position"
    return "the last token" if positions == "last" else f"positions {[*positions]}"


def notes_of(
    base: Prompts, sources: Mapping[str, Prompts], positions: Positions
) -> tuple[str, ...]:
    """What one should know of the alignment."""
    differ = sum(bool((base.last != there.last).any()) for there in sources.values())
    if not differ:
        return ()
    from_first = not isinstance(positions, str) and any(p >= 0 for p in positions or ())
    how = "from the first token" if from_first else "from the right"
    return (f"some prompts of base and source differ in length: aligned {how}",)
