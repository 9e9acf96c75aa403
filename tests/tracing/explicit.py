"""Direct contributions worked out by hand, part by part, from weights and cached activations.

Nothing of the package's tracing takes part but the dictionaries' own matrices: the residual stream
is a list of vectors with names, and every step of the model is applied to each of them.
"""

from typing import Any

import torch

from tl_sparse.compat import transformer_lens_weights

Parts = dict[str, torch.Tensor]


class Explicit:
    """One prompt of a two-layer LayerNorm model with the paper's dictionaries."""

    def __init__(self, model: Any, dictionaries: list[Any], tokens: torch.Tensor) -> None:
        self.weights = transformer_lens_weights(model)
        self.dictionaries = {d.name: d for d in dictionaries}
        _, cache = model.run_with_cache(tokens)
        names = list(model.hook_dict)
        self.cache = {name: cache[name][0].detach() for name in names if name in cache}
        self.n_pos = tokens.shape[1]

    def written(self, name: str) -> Parts:
        """What a dictionary's site writes at each position, part by part: id → [d_model]."""
        d = self.dictionaries[name]
        x_in, x_out = self.cache[d.hook_in], self.cache[d.hook_out]
        parts: Parts = {}
        for pos in range(self.n_pos):
            pre = x_in[pos] @ d.W_enc + d.b_enc
            acts = pre.clamp_min(0)
            for i in acts.nonzero().flatten().tolist():
                parts[f"{name}/{pos}/{i}"] = acts[i] * d.W_dec[i]
            parts[f"{name}.error/{pos}"] = x_out[pos] - acts @ d.W_dec - d.b_dec
            parts[f"{name}.bias/{pos}"] = d.b_dec
        return parts

    def residual(self, before_layer: int, mid: bool = False) -> Parts:
        """All parts of the residual stream before a layer's attention or (mid) its MLP."""
        parts = self.written("embed")
        for pos in range(self.n_pos):
            parts[f"position/{pos}"] = self.cache["hook_pos_embed"][pos]
        for layer in range(before_layer + 1):
            if layer < before_layer or mid:
                parts |= self.written(f"{layer}.attn")
            if layer < before_layer:
                parts |= self.written(f"{layer}.mlp")
        return parts

    def normed(self, name: str, parts: Parts, affine: bool) -> Parts:
        """Each part after a norm whose scale is held."""
        scale = self.cache[f"{name}.hook_scale"]
        found = {}
        for key, x in parts.items():
            pos = int(key.split("/")[1])
            found[key] = (x - x.mean()) / scale[pos]
            if affine and f"{name}.w" in self.weights:
                found[key] = found[key] * self.weights[f"{name}.w"].detach()
        return found

    def to_attention_feature(self, layer: int, pos: int, index: int) -> dict[str, torch.Tensor]:
        """Source → contribution of each head [head] to a feature of what attention writes."""
        attn = f"blocks.{layer}.attn"
        w = {k: self.weights[f"{attn}.W_{k}"].detach() for k in "VO"}
        pattern = self.cache[f"{attn}.hook_pattern"]
        encoder = self.dictionaries[f"{layer}.attn"].W_enc[:, index]
        found = {}
        for key, x in self.normed(f"blocks.{layer}.ln1", self.residual(layer), True).items():
            source = int(key.split("/")[1])
            found[key] = torch.stack(
                [pattern[h, pos, source] * (x @ w["V"][h] @ w["O"][h] @ encoder) for h in range(4)]
            )
        return found

    def to_mlp_feature(self, layer: int, pos: int, index: int) -> dict[str, torch.Tensor]:
        """Source → contribution to a transcoder's feature, which reads at the same position."""
        encoder = self.dictionaries[f"{layer}.mlp"].W_enc[:, index]
        parts = self.normed(f"blocks.{layer}.ln2", self.residual(layer, mid=True), False)
        return {key: x @ encoder for key, x in parts.items() if int(key.split("/")[1]) == pos}

    def to_logit(self, token: int) -> dict[str, torch.Tensor]:
        """Source → contribution to a logit at the last position."""
        direction = self.weights["unembed.W_U"][:, token].detach()
        parts = self.normed("ln_final", self.residual(2), True)
        last = self.n_pos - 1
        return {key: x @ direction for key, x in parts.items() if int(key.split("/")[1]) == last}
