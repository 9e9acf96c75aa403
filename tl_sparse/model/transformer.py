"""``SparseTransformer``: the one forward pass, read top to bottom.

A decoder-only transformer with TransformerLens' hook names, weight names and shapes, and the
options of Gao et al. 2025 (appendix A.1). Every experiment of this package is hooks on this forward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.compat import HookPoint, ModelBase, editable, has_hooks
from tl_sparse.config import Activation, SparseTransformerConfig
from tl_sparse.model.abstopk import AbsTopK, top_k_mask
from tl_sparse.model.additivity import residual_contribution_scale
from tl_sparse.model.attention import attention, canonical_unless_changed
from tl_sparse.model.files import FileMixin
from tl_sparse.model.generation import GenerationMixin
from tl_sparse.model.hooks import HookMixin
from tl_sparse.model.layers import Bigram, Embed, Layer, Logits, PosEmbed, Resid, Unembed, make_norm
from tl_sparse.model.readout import StreamOnly
from tl_sparse.model.runtime_config import frozen_config, runtime_config
from tl_sparse.model.tokens import TokenMixin
from tl_sparse.model.weights import WeightMixin


class Attention(Layer):
    """Multi-head attention: reads the normalised stream, writes one delta to it."""

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
        """What the block adds to the stream; ``use_split_qkv_input`` gives inputs a head axis."""
        q, k, v = self.project(query_input, key_input, value_input)
        q = self.hook_q(editable(self.sparsify(self.topk_q, q), self.hook_q))
        k = self.hook_k(editable(self.sparsify(self.topk_k, k), self.hook_k))
        v = self.hook_v(editable(self.sparsify(self.topk_v, v), self.hook_v))
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
        return self.write(self.hook_z(editable(z, self.hook_z)))

    def project(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values [batch, pos, head, d_head], before AbsTopK."""
        weights = [self.read_weight(name) for name in "QKV"]
        biases = [self.b_Q, self.b_K, self.b_V]
        if inputs[0].ndim == 4:  # every head reads a stream of its own: use_split_qkv_input
            reads = (self.hook_act_in(self.topk_in(x)) for x in inputs)
            return [
                torch.einsum("bphd,hde->bphe", read, weight) + bias
                for read, weight, bias in zip(reads, weights, biases, strict=True)
            ]
        read = self.hook_act_in(self.topk_in(inputs[0]))
        joint = torch.cat([w.permute(1, 0, 2).flatten(1) for w in weights], dim=1)
        bias = torch.cat([b.flatten() for b in biases])
        qkv = F.linear(read, joint.T, bias)
        return [x.unflatten(-1, self.W_Q.shape[::2]) for x in qkv.chunk(3, dim=-1)]

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
        total = F.linear(z.flatten(-2), self.W_O.flatten(0, 1).T, self.b_O)
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
        return torch.ones(n_ctx, n_ctx, dtype=torch.bool, device=self.W_Q.device).tril()

    @property
    def OV(self) -> Any:
        """FactoredMatrix W_V W_O, [head, d_model, d_model]."""
        return WeightMixin.factored(self.W_V, self.W_O)

    @property
    def QK(self) -> Any:
        """FactoredMatrix W_Q W_K^T, [head, d_model, d_model]."""
        return WeightMixin.factored(self.W_Q, self.W_K.transpose(-2, -1))


