"""``compile_circuit``: a circuit as a small standalone hooked model with the same logits.

Removed nodes are constants, so they become biases; stream channels that no kept node writes or
reads become tables by token and position; heads without kept queries and keys get a pattern that
is a function of the position; AbsTopK is exact (see ``compiled_parts``). Gao et al. 2025, §A.5,
says what a circuit computes; this is the same computation without what it does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.logit_diff import last_logits, trimmed
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.circuits.compiled_parts import Read, Where, pick, rows
from tl_sparse.circuits.folding import Folding, KeptNodes
from tl_sparse.compat import HookedRootModule, HookPoint
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sites import BLOCK_SITES, NodeIndex
from tl_sparse.tasks import TaskBatch
from tl_sparse.views.display import frame_html

CHUNK = 256  # prompts per forward pass of the full model in the check


class CompiledCircuit(HookedRootModule):
    """A circuit's own model: ``compiled(tokens)`` gives logits [batch, pos, token_id].

    Hooks have the full model's names and, at the node sites, only the kept channels (``nodes`` maps
    them back), heads flattened. A sublayer without a kept write is absent, with its hooks; so are
    queries and keys that no pattern depends on.
    """

    token_ids: Tensor
    embed: Tensor
    static_embed: Tensor | None
    W_U: Tensor
    W_U_sum: Tensor
    static_token_logits: Tensor
    static_place_logits: Tensor
    b_U: Tensor
    W_B: Tensor | None

    def __init__(self, model: SparseTransformer, nodes: KeptNodes, token_ids: Tensor,
                 exact_topk: bool, task: str = "", tables: bool = True) -> None:  # fmt: skip
        """``tables`` off: nothing is tabulated that hooks at its reads would bypass anyway."""
        super().__init__()
        self.task = task
        self.n_ctx = model.config.n_ctx
        self.max_deviation, self.logit_scale = float("nan"), float("nan")
        builder = Folding(model, nodes, exact_topk, tables)
        self.tracked = tuple(torch.nonzero(builder.tracked).flatten().tolist())
        """Stream channels that are carried along."""
        self.register_buffer("token_ids", token_ids)
        self.register_buffer("embed", builder.embed[:, builder.tracked])
        self.blocks: Any = nn.ModuleList(
            builder.block(model.blocks[layer], layer) for layer in range(model.config.n_layers)
        )
        self.groups = tuple(builder.groups)
        self.ln_final = builder.stage(model.ln_final)
        needs_static = any(
            isinstance(m, Read) and m.k is not None and not m.from_table for m in self.modules()
        )
        static = builder.embed[:, ~builder.tracked] if needs_static else None
        self.register_buffer("static_embed", static)
        self.hook_logits = HookPoint()
        self._set_readout(model, builder, token_ids)
        attentive = [i for i, block in enumerate(self.blocks) if block.attn is not None]
        self.last_attention = max(attentive, default=-1)
        self.setup()
        self.to(next(model.parameters()).device, next(model.parameters()).dtype)
        self.eval()

    def _set_readout(self, model: SparseTransformer, builder: Folding, ids: Tensor) -> None:
        weight, bias = builder.norm_affine(model.ln_final)
        unembed = model.unembed.W_U.detach().double().cpu()[:, ids]
        scaled, tracked = weight[:, None] * unembed, builder.tracked
        self.register_buffer("W_U", scaled[tracked])
        self.register_buffer("W_U_sum", scaled.sum(0))
        self.register_buffer("static_token_logits", builder.embed[:, ~tracked] @ scaled[~tracked])
        self.register_buffer("static_place_logits", builder.added[:, ~tracked] @ scaled[~tracked])
        self.register_buffer("b_U", model.unembed.b_U.double().cpu()[ids] + bias @ unembed)
        bigram = getattr(model, "bigram", None)
        table = None if bigram is None else bigram.W_B.detach().double().cpu()[:, ids]
        self.register_buffer("W_B", table)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], last: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch *pos token_id"]:
        """Logits of ``token_ids`` at every position, or at position ``last`` of each row only.

        With ``last``, what follows the last attention's keys and values is computed there only, so
        hooks behind them see one position. Rows may be padded on the right.

        Raises:
            ValueError: more tokens than the model's context.
        """
        if tokens.shape[1] > self.n_ctx:
            raise ValueError(f"{tokens.shape[1]} tokens exceed the context of {self.n_ctx}")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if last is None:
            return self.run(tokens, places)
        return self.run(tokens, places, last[:, None])[:, 0]

    def run(
        self,
        tokens: Int[Tensor, "batch slot"],
        places: Int[Tensor, "..."],
        ends: Int[Tensor, "batch end"] | None = None,
        mask: Bool[Tensor, "batch slot slot"] | None = None,
    ) -> Float[Tensor, "batch end_or_slot token_id"]:
        """Logits at every slot, or at ``ends``; for rows that hold more than one prompt.

        ``places``: the slots' positions, [slot] or [batch, slot]; ``mask``: what each slot attends
        to, by default itself and those before it.
        """
        static = None if self.static_embed is None else self.static_embed[tokens]
        where, x = Where(tokens, places, static), self.embed[tokens]
        if ends is not None and self.last_attention < 0:
            where, x = where.pick(ends), pick(x, ends)
        for layer, block in enumerate(self.blocks):
            if block.attn is not None and block.ln1 is not None:
                here = ends if layer == self.last_attention else None
                delta = block.hook_attn_out(block.attn(x, block.ln1, where, here, mask))
                if here is not None:
                    where, x = where.pick(here), pick(x, here)
                x = x.index_add(-1, block.attn_writes, delta)
            if block.mlp is not None and block.ln2 is not None:
                delta = block.hook_mlp_out(block.mlp(block.ln2(x, where), where))
                x = x.index_add(-1, block.mlp_writes, delta)
        return self.hook_logits(self.read_out(x, where))

    def read_out(self, x: Tensor, where: Where) -> Float[Tensor, "batch pos token_id"]:
        """Logits of the stream."""
        x, mean, scale = self.ln_final(x, where)
        logits = x @ self.W_U + self.static_token_logits[where.tokens]
        logits = logits + rows(self.static_place_logits, where.places)
        logits = (logits - mean * self.W_U_sum) / scale + self.b_U
        return logits if self.W_B is None else logits + self.W_B[where.tokens]

    def logit_diffs(self, batch: TaskBatch) -> Float[Tensor, " prompt"]:
        """logit(correct) - logit(incorrect) at each prompt's last token.

        Raises:
            ValueError: an answer is not among ``token_ids``.
        """
        batch = trimmed(batch.to(self.token_ids.device))
        logits = self(batch.tokens, batch.last)
        correct, incorrect = (
            logits.gather(1, self.columns(ids)[:, None])[:, 0]
            for ids in (batch.correct_token, batch.incorrect_token)
        )
        return correct - incorrect

    def columns(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Which column of the logits each token has; ValueError for one that has none."""
        same = ids[:, None] == self.token_ids
        if bool((~same.any(1)).any()):
            raise ValueError(
                f"token {int(ids[~same.any(1)][0])} is not among the compiled logits' "
                f"{self.token_ids.tolist()[:20]}; name it in token_ids when compiling"
            )
        return same.int().argmax(1)

    @property
    def nodes(self) -> pd.DataFrame:
        """A row per computed node: layer, site, channel, hook, and its place in the hook's last
        axis."""
        columns = ["layer", "site", "channel", "hook", "place"]
        return pd.DataFrame(
            [
                (group.layer, group.site, channel, group.hook, place)
                for group in self.groups
                for place, channel in enumerate(group.channels)
            ],
            columns=columns,
        )

    @property
    def n_weights(self) -> int:
        """Nonzero weights from kept node to kept node."""
        return sum(
            int((group.projection.weight[:, : group.projection.n_kept] != 0).sum())
            for group in self.groups
            if group.projection is not None
        )

    def __repr__(self) -> str:
        return (
            f"CompiledCircuit({self.task!r}, {len(self.nodes)} nodes, {self.n_weights} weights, "
            f"{len(self.tracked)} stream channels, {len(self.token_ids)} logits, deviation "
            f"{self.max_deviation:.1e} on logits up to {self.logit_scale:.3g})"
        )

    def _repr_html_(self) -> str:
        return frame_html(f"Compiled circuit of {self.task}", repr(self), self.nodes)


