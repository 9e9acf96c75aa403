"""``SparseTransformer`` and its forward pass, read top to bottom.

A decoder-only transformer with TransformerLens' hook names, weight names and shapes, and the
options of Gao et al. 2025 (appendix A.1). Every experiment of this package is hooks on this forward
pass. The parts of a block are in ``attention`` and ``layers``; what TransformerLens' tools ask of a
model besides is in the mixins.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.compat import HookPoint, ModelBase, hooked
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.model.abstopk import AbsTopK
from tl_sparse.model.attention import Attention
from tl_sparse.model.edge_tools import residual_contribution_scale
from tl_sparse.model.files import FileMixin
from tl_sparse.model.generation import GenerationMixin
from tl_sparse.model.hooks import HookMixin
from tl_sparse.model.inputs import InputMixin, Output, eager_with_hooks
from tl_sparse.model.layers import (
    MLP,
    Bigram,
    Embed,
    Layer,
    Logits,
    PosEmbed,
    Resid,
    Unembed,
    make_norm,
)
from tl_sparse.model.logit_attribution import NoBareReadout
from tl_sparse.model.runtime_config import frozen_config, runtime_config
from tl_sparse.model.tokens import TokenMixin
from tl_sparse.model.weights import WeightMixin


class Block(nn.Module):
    """Attention, then MLP, each reading the normalised residual stream and adding to it.

    With ``attn_only`` there is no MLP, nor anything that belongs to it.
    """

    hook_out_is_single_residual_stream = True

    def __init__(self, config: SparseTransformerConfig, cfg: Any, layer: int) -> None:
        super().__init__()
        self.config, self.cfg, self.attn_only = config, cfg, config.attn_only
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
        pos_channels: Float[Tensor, "batch pos d_pos"] | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Bool[Tensor, "batch dest src"] | None = None,
    ) -> Float[Tensor, "row slot d_model"]:  # hooks may cut or put in positions
        """The residual stream after attention and MLP; ``pos_channels`` they read beside it."""
        resid = self.attn_half(resid, pos_channels, past_kv_cache_entry, attention_mask)
        return self.mlp_half(resid, pos_channels)

    def attn_half(
        self,
        resid: Resid,
        pos_channels: Float[Tensor, "batch pos d_pos"] | None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Bool[Tensor, "batch dest src"] | None = None,
    ) -> Float[Tensor, "row slot d_model"]:
        """The residual stream after attention: what goes to ``hook_resid_mid``."""
        resid = hooked(self.hook_resid_pre, resid)
        out = self.attn(*self.read_attn(resid, pos_channels), past_kv_cache_entry, attention_mask)
        return self.add(resid, self.hook_attn_out(out), self.topk_resid_mid)

    def mlp_half(
        self,
        resid: Float[Tensor, "row slot d_model"],
        pos_channels: Float[Tensor, "batch pos d_pos"] | None = None,
    ) -> Float[Tensor, "row_out slot_out d_model"]:  # hooks may cut or put in positions here too
        """The residual stream after the block, from that after its attention."""
        if not self.attn_only:
            resid = hooked(self.hook_resid_mid, resid)
            out = self.mlp(self.read_mlp(resid, pos_channels))
            resid = self.add(resid, self.hook_mlp_out(out), self.topk_resid_post)
        return hooked(self.hook_resid_post, resid)

    def read_attn(self, resid: Resid, pos_channels: Tensor | None) -> list[Tensor]:
        """What queries, keys and values are made of; by head where ``cfg``'s switches say so."""
        norm_pos = getattr(self, "ln1_pos", None)
        if not (self.cfg.use_attn_in or self.cfg.use_split_qkv_input):
            return [self.read(self.ln1, norm_pos, resid, pos_channels)] * 3
        per_head = resid[:, :, None].expand(-1, -1, self.cfg.n_heads, -1)
        if self.cfg.use_attn_in:
            inputs = [self.hook_attn_in(per_head.clone())] * 3
        else:
            hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
            inputs = [hook(per_head.clone()) for hook in hooks]
        return [self.read(self.ln1, norm_pos, x, pos_channels) for x in inputs]

    def read_mlp(self, resid: Resid, pos_channels: Tensor | None) -> Tensor:
        """What the MLP reads."""
        resid = self.hook_mlp_in(resid.clone()) if self.cfg.use_hook_mlp_in else resid
        return self.read(self.ln2, getattr(self, "ln2_pos", None), resid, pos_channels)

    @staticmethod
    def read(norm: Any, norm_pos: Any, x: Tensor, pos_channels: Tensor | None) -> Tensor:
        """The normalised residual stream, with normalised position channels beside it."""
        x = norm(x)
        if norm_pos is None or pos_channels is None:
            return x
        place = norm_pos(pos_channels)
        if x.ndim == 4:
            place = place[:, :, None].expand(-1, -1, x.shape[2], -1)
        return torch.cat([x, place], dim=-1)

    def add(self, resid: Resid, out: Resid, topk: AbsTopK) -> Resid:
        """The residual stream after a write."""
        resid = resid + out
        return topk(resid.relu() if self.residual_relu else resid)

    @property
    def submodules(self) -> dict[str, nn.Module]:
        """The block's parts by name; TransformerLens' edge tools look for "attn" before they ask
        for the scale below."""
        return dict(self.named_children())

    @property
    def residual_contribution_scale(self) -> float:
        """What TransformerLens multiplies a write by to get its part of the residual stream."""
        return residual_contribution_scale(self.config)


