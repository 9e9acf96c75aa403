"""Weights by TransformerLens' names, their device, and the weight processing that is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tl_sparse.compat import FactoredMatrix, runtime_dtype
from tl_sparse.model.abstopk import AbsTopK
from tl_sparse.model.parts import ModelParts
from tl_sparse.model.runtime_config import follow_weights

HALF = {torch.float16, torch.bfloat16}


def stacked(part: str, name: str) -> property:
    """Property that stacks a parameter over layers."""

    def get(self: Any) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in self.blocks])

    return property(get, doc=f"{part}.{name} of every layer, stacked along a new first dimension.")


def has_abstopk(model: nn.Module) -> bool:
    """Whether AbsTopK drops channels anywhere in a model."""
    return any(isinstance(module, AbsTopK) and module.active for module in model.modules())


def refused(name: str, why: str) -> Callable[..., Any]:
    """A method of HookedTransformer that would be wrong on this model: it raises, saying why."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{name} does not apply to a SparseTransformer: {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Refused: {why}."
    return refuse


MLP_WEIGHTS = ("W_in", "W_out", "b_in", "b_out")
PROCESSING = (
    "it would fill in zero weights, and with AbsTopK or an attention sink change what the model "
    "computes"
)


class WeightMixin(ModelParts):
    """Weights, circuits of weights, counts."""

    W_Q, W_K, W_V, W_O = (stacked("attn", f"W_{x}") for x in "QKVO")
    b_Q, b_K, b_V, b_O = (stacked("attn", f"b_{x}") for x in "QKVO")
    W_in, W_out, b_in, b_out = (stacked("mlp", name) for name in MLP_WEIGHTS)
    W_gate = None

    def __getattr__(self, name: str) -> Any:
        # torch comes here too when a property raises AttributeError, and would drop its message
        if name in MLP_WEIGHTS and self.config.attn_only:
            raise AttributeError(f"no {name} in a model with attn_only=True: it has no MLPs")
        if name in ("W_pos", "W_E_pos"):
            kind = self.config.positional_embedding_type
            raise AttributeError(f"no {name} in a model with positional_embedding_type={kind!r}")
        return super().__getattr__(name)

    @property
    def W_E(self) -> Tensor:
        """Token embedding [d_vocab, d_model]."""
        return self.embed.W_E

    @property
    def W_U(self) -> Tensor:
        """Unembedding [d_model, d_vocab]."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        """Final logit bias [d_vocab]."""
        return self.unembed.b_U

    @property
    def W_pos(self) -> Tensor:
        """Positions [n_ctx, d_model], or [n_ctx, d_pos] where they are concatenated."""
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Tensor:
        """Token and added positional embeddings on top of each other."""
        if self.config.concat_positions:
            raise AttributeError("W_E_pos")
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> Any:
        """W_Q W_K^T of every layer and head."""
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> Any:
        """W_V W_O of every layer and head."""
        return FactoredMatrix(self.W_V, self.W_O)

    def to(self, *args: Any, print_details: bool = False, **kwargs: Any) -> Any:
        """Move or cast the model; ``cfg.device`` and ``cfg.dtype`` follow.

        Where AbsTopK keeps channels, a cast to half precision gives a warning: among channels of
        nearly the same size it then keeps others.
        """
        before = self.cfg.dtype
        nn.Module.to(self, *args, **kwargs)
        if self.cfg.dtype in HALF and before not in HALF and has_abstopk(self):
            warnings.warn(
                f"in {self.cfg.dtype} AbsTopK keeps other channels here and there, so this is not "
                "quite the same model: tl_sparse.analyses.changed_selections counts them",
                stacklevel=2,
            )
        return self

    def half(self) -> Any:
        """Cast the model to float16; see :meth:`to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        """Cast the model to bfloat16; see :meth:`to`."""
        return self.to(torch.bfloat16)

    def cuda(self, device: Any = None) -> Any:
        """Move the model to a CUDA device."""
        return nn.Module.cuda(self, device)

    def cpu(self) -> Any:
        """Move the model to the CPU."""
        return nn.Module.cpu(self)

    def mps(self) -> Any:
        """Move the model to Apple's GPU."""
        return self.to("mps")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # every device or dtype change of a module comes through here
        nn.Module._apply(self, fn, recurse)
        follow_weights(self.cfg, self.config, self.unembed.b_U.device, runtime_dtype(self))
        return self

    def sparse_weights(self, max_density: float = 0.1) -> Any:
        """Hold every matrix of the blocks, and the unembedding, as its nonzeros alone; returns
        the model, which is changed in place.

        For running and looking at big models in little memory: 8 bytes a nonzero (float32), in
        place of 4 an entry. Hooks, caches, gradients of activations and saving work as before;
        logits agree to rounding, by which AbsTopK may choose another of two nearly equal channels.
        Weights cannot be changed or trained; reading one (``model.W_in``) makes it dense for the
        moment. :meth:`dense_weights` is the way back.

        Args:
            max_density: Matrices with a larger share of nonzeros stay as they are.

        Raises:
            ValueError: ``max_density`` is no share.
        """
        from tl_sparse.model.sparse_weights import hold_sparse

        hold_sparse(self, max_density)
        return self

    def dense_weights(self) -> Any:
        """Hold every matrix with its zeros again: the inverse of :meth:`sparse_weights`."""
        from tl_sparse.model.sparse_weights import hold_dense

        hold_dense(self)
        return self

    @property
    def n_params_total(self) -> int:
        """Entries of all parameters."""
        held = [x for m in self.modules() for x in vars(m).get("sparse", {}).values()]
        return sum(p.numel() for p in self.parameters()) + sum(
            x.shape[0] * x.shape[1] for x in held
        )

    def all_parameters(self) -> dict[str, Tensor]:
        """Parameters by name, those held sparsely made dense."""
        found: dict[str, Tensor] = dict(self.named_parameters())
        for part, module in self.named_modules():
            if "sparse" in vars(module):
                found |= {f"{part}.{name}": x for name, x in module.weights().items()}
        return found

    def tl_parameters(self) -> dict[str, Tensor]:
        """Parameters by TransformerLens name, the tied unembedding included."""
        parameters = self.all_parameters()
        return parameters | {"unembed.W_U": self.unembed.W_U, "unembed.b_U": self.unembed.b_U}

    def blocks_with(self, submodule: str) -> list[tuple[int, Any]]:
        """(layer, block) of every block that has a submodule of that name."""
        return [(i, b) for i, b in enumerate(self.blocks) if submodule in b._modules]

    def all_head_labels(self) -> list[str]:
        """L0H0, L0H1 and so on."""
        layers, heads = range(self.cfg.n_layers), range(self.cfg.n_heads)
        return [f"L{layer}H{head}" for layer in layers for head in heads]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """Sum of the biases written before a layer (or before its MLP) [d_model].

        Raises:
            ValueError: there is no such layer.
        """
        last = self.config.n_layers - mlp_input
        if not 0 <= layer <= last:
            raise ValueError(f"layer={layer} with mlp_input={mlp_input} is not in 0..{last}")
        total = torch.zeros(self.cfg.d_model, device=self.W_E.device, dtype=self.W_E.dtype)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases and not self.config.attn_only:
                total = total + block.mlp.b_out
        return total + self.blocks[layer].attn.b_O if mlp_input else total

    def all_composition_scores(self, mode: str) -> Tensor:
        """Composition score of every pair of heads [layer, head, layer, head], earlier to later.

        0 where a head's circuit is all zero, as weight-sparse training leaves some.
        """
        if mode not in ("Q", "K", "V"):
            raise ValueError(f"mode={mode!r} is unknown; choose from 'Q', 'K', 'V'")
        right = {"V": self.OV, "Q": self.QK, "K": self.QK.T}[mode]
        # Frobenius norms over products of factored matrices, [layer, head, layer, head]
        left = self.OV
        product = left[:, :, None, None] @ right[None, None]
        norms = left.norm()[:, :, None, None] * right.norm()[None, None]
        layers = torch.arange(self.cfg.n_layers, device=norms.device)
        earlier = layers[:, None, None, None] < layers[None, None, :, None]
        scores = product.norm() / torch.where(norms > 0, norms, 1.0)
        return torch.where(earlier, scores, 0.0)

    def n_nonzero(self) -> dict[str, int]:
        """Exact L0 of every parameter, by name."""
        return {name: int(torch.count_nonzero(p)) for name, p in self.all_parameters().items()}

    fold_layer_norm = refused("fold_layer_norm", PROCESSING)
    fold_value_biases = refused("fold_value_biases", PROCESSING)
    center_writing_weights = refused("center_writing_weights", PROCESSING)
    center_unembed = refused("center_unembed", PROCESSING)
    refactor_factored_attn_matrices = refused("refactor_factored_attn_matrices", PROCESSING)
    process_weights_ = refused("process_weights_", PROCESSING)
    process_weights = refused("process_weights", PROCESSING)
    load_and_process_state_dict = refused("load_and_process_state_dict", PROCESSING)

    @classmethod
    def from_pretrained_no_processing(cls, *args: Any, **kwargs: Any) -> Any:
        """``from_pretrained``, which processes no weights in the first place."""
        load: Callable[..., Any] = cls.from_pretrained
        return load(*args, **kwargs)

    fill_missing_keys = refused("fill_missing_keys", "a checkpoint must be complete")
    move_model_modules_to_device = refused("move_model_modules_to_device", "use to(device)")
    load_sample_training_dataset = refused(
        "load_sample_training_dataset", "its data is a corpus: see tl_sparse.data"
    )
    sample_datapoint = refused("sample_datapoint", "its data is a corpus: see tl_sparse.data")