def compile_circuit(
    circuit: Circuit,
    model: nn.Module,
    batch: TaskBatch,
    *,
    token_ids: Sequence[int] | None = None,
    exact_topk: bool = True,
    tolerance: float = 1e-5,
) -> CompiledCircuit:
    """The circuit as a model of its own, checked on a task's prompts.

    Args:
        circuit: Nodes and means; every weight between kept nodes is kept.
        model: The model that it belongs to.
        batch: Prompts on which the logits are compared with those of the mean-ablated full model.
        token_ids: Tokens whose logits are computed; default the batch's answers.
        exact_topk: False lets every kept channel pass AbsTopK, which is faster and not the same.
        tolerance: Largest accepted deviation, relative to the largest logit (at least 1).

    Raises:
        TypeError: the model is no SparseTransformer.
        ValueError: the circuit is another model's, has nodes at the embedding or the final stream,
            has removed edges, or was found under resampling or frozen norms; AbsTopK or ReLU acts
            on the stream itself; an unknown token; or the logits deviate by more than
            ``tolerance``.
    """
    if not isinstance(model, SparseTransformer):
        raise TypeError(f"only a SparseTransformer can be compiled, not a {type(model).__name__}")
    circuit.check_model(model)
    if obstacle := why_not_compiled(model, circuit.index):
        raise ValueError(obstacle)
    circuit.hooks()  # refused now if they depend on the prompts
    ids = torch.cat([batch.correct_token, batch.incorrect_token]).unique().cpu()
    if token_ids is not None:
        ids = torch.tensor(list(token_ids), dtype=torch.int64)
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= model.config.n_logits:
        raise ValueError(f"token_ids must be between 0 and {model.config.n_logits - 1}: {ids}")
    with torch.no_grad():
        nodes = KeptNodes(circuit.index, circuit.kept.cpu(), circuit.means.values.cpu())
        compiled = CompiledCircuit(model, nodes, ids, exact_topk, circuit.task)
        check(compiled, circuit, model, batch, tolerance)
    return compiled