class SparseTransformer(
    HookMixin, InputMixin, TokenMixin, GenerationMixin, WeightMixin, FileMixin, ModelBase
):
    """A weight-sparse (or dense) transformer that TransformerLens' tools run on unchanged.

    On TransformerLens below 4 it is a ``HookedTransformer``; on 4.x it satisfies TransformerLens'
    model protocols. ``config`` is the frozen architecture; ``cfg`` is derived from it, the mutable
    object in which TransformerLens code looks fields up.

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
            device: Where the model is put, by default the CPU. On ``"meta"`` it has sizes but no
                weights, until ``load_state_dict(..., assign=True)`` brings them.

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
        without_weights = device is not None and torch.device(device).type == "meta"
        with torch.device("meta") if without_weights else nullcontext():
            self._add_parts(config)
        self.set_tokenizer(tokenizer, default_padding_side)
        self.setup()
        if not without_weights:
            self.init_weights()
            self.to(device or "cpu")

    def _add_parts(self, config: SparseTransformerConfig) -> None:
        self.hook_tokens = HookPoint()
        self.embed = Embed(config)
        self.hook_embed = HookPoint()
        if config.positional_embedding_type != "none":
            self.pos_embed = PosEmbed(config)
            # concatenated positions are not in the residual stream: not what tools call pos_embed
            name = "hook_pos_concat" if config.concat_positions else "hook_pos_embed"
            setattr(self, name, HookPoint())
        blocks = (Block(config, self.cfg, layer) for layer in range(config.n_layers))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = make_norm(config, config.d_model)
        self.unembed = Unembed(config, self.embed)
        if config.bigram_table != "none":
            self.bigram = Bigram(config)
            self.hook_bigram = HookPoint()
            self.adapter = NoBareReadout()

    def init_weights(self) -> None:
        """Draw every parameter anew from the config's seed; see ``Layer.reset_parameters``."""
        generator = torch.Generator().manual_seed(self.config.seed)
        for module in self.modules():
            if isinstance(module, Layer):
                module.reset_parameters(generator)

    @eager_with_hooks
    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Any = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
    ) -> Any:
        """Run on a string, strings, tokens [batch, pos], or (start_at_layer) a residual stream.

        Arguments and return types are those of ``HookedTransformer.forward``. ``tokens`` must come
        with a residual stream where the model needs them: for the loss and for the bigram table.
        ``attention_mask`` [batch, pos] is 1 at real tokens and 0 at padding; texts have their own,
        tokens have what is given.

        Raises:
            ValueError: what does not fit; see ``InputMixin.prepare``.
        """
        run = self.prepare(
            input, tokens, attention_mask, past_kv_cache, return_type=return_type,
            prepend_bos=prepend_bos, padding_side=padding_side, start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer, shortformer_pos_embed=shortformer_pos_embed,
        )  # fmt: skip
        tokens = run.tokens
        if start_at_layer is None:
            tokens = self.tokens_to_embed(tokens)
            resid = self.embed_tokens(tokens, run.positions)
        else:
            resid = input

        pos_channels = self.pos_channels(run.positions, len(resid))
        for layer in run.layers:
            entry = None if past_kv_cache is None else past_kv_cache[layer]
            resid = self.blocks[layer](resid, pos_channels, entry, run.mask)
        if stop_at_layer is not None:
            return resid
        if return_type is None:
            return None

        logits = self.output_logits(resid, tokens)
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, tokens, run.attention_mask, per_token=loss_per_token)
        return loss if return_type == "loss" else Output(logits, loss)

    def tokens_to_embed(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """The tokens, through their hook point where it is switched on."""
        return self.hook_tokens(tokens.clone()) if self.cfg.use_hook_tokens else tokens

    def embed_tokens(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch_or_1 pos"]
    ) -> Resid:
        """The residual stream that block 0 reads."""
        return self.add_positions(self.hook_embed(self.embed(tokens)), positions)

    def add_positions(self, embed: Resid, positions: Int[Tensor, "batch_or_1 pos"]) -> Resid:
        """Token embeddings plus the positional embeddings, if the model adds any."""
        if self.config.positional_embedding_type != "standard":
            return embed
        return embed + self.hook_pos_embed(self.pos_embed(positions, len(embed)))

    def pos_channels(
        self, positions: Int[Tensor, "batch_or_1 pos"], batch: int
    ) -> Float[Tensor, "batch pos d_pos"] | None:
        """Concatenated positions, which every block reads beside the residual stream, if any."""
        if not self.config.concat_positions:
            return None
        return self.hook_pos_concat(self.pos_embed(positions, batch))

    def output_logits(self, resid: Resid, tokens: Int[Tensor, "batch pos"] | None) -> Logits:
        """Final norm, unembedding, and the bigram row of each current token."""
        logits = self.unembed(self.ln_final(resid))
        if self.config.bigram_table != "none":
            logits = logits + self.hook_bigram(self.bigram(tokens))
        return logits
