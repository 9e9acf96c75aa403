"""What every head writes on every prompt, as one vector: the input of the codes.

Source: O'Neill and Bui 2024, arXiv 2405.12522: a head's contribution to the residual stream,
``z W_O`` without the bias, averaged over the positions of a prompt.

Outputs are linear in z, and so are averages over positions. So z is what is recorded and kept,
beside one W_O a head: a twelfth of the memory in GPT-2, and never the outputs at all positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.recording import each_batch
from tl_sparse.heads.component import KINDS, Component, Kind
from tl_sparse.heads.dataset import ContrastiveDataset
from tl_sparse.progress import progress_bar
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_finite
from tl_sparse.tasks.padding import real_positions
from tl_sparse.views.display import fields_html

HOOKS: dict[Kind, str] = {
    "head": "attn.hook_z", "mlp": "hook_mlp_out",
    "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v",
}  # fmt: skip
CHUNK = 2**24  # numbers that one step over the prompts may make


@dataclass(frozen=True, eq=False, repr=False)
class HeadOutputs:
    """One vector for each prompt and component, in factors."""

    factors: Float[Tensor, "prompt component inner"]
    """Of heads z, of all else the vectors themselves."""
    maps: Float[Tensor, "component inner width"] | None
    """Of heads W_O: the vectors are factors times maps; None if they are the factors."""
    components: tuple[Component, ...]
    """What the columns stand for, layer by layer."""
    positive: Bool[Tensor, " prompt"]
    """Which prompts are positive."""
    position: str
    """Where in the prompts they were read."""
    name: str
    """Name of the dataset."""
    seconds: float
    """Seconds that the forward passes took."""

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.factors.shape[-1] if self.maps is None else self.maps.shape[-1])

    @property
    def values(self) -> Float[Tensor, "prompt component width"]:
        """The vectors, multiplied out."""
        if self.maps is None:
            return self.factors
        return torch.einsum("pci,ciw->pcw", self.factors, self.maps)

    def take(self, prompts: Int[Tensor, " chosen"] | Bool[Tensor, " prompt"]) -> HeadOutputs:
        """Those of some prompts."""
        return replace(self, factors=self.factors[prompts], positive=self.positive[prompts])

    def through(
        self, weight: Float[Tensor, "group width unit"]
    ) -> Iterator[tuple[slice, Float[Tensor, "chunk component unit"]]]:
        """The vectors times ``weight`` (one for all components or one each), a few prompts a
        step."""
        weight = weight.to(self.factors)
        if self.maps is not None:
            weight = self.maps @ weight
        step = max(1, CHUNK // (len(self.components) * weight.shape[-1]))
        for first in range(0, len(self.factors), step):
            rows = slice(first, min(first + step, len(self.factors)))
            yield rows, (self.factors[rows].transpose(0, 1) @ weight).transpose(0, 1)

    def __repr__(self) -> str:
        return (
            f"HeadOutputs({self.name!r}, {int(self.positive.sum())} positive and "
            f"{int((~self.positive).sum())} negative prompts, {len(self.components)} components of "
            f"width {self.width}, position {self.position!r})"
        )

    def _repr_html_(self) -> str:
        return fields_html(self)


def extract_head_outputs(
    model: nn.Module,
    dataset: ContrastiveDataset,
    position: str = "mean",
    nodes: str | Sequence[str] = "head",
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> HeadOutputs:
    """What every component writes on every prompt of a dataset, by hooks on the forward pass.

    Works for a SparseTransformer and for any TransformerLens model; a layer without attention (or
    MLP) has no components. AbsTopK of a SparseTransformer acts on the sum of its heads: a head's
    output is what it gives to that sum. Norms after the attention (Gemma 2) are left out likewise.

    Args:
        model: The model.
        dataset: Positive and negative prompts.
        position: ``mean`` over all real positions, the beginning-of-text token included (the
            paper's), the ``last`` token, ``max``: each component's own position at which what it
            writes has the largest norm, or the name of one of the dataset's roles.
        nodes: ``head`` (its contribution to the residual stream), ``mlp``, or ``q``, ``k``, ``v``
            (where heads share keys and values, one component for each of these); several, if
            they have one width.
        batch_size: Prompts of a forward pass.
        progress: Whether to show a bar.

    Raises:
        ValueError: an unknown position or kind, kinds of different widths, a model that has none
            of them, or outputs that are not finite.
    """
    started = time.perf_counter()
    kinds = (nodes,) if isinstance(nodes, str) else tuple(dict.fromkeys(nodes))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"nodes={unknown[0]!r}: choose from {', '.join(KINDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not kinds:
        raise ValueError(f"no nodes: choose from {', '.join(KINDS)}")
    prompts = dataset.prompts
    at = None if position in ("mean", "max") else dataset.at(position)
    config: Any = model.cfg
    layers: Any = model.blocks
    hook_dict: Any = model.hook_dict
    hooks: list[tuple[Kind, int, str]] = [
        (kind, layer, name)
        for layer in range(config.n_layers)
        for kind in KINDS
        if kind in kinds
        if (name := f"blocks.{layer}.{HOOKS[kind]}") in hook_dict
    ]
    if absent := set(kinds) - {hook[0] for hook in hooks}:
        raise ValueError(f"{type(model).__name__} has no hook for {', '.join(sorted(absent))}")
    writes = {
        name: layers[layer].attn.W_O.detach().float()
        for kind, layer, name in hooks
        if kind == "head"
    }
    kind_of = {name: (kind, layer) for kind, layer, name in hooks}
    dense = kinds != ("head",)
    found: dict[str, dict[int, Tensor]] = {name: {} for _, _, name in hooks}
    index = NodeIndex.over(model, {name: 1 for _, _, name in hooks})
    order = prompts.last.cpu().argsort(stable=True)
    batches = order.split(batch_size)

    def look(name: str, x: Tensor, number: int) -> None:
        kind, _ = kind_of[name]
        rows = batches[number]
        last = prompts.last[rows].to(x.device)
        x = x.float().reshape(*x.shape[:2], -1, x.shape[-1] if kind == "mlp" else config.d_head)
        W_O = writes.get(name)
        W_O = None if W_O is None else W_O.to(x.device)
        there = None if at is None else at[rows].to(x.device)
        vector = _at(x, position, last, there, W_O)
        if dense and W_O is not None:
            vector = torch.einsum("bhi,hiw->bhw", vector, W_O)
        found[name][number] = vector.cpu()

    steps = progress_bar(
        batches, desc=f"outputs of {dataset.name}", disable=not progress, leave=False
    )
    parts = ((i, prompts.rows(rows.to(prompts.last.device)).tokens) for i, rows in enumerate(steps))
    each_batch(model, parts, index, look)
    vectors = {
        name: torch.cat(list(seen.values()))[order.argsort()] for name, seen in found.items()
    }
    check_finite(vectors, f"outputs on {dataset.name}")
    if len(widths := {v.shape[-1] for v in vectors.values()}) > 1:
        raise ValueError(
            f"nodes={kinds}: components of different widths {sorted(widths)} have no codes "
            "together: read head and mlp, or q, k and v"
        )
    components = tuple(
        Component(layer, kind, None if kind == "mlp" else i)
        for kind, layer, name in hooks
        for i in range(vectors[name].shape[1])
    )
    maps = None if dense else torch.cat([writes[name].cpu() for name in vectors])
    return HeadOutputs(
        torch.cat(list(vectors.values()), 1), maps, components, dataset.positive.cpu(),
        position, dataset.name, time.perf_counter() - started,
    )  # fmt: skip


def _at(
    x: Float[Tensor, "prompt pos head inner"],
    position: str,
    last: Int[Tensor, " prompt"],
    there: Int[Tensor, " prompt"] | None,
    W_O: Float[Tensor, "head inner width"] | None,
) -> Float[Tensor, "prompt head inner"]:
    """One vector a prompt and head: the mean over real positions, or that at one of them."""
    real = real_positions(x.shape[1], last.to(x.device))
    if there is not None:
        return x[torch.arange(len(x), device=x.device), there]
    if position == "mean":
        return torch.einsum("bphi,bp->bhi", x, real / real.sum(1, keepdim=True))
    if W_O is None:
        squared = x.square().sum(-1)
    else:  # of z W_O, without making it
        squared = torch.einsum("bphi,hij,bphj->bph", x, W_O @ W_O.transpose(1, 2), x)
    best = squared.masked_fill(~real[..., None], -1.0).argmax(1)
    return x.gather(1, best[:, None, :, None].expand(-1, 1, -1, x.shape[-1]))[:, 0]
