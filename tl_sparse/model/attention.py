"""The attention of a block: projections, AbsTopK, hook points, the write. See attention_kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tl_sparse.compat import FactoredMatrix, HookPoint, has_hooks, hooked
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.abstopk import AbsTopK, top_k_mask
from tl_sparse.model.attention_kernel import attention, canonical_unless_changed
from tl_sparse.model.layers import Layer, Resid


class Attention(Layer):
    """Multi-head attention: reads the normalised residual stream, writes one delta to it."""

    MATRICES: ClassVar = {
        "QKV": ("W_Q", "W_K", "W_V", "W_Q_pos", "W_K_pos", "W_V_pos"),
        "O": ("W_O",),
    }
    hook_out_is_single_residual_stream = True
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor

    def __init__(self, config: SparseTransformerConfig, cfg: Any, layer: int) -> None:
        super().__init__(config)
        self.cfg = cfg
        self.layer_id = layer
        self.attn_type = "global"
        self.scale = config.d_head**-0.5 if config.attn_scale is None else 1 / config.attn_scale
        heads, d_model, d_head = cfg.n_heads, config.d_model, config.d_head
        for name in "QKV":
            setattr(self, f"W_{name}", nn.Parameter(torch.empty(heads, d_model, d_head)))
            if config.d_pos:
                weight = torch.empty(heads, config.d_pos, d_head)
                setattr(self, f"W_{name}_pos", nn.Parameter(weight))
            self.add_bias(f"b_{name}", heads, d_head)
        self.W_O = nn.Parameter(torch.empty(heads, d_head, d_model))
        self.add_bias("b_O", d_model)
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.use_attention_sinks else None

        self.topk_in, self.topk_q = self.topk_at("attn_in"), self.topk_at("attn_q")
        self.topk_k, self.topk_v = self.topk_at("attn_k"), self.topk_at("attn_v")
        self.topk_out = self.topk_at("attn_out")
        self.hook_act_in = HookPoint()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_in"],
        key_input: Float[Tensor, "batch pos *head d_in"],
        value_input: Float[Tensor, "batch pos *head d_in"],
        past_kv_cache_entry: Any = None,
        attention_mask: Bool[Tensor, "batch dest src"] | None = None,
    ) -> Resid:
        """What the block adds to the residual stream; split inputs have a head axis."""
        q, k, v = self.project(query_input, key_input, value_input)
        q = hooked(self.hook_q, self.sparsify(self.topk_q, q))
        k = hooked(self.hook_k, self.sparsify(self.topk_k, k))
        v = hooked(self.hook_v, self.sparsify(self.topk_v, v))
        if past_kv_cache_entry is not None:
            k, v = past_kv_cache_entry.append(k, v)
        z = attention(
            q, k, v,
            scale=self.scale,
            sinks=self.sinks,
            mask=attention_mask,
            hooked=has_hooks(self.hook_attn_scores) or has_hooks(self.hook_pattern),
            hook_scores=self.hook_attn_scores,
            hook_pattern=self.hook_pattern,
        )  # fmt: skip
        return self.write(hooked(self.hook_z, z))

    def project(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values [batch, pos, head, d_head], before AbsTopK."""
        biases = [self.b_Q, self.b_K, self.b_V]
        if inputs[0].ndim == 4:  # every head reads a stream of its own: use_split_qkv_input
            weights = [self.read_weight(name) for name in "QKV"]
            reads = (self.hook_act_in(self.topk_in(x)) for x in inputs)
            return [
                torch.einsum("bphd,hde->bphe", read, weight) + bias
                for read, weight, bias in zip(reads, weights, biases, strict=True)
            ]
        read = self.hook_act_in(self.topk_in(inputs[0]))
        qkv = self.multiply("QKV", read, torch.cat([b.flatten() for b in biases]))
        return [x.unflatten(-1, self.b_Q.shape) for x in qkv.chunk(3, dim=-1)]

    def matrix(self, name: str) -> Float[Tensor, "d_in d_out"]:
        """Queries', keys' and values' matrices beside each other, or what heads write by."""
        if name == "O":
            return self.W_O.flatten(0, 1)
        weights = [self.read_weight(name) for name in "QKV"]
        return torch.cat([w.permute(1, 0, 2).flatten(1) for w in weights], dim=1)

    def part(self, name: str, matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "..."]:
        """A weight [head, d_in, d_head] (or [head, d_head, d_model]) out of its matrix."""
        heads, d_model = self.b_Q.shape[0], self.config.d_model
        if name == "W_O":
            return matrix.unflatten(0, (heads, -1))
        mine = matrix.chunk(3, dim=1)["QKV".index(name[2])]
        mine = mine[d_model:] if name.endswith("_pos") else mine[:d_model]
        return mine.unflatten(1, (heads, -1)).permute(1, 0, 2)

    def read_weight(self, name: str) -> Float[Tensor, "head d_in d_head"]:
        """W_Q, W_K or W_V with the rows that read concatenated positions, if there are any."""
        weight = getattr(self, f"W_{name}")
        positional = getattr(self, f"W_{name}_pos", None)
        return weight if positional is None else torch.cat([weight, positional], dim=1)

    @staticmethod
    def sparsify(topk: AbsTopK, x: Tensor) -> Tensor:
        """AbsTopK over the channels of all heads together, as in the released code."""
        return topk(x.flatten(-2)).view(x.shape) if topk.active else x

    def write(self, z: Float[Tensor, "batch pos head d_head"]) -> Resid:
        """The block's delta; with ``use_attn_result`` also what each head adds to it.

        ``hook_result`` is additive: its sum over heads is the delta. AbsTopK acts on that sum, so
        each head's part is masked by the channels that the sum keeps and carries 1/n_heads of b_O.
        Without AbsTopK on attn_out it is TransformerLens' own: the head's write without b_O.
        """
        total = self.multiply("O", z.flatten(-2), self.b_O)
        out = self.topk_out(total)
        if not self.cfg.use_attn_result:
            return out
        result = torch.einsum("bphe,hed->bphd", z, self.W_O)
        if self.topk_out.active:
            kept = top_k_mask(total, self.topk_out.k)[:, :, None]
            result = (result + self.b_O / self.cfg.n_heads) * kept
        before = result.detach()
        result = self.hook_result(result.clone())  # a copy, which a hook may edit in place
        parts = result.sum(2) if self.topk_out.active else result.sum(2) + self.b_O
        changed = (before != result).any(-1).any(-1)[..., None]
        return canonical_unless_changed(out.detach(), parts, changed)

    @property
    def mask(self) -> Bool[Tensor, "n_ctx n_ctx"]:
        """TransformerLens' causal mask, for tools that ask for it; made anew at each call."""
        n_ctx = self.config.n_ctx
        return torch.ones(n_ctx, n_ctx, dtype=torch.bool, device=self.b_Q.device).tril()

    @property
    def OV(self) -> Any:
        """FactoredMatrix W_V W_O, [head, d_model, d_model]."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> Any:
        """FactoredMatrix W_Q W_K^T, [head, d_model, d_model]."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))