def tanh_gelu(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """GELU's approximation by tanh, GPT-2's activation function."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(Layer):
    """Two-layer MLP: reads the normalised stream, writes one delta to it."""

    b_in: Tensor
    b_out: Tensor

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.act = ACTIVATIONS[config.act_fn]
        d_model, d_pos, d_mlp = config.d_model, config.d_pos, config.site_width("mlp_neuron")
        self.W_in = nn.Parameter(torch.empty(d_model, d_mlp))
        self.W_in_pos = nn.Parameter(torch.empty(d_pos, d_mlp)) if d_pos else None
        self.W_out = nn.Parameter(torch.empty(d_mlp, d_model))
        self.add_bias("b_in", d_mlp)
        self.add_bias("b_out", d_model)
        self.topk_in, self.topk_neuron = self.topk_at("mlp_in"), self.topk_at("mlp_neuron")
        self.topk_out = self.topk_at("mlp_out")
        self.hook_act_in, self.hook_pre, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Resid:
        """What the block adds to the stream."""
        read = self.hook_act_in(self.topk_in(x))
        pre = self.hook_pre(F.linear(read, self.read_weight().T, self.b_in))
        post = self.hook_post(editable(self.topk_neuron(self.act(pre)), self.hook_post))
        return self.topk_out(F.linear(post, self.W_out.T, self.b_out))

    def read_weight(self) -> Float[Tensor, "d_in d_mlp"]:
        """W_in with the rows that read concatenated positions, if there are any."""
        return self.W_in if self.W_in_pos is None else torch.cat([self.W_in, self.W_in_pos])


class Block(nn.Module):
    """Attention, then MLP, each reading the normalised stream and adding to the stream.

    With ``attn_only`` there is no MLP, nor anything that belongs to it.
    """

    hook_out_is_single_residual_stream = True

    def __init__(self, config: SparseTransformerConfig, cfg: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.cfg = cfg
        self.attn_only = config.attn_only
        reads = ("ln1",) if self.attn_only else ("ln1", "ln2")
        for norm in reads:
            self.add_module(norm, make_norm(config, config.d_model))
        for norm in reads if config.d_pos else ():
            self.add_module(f"{norm}_pos", make_norm(config, config.d_pos))
        self.attn = Attention(config, cfg, layer)
        if not self.attn_only:
            self.mlp = MLP(config)
        self.residual_relu = config.residual_act == "relu"
        density = config.activation_density
        self.topk_resid_mid = AbsTopK(density.resid_post_attn, config.d_model)
        self.topk_resid_post = AbsTopK(density.resid_post_mlp, config.d_model)
        self.hook_resid_pre, self.hook_attn_in = HookPoint(), HookPoint()
        self.hook_q_input, self.hook_k_input = HookPoint(), HookPoint()
        self.hook_v_input, self.hook_attn_out = HookPoint(), HookPoint()
        if not self.attn_only:
            self.hook_resid_mid, self.hook_mlp_in = HookPoint(), HookPoint()
            self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self,
        resid: Resid,
        positions: Float[Tensor, "batch pos d_pos"] | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Bool[Tensor, "batch dest src"] | None = None,
    ) -> Float[Tensor, "row slot d_model"]:  # hooks may cut or put in positions
        """The stream after attention and MLP; ``positions`` are the concatenated ones."""
        resid = self.hook_resid_pre(editable(resid, self.hook_resid_pre))
        inputs = self.attention_inputs(resid)
        reads = [self.read(self.ln1, getattr(self, "ln1_pos", None), x, positions) for x in inputs]
        query, key, value = reads if len(reads) == 3 else reads * 3
        delta = self.attn(query, key, value, past_kv_cache_entry, attention_mask)
        resid = self.accumulate(resid, self.hook_attn_out(delta), self.topk_resid_mid)
        if not self.attn_only:
            resid = self.hook_resid_mid(editable(resid, self.hook_resid_mid))
            x = self.hook_mlp_in(resid.clone()) if self.cfg.use_hook_mlp_in else resid
            delta = self.mlp(self.read(self.ln2, getattr(self, "ln2_pos", None), x, positions))
            resid = self.accumulate(resid, self.hook_mlp_out(delta), self.topk_resid_post)
        return self.hook_resid_post(editable(resid, self.hook_resid_post))

    def attention_inputs(self, resid: Resid) -> list[Tensor]:
        """The stream once, or per head where TransformerLens' input switches ask for it."""
        if not (self.cfg.use_attn_in or self.cfg.use_split_qkv_input):
            return [resid]
        per_head = resid[:, :, None].expand(-1, -1, self.cfg.n_heads, -1)
        if self.cfg.use_attn_in:
            return [self.hook_attn_in(per_head.clone())] * 3
        hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        return [hook(per_head.clone()) for hook in hooks]

    @staticmethod
    def read(norm: Any, norm_pos: Any, x: Tensor, positions: Tensor | None) -> Tensor:
        """What a sublayer reads: the normalised stream, and normalised positions beside it."""
        x = norm(x)
        if norm_pos is None or positions is None:
            return x
        place = norm_pos(positions)
        if x.ndim == 4:
            place = place[:, :, None].expand(-1, -1, x.shape[2], -1)
        return torch.cat([x, place], dim=-1)

    def accumulate(self, resid: Resid, delta: Resid, topk: AbsTopK) -> Resid:
        """The stream after a write."""
        resid = resid + delta
        return topk(resid.relu() if self.residual_relu else resid)

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The block's parts by name; TransformerLens' edge tools look for "attn" before they ask
        for the scale below."""
        return dict(self.named_children())

    @property
    def residual_contribution_scale(self) -> float:
        """What TransformerLens multiplies a write by to get its part of the stream; see there."""
        return residual_contribution_scale(self.config)


class SparseTransformer(HookMixin, GenerationMixin, TokenMixin, WeightMixin, FileMixin, ModelBase):
    """A weight-sparse (or dense) transformer that TransformerLens' tools run on unchanged.

    On TransformerLens below 4 it is a ``HookedTransformer``; on 4.x it satisfies TransformerLens'
    model protocols. ``config`` is the frozen architecture; ``cfg`` is the mutable object in which
    TransformerLens code looks fields up.

    Source: Gao et al. 2025 (arXiv 2511.13653), §2.1 and appendix A.1.
    """

    def __init__(
        self,
        cfg: Any,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a model with the initial weights of the config's seed.

        Args:
            cfg: The architecture, a SparseTransformerConfig or a dict of its fields.
            tokenizer: A Hugging Face tokenizer; None: the model takes token ids only.
            move_to_device: False leaves the model on the CPU.
            default_padding_side: Where strings are padded; None: the tokenizer's own side.
            device: Where the model is put, by default the CPU.

        Raises:
            TypeError: ``cfg`` is neither.
            ValueError: a field is unknown or does not fit, or the tokenizer does not.
        """
        if device is not None and not move_to_device:
            raise ValueError(f"move_to_device=False contradicts device={device!r}")
        config = frozen_config(cfg)
        nn.Module.__init__(self)
        self.is_caching, self.context_level = False, 0  # what HookedRootModule's hooks() expects
        self.config = config
        self.cfg = runtime_config(config)
        self.hook_tokens = HookPoint()
        self.embed = Embed(config)
        self.hook_embed = HookPoint()
        if config.positional_embedding_type != "none":
            self.pos_embed = PosEmbed(config)
            # concatenated positions are no part of the stream, so not what tools call pos_embed
            name = "hook_pos_concat" if config.concat_positions else "hook_pos_embed"
            setattr(self, name, HookPoint())
        blocks = (Block(config, self.cfg, layer) for layer in range(config.n_layers))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = make_norm(config, config.d_model)
        self.unembed = Unembed(config, self.embed)
        if config.bigram_table != "none":
            self.bigram = Bigram(config)
            self.hook_bigram = HookPoint()
            self.adapter = StreamOnly()
        self.set_tokenizer(tokenizer, default_padding_side)
        self.setup()
        self.init_weights()
        self.to(device or "cpu")

    def init_weights(self) -> None:
        """Draw every parameter anew from the config's seed; see ``Layer.reset_parameters``."""
        generator = torch.Generator().manual_seed(self.config.seed)
        for module in self.modules():
            if isinstance(module, Layer):
                module.reset_parameters(generator)

    def residual_input(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch_or_1 pos"]
    ) -> Resid:
        """The stream that block 0 reads."""
        return self.add_positions(self.hook_embed(self.embed(tokens)), positions)

    def add_positions(self, embed: Resid, positions: Int[Tensor, "batch_or_1 pos"]) -> Resid:
        """Token embeddings with the positions that are added to the stream, if there are any."""
        if self.config.positional_embedding_type != "standard":
            return embed
        return embed + self.hook_pos_embed(self.pos_embed(positions, len(embed)))

    def run_blocks(
        self,
        resid: Resid,
        positions: Int[Tensor, "batch_or_1 pos"],
        *,
        start: int,
        stop: int,
        attention_mask: Bool[Tensor, "batch dest src"] | None,
        past_kv_cache: Any,
    ) -> Float[Tensor, "row slot d_model"]:
        """Blocks start..stop-1."""
        concat = None
        if self.config.concat_positions:
            concat = self.hook_pos_concat(self.pos_embed(positions, len(resid)))
        for layer in range(start, stop):
            entry = None if past_kv_cache is None else past_kv_cache[layer]
            resid = self.blocks[layer](resid, concat, entry, attention_mask)
        return resid

    def output_logits(self, resid: Resid, tokens: Int[Tensor, "batch pos"] | None) -> Logits:
        """Final norm, unembedding, and the bigram row of each current token."""
        logits = self.unembed(self.ln_final(resid))
        if self.config.bigram_table != "none":
            logits = logits + self.hook_bigram(self.bigram(tokens))
        return logits
