"""``SparseTransformer``: the one forward pass, read top to bottom.

A decoder-only transformer with TransformerLens' hook names, weight names and shapes, and the
options of Gao et al. 2025 (appendix A.1). Every experiment of this package is hooks on this forward
pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.abstopk import AbsTopK, top_k_mask
from tl_sparse.attention import attention, canonical_unless_changed
from tl_sparse.compat import HookPoint, ModelBase, editable, has_hooks
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.surface import HookSurface, RunSurface, TokenSurface, WeightSurface, runtime_config

Resid = Float[Tensor, "batch pos d_model"]


class Embed(nn.Module):
    """Token embedding."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(config.d_vocab, config.d_model))

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Resid:
        return F.embedding(tokens, self.W_E)


class PosEmbed(nn.Module):
    """Absolute positions: added to the stream, or read beside it where they are concatenated."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        width = config.d_pos if config.concat_positions else config.d_model
        if config.positional_embedding_type == "sinusoidal_concat":
            self.register_buffer("W_pos", sinusoids(config.n_ctx, width))
        else:
            self.W_pos = nn.Parameter(torch.empty(config.n_ctx, width))

    def forward(
        self, positions: Int[Tensor, "batch_or_1 pos"], batch: int
    ) -> Float[Tensor, "batch pos width"]:
        # repeated, not expanded: a hook may edit one row of the batch in place
        return F.embedding(positions, self.W_pos).repeat(batch // positions.shape[0], 1, 1)


def sinusoids(n_ctx: int, width: int) -> Float[Tensor, "n_ctx width"]:
    """Sines and cosines with log-spaced periods from 4 to n_ctx tokens (released code's option)."""
    periods = torch.logspace(2, torch.log2(torch.tensor(float(max(n_ctx, 4)))), width // 2, base=2)
    angles = 2 * torch.pi * torch.arange(n_ctx)[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Norm(nn.Module):
    """RMSNorm or LayerNorm, with TransformerLens' two hook points before the weight is applied."""

    def __init__(self, config: SparseTransformerConfig, width: int) -> None:
        super().__init__()
        self.centred = config.normalization_type == "LN"
        self.eps = config.eps
        self.w = nn.Parameter(torch.ones(width))
        if self.centred and config.use_ln_bias:
            self.b = nn.Parameter(torch.zeros(width))
        else:
            self.register_buffer("b", None)
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        # The released code's nn.RMSNorm takes finfo(dtype).eps, its LayerNorm 1e-5 (A.1).
        eps = self.eps or (1e-5 if self.centred else torch.finfo(x.dtype).eps)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        scale = self.hook_scale(editable(scale, self.hook_scale))
        x = self.hook_normalized(x / scale) * self.w
        return x if self.b is None else x + self.b


class Attention(nn.Module):
    """Multi-head attention: reads the normalised stream, writes one delta to it."""

    hook_out_is_single_residual_stream = True

    def __init__(self, config: SparseTransformerConfig, cfg: Any, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.layer_id = layer
        self.attn_type = "global"
        heads, d_model, d_head = config.n_heads, config.d_model, config.d_head
        for name in "QKV":
            setattr(self, f"W_{name}", nn.Parameter(torch.empty(heads, d_model, d_head)))
            if config.d_pos:
                weight = torch.empty(heads, config.d_pos, d_head)
                setattr(self, f"W_{name}_pos", nn.Parameter(weight))
            add_bias(self, f"b_{name}", (heads, d_head), config.use_bias)
        self.W_O = nn.Parameter(torch.empty(heads, d_head, d_model))
        add_bias(self, "b_O", (d_model,), config.use_bias)
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.use_attention_sinks else None
        causal = torch.ones(config.n_ctx, config.n_ctx, dtype=torch.bool).tril()
        self.register_buffer("mask", causal, persistent=False)

        density = config.activation_density
        for name in ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out"):
            topk = AbsTopK(getattr(density, name), config.site_width(name))
            setattr(self, f"topk_{name.removeprefix('attn_')}", topk)
        for name in ("act_in", "q", "k", "v", "attn_scores", "pattern", "z", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(
        self,
        query_input: Float[Tensor, "batch pos *head d_in"],
        key_input: Float[Tensor, "batch pos *head d_in"],
        value_input: Float[Tensor, "batch pos *head d_in"],
        past_kv_cache_entry: Any = None,
        attention_mask: Bool[Tensor, "batch dest src"] | None = None,
    ) -> Resid:
        q, k, v = self.project(query_input, key_input, value_input)
        q = self.hook_q(editable(self.sparsify(self.topk_q, q), self.hook_q))
        k = self.hook_k(editable(self.sparsify(self.topk_k, k), self.hook_k))
        v = self.hook_v(editable(self.sparsify(self.topk_v, v), self.hook_v))
        if past_kv_cache_entry is not None:
            k, v = past_kv_cache_entry.append(k, v)
        z = attention(
            q, k, v,
            scale=self.cfg.d_head**-0.5,
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
    def OV(self) -> Any:
        """FactoredMatrix W_V W_O, [head, d_model, d_model]."""
        return WeightSurface.factored(self.W_V, self.W_O)

    @property
    def QK(self) -> Any:
        """FactoredMatrix W_Q W_K^T, [head, d_model, d_model]."""
        return WeightSurface.factored(self.W_Q, self.W_K.transpose(-2, -1))


class MLP(nn.Module):
    """Two-layer MLP: reads the normalised stream, writes one delta to it."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        self.act = F.gelu if config.act_fn == "gelu" else F.relu
        self.W_in = nn.Parameter(torch.empty(config.d_model, config.d_mlp))
        self.W_in_pos = (
            nn.Parameter(torch.empty(config.d_pos, config.d_mlp)) if config.d_pos else None
        )
        self.W_out = nn.Parameter(torch.empty(config.d_mlp, config.d_model))
        add_bias(self, "b_in", (config.d_mlp,), config.use_bias)
        add_bias(self, "b_out", (config.d_model,), config.use_bias)
        for name in ("mlp_in", "mlp_neuron", "mlp_out"):
            density = getattr(config.activation_density, name)
            topk = AbsTopK(density, config.site_width(name))
            setattr(self, f"topk_{name.removeprefix('mlp_')}", topk)
        self.hook_act_in, self.hook_pre, self.hook_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Resid:
        read = self.hook_act_in(self.topk_in(x))
        pre = self.hook_pre(F.linear(read, self.read_weight().T, self.b_in))
        post = self.hook_post(editable(self.topk_neuron(self.act(pre)), self.hook_post))
        return self.topk_out(F.linear(post, self.W_out.T, self.b_out))

    def read_weight(self) -> Float[Tensor, "d_in d_mlp"]:
        """W_in with the rows that read concatenated positions, if there are any."""
        return self.W_in if self.W_in_pos is None else torch.cat([self.W_in, self.W_in_pos])


class Block(nn.Module):
    """Attention, then MLP, each reading the normalised stream and adding to the stream."""

    hook_out_is_single_residual_stream = True

    def __init__(self, config: SparseTransformerConfig, cfg: Any, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.ln1, self.ln2 = Norm(config, config.d_model), Norm(config, config.d_model)
        if config.d_pos:
            self.ln1_pos, self.ln2_pos = Norm(config, config.d_pos), Norm(config, config.d_pos)
        self.attn = Attention(config, cfg, layer)
        self.mlp = MLP(config)
        self.residual_relu = config.residual_act == "relu"
        density = config.activation_density
        self.topk_resid_mid = AbsTopK(density.resid_post_attn, config.d_model)
        self.topk_resid_post = AbsTopK(density.resid_post_mlp, config.d_model)
        for name in (
            "resid_pre", "attn_in", "q_input", "k_input", "v_input", "attn_out",
            "resid_mid", "mlp_in", "mlp_out", "resid_post",
        ):  # fmt: skip
            setattr(self, f"hook_{name}", HookPoint())

    def forward(
        self,
        resid: Resid,
        positions: Float[Tensor, "batch pos d_pos"] | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Bool[Tensor, "batch dest src"] | None = None,
    ) -> Resid:
        resid = self.hook_resid_pre(editable(resid, self.hook_resid_pre))
        inputs = self.attention_inputs(resid)
        reads = [self.read(self.ln1, getattr(self, "ln1_pos", None), x, positions) for x in inputs]
        query, key, value = reads if len(reads) == 3 else reads * 3
        delta = self.attn(query, key, value, past_kv_cache_entry, attention_mask)
        resid = self.accumulate(resid, self.hook_attn_out(delta), self.topk_resid_mid)
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
    def read(norm: Norm, norm_pos: Norm | None, x: Tensor, positions: Tensor | None) -> Tensor:
        """What a sublayer reads: the normalised stream, and normalised positions beside it."""
        x = norm(x)
        if norm_pos is None or positions is None:
            return x
        place = norm_pos(positions)
        if x.ndim == 4:
            place = place[:, :, None].expand(-1, -1, x.shape[2], -1)
        return torch.cat([x, place], dim=-1)

    def accumulate(self, resid: Resid, delta: Resid, topk: AbsTopK) -> Resid:
        resid = resid + delta
        return topk(resid.relu() if self.residual_relu else resid)


class Unembed(nn.Module):
    """Residual stream to logits; tied, it holds no matrix of its own."""

    def __init__(self, config: SparseTransformerConfig, embed: Embed) -> None:
        super().__init__()
        # in a tuple, so that the embedding is not registered (and saved) twice
        self.tied_to = (embed,) if config.tie_word_embeddings else ()
        if not self.tied_to:
            self.W_U = nn.Parameter(torch.empty(config.d_model, config.d_vocab))
        # The released models' final_logits_bias: present, zero, never trained.
        self.register_buffer("b_U", torch.zeros(config.d_vocab))

    def __getattr__(self, name: str) -> Any:
        if name == "W_U" and self.__dict__.get("tied_to"):
            return self.tied_to[0].W_E.T
        return super().__getattr__(name)

    def forward(self, resid: Resid) -> Float[Tensor, "batch pos d_vocab"]:
        return F.linear(resid, self.W_U.T, self.b_U)


class Bigram(nn.Module):
    """Dense table whose row of the current token is added to the logits (A.1, Fig. 24)."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__()
        table = torch.zeros(config.d_vocab, config.d_vocab)
        self.W_B = nn.Parameter(table, requires_grad=config.bigram_table == "learned")

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return F.embedding(tokens, self.W_B)


class SparseTransformer(HookSurface, RunSurface, TokenSurface, WeightSurface, ModelBase):  # type: ignore[misc, valid-type]
    """A weight-sparse (or dense) transformer that TransformerLens' tools run on unchanged.

    On TransformerLens below 4 it is a ``HookedTransformer``; on 4.x it satisfies TransformerLens'
    model protocols. ``config`` is the frozen architecture; ``cfg`` is the mutable object in which
    TransformerLens code looks fields up.

    Source: Gao et al. 2025 (arXiv 2511.13653), §2.1 and appendix A.1.
    """

    def __init__(
        self,
        config: SparseTransformerConfig,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.is_caching, self.context_level = False, 0  # what HookedRootModule's hooks() expects
        self.config = config
        self.cfg = runtime_config(config)
        self.embed = Embed(config)
        self.hook_embed = HookPoint()
        if config.positional_embedding_type != "none":
            self.pos_embed = PosEmbed(config)
            # concatenated positions are no part of the stream, so not what tools call pos_embed
            name = "hook_pos_concat" if config.concat_positions else "hook_pos_embed"
            setattr(self, name, HookPoint())
        blocks = (Block(config, self.cfg, layer) for layer in range(config.n_layers))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = Norm(config, config.d_model)
        self.unembed = Unembed(config, self.embed)
        if config.bigram_table != "none":
            self.bigram = Bigram(config)
            self.hook_bigram = HookPoint()
        self.set_tokenizer(tokenizer)
        self.setup()
        self.init_weights()
        self.to(device or "cpu")

    def init_weights(self) -> None:
        """N(0, initializer_range), block outputs / sqrt(2 n_layers), the rest zero or one (A.1)."""
        generator = torch.Generator().manual_seed(self.config.seed)
        std = self.config.initializer_range
        shrunk = std / (2 * self.config.n_layers) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                leaf = name.rpartition(".")[2]
                if leaf.startswith("W_") and leaf != "W_B":
                    scale = shrunk if leaf in ("W_O", "W_out") else std
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * scale)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: Any = None) -> SparseTransformer:
        """Load a folder written by :meth:`save_pretrained`; see ``tl_sparse.checkpoints``."""
        from tl_sparse.checkpoints import from_pretrained

        return from_pretrained(folder, device)

    @classmethod
    def from_openai(cls, folder: str | Path, device: Any = None) -> SparseTransformer:
        """Load a folder in openai/circuit_sparsity's format; see ``tl_sparse.checkpoints``."""
        from tl_sparse.checkpoints import from_openai

        return from_openai(folder, device)

    def save_pretrained(self, folder: str | Path, training: Any = None) -> None:
        """Write config, weights and tokenizer to a folder; see ``tl_sparse.checkpoints``."""
        from tl_sparse.checkpoints import save_pretrained

        save_pretrained(self, folder, training)

    def residual_input(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch_or_1 pos"]
    ) -> Resid:
        """The stream that block 0 reads."""
        resid = self.hook_embed(self.embed(tokens))
        if self.config.positional_embedding_type == "standard":
            resid = resid + self.hook_pos_embed(self.pos_embed(positions, len(tokens)))
        return resid

    def run_blocks(
        self,
        resid: Resid,
        positions: Int[Tensor, "batch_or_1 pos"],
        *,
        start: int,
        stop: int,
        attention_mask: Bool[Tensor, "batch dest src"] | None,
        past_kv_cache: Any,
    ) -> Resid:
        """Blocks start..stop-1."""
        concat = None
        if self.config.concat_positions:
            concat = self.hook_pos_concat(self.pos_embed(positions, len(resid)))
        for layer in range(start, stop):
            entry = None if past_kv_cache is None else past_kv_cache[layer]
            resid = self.blocks[layer](resid, concat, entry, attention_mask)
        return resid

    def output_logits(
        self, resid: Resid, tokens: Int[Tensor, "batch pos"] | None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Final norm, unembedding, and the bigram row of each current token."""
        logits = self.unembed(self.ln_final(resid))
        if self.config.bigram_table != "none":
            logits = logits + self.hook_bigram(self.bigram(tokens))
        return logits


def add_bias(module: nn.Module, name: str, shape: tuple[int, ...], trained: bool) -> None:
    """A zero bias: a parameter, or a constant that TransformerLens' tools can still read."""
    if trained:
        setattr(module, name, nn.Parameter(torch.zeros(shape)))
    else:
        module.register_buffer(name, torch.zeros(shape), persistent=False)