def why_not_compiled(model: SparseTransformer, index: NodeIndex) -> str:
    """Why no circuit of these nodes can be compiled; empty if it can."""
    if outside := sorted(set(index.sites) - set(BLOCK_SITES)):
        return (
            f"a circuit with nodes at {', '.join(outside)} cannot be compiled: only the sites "
            f"{', '.join(BLOCK_SITES)} can"
        )
    density = model.config.activation_density
    resid = (density.resid_post_attn, density.resid_post_mlp)
    if model.config.residual_act != "identity" or min(resid) < 1:
        return (
            "a circuit can be compiled only where the stream is a plain sum: this model's has "
            f"residual_act={model.config.residual_act!r}, resid_post_attn="
            f"{density.resid_post_attn}, resid_post_mlp={density.resid_post_mlp}"
        )
    return ""


def check(
    compiled: CompiledCircuit,
    circuit: Circuit,
    model: SparseTransformer,
    batch: TaskBatch,
    tolerance: float,
) -> None:
    """Record how far the logits are from the ablated full model's; ValueError if too far."""
    deviations, largest, hooks = [], 1.0, circuit.hooks()
    batch = trimmed(batch.to(compiled.token_ids.device))
    for start in range(0, len(batch) // 2, CHUNK // 2):
        part = batch.pairs(start, start + CHUNK // 2)
        expected = last_logits(model, part, hooks)[:, compiled.token_ids]
        found = compiled(part.tokens, part.last)
        deviations.append((found - expected).abs().amax(1))
        largest = max(largest, float(expected.abs().max()))
    deviation = torch.cat(deviations)
    compiled.max_deviation, compiled.logit_scale = float(deviation.max()), largest
    if not compiled.max_deviation <= tolerance * largest:
        off = int((~(deviation <= tolerance * largest)).sum())
        raise ValueError(
            f"the compiled circuit's logits deviate by up to {compiled.max_deviation:.2e} on {off} "
            f"of {len(deviation)} prompts (logits up to {largest:.3g}, tolerance {tolerance:g} of "
            "that); raise `tolerance` to accept it"
        )
