"""SAEs trained by SAELens on any model of TransformerLens, a SparseTransformer too.

SAELens' own runner loads a HookedTransformer by name. Its trainer takes activations from anywhere,
and is given here those at a hook of the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.eval_mode import frozen
from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.formats.sae_lens import read_sae_lens
from tl_sparse.tracing.splice import keep_in


def train_with_sae_lens(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    hook: str,
    sae: Any,
    trainer: Any,
    folder: str | Path | None = None,
    *,
    sequences: int = 32,
    seed: int = 0,
) -> Dictionary:
    """Train a sparse autoencoder of what is at a hook by SAELens (``pip install 'tl-sparse[sae]'``,
    which needs TransformerLens 3), whose architectures and settings these are.

    Args:
        model: Any TransformerLens model; it stays as it is.
        tokens: Text, which is gone through in random order as often as needed.
        hook: Where, as ``blocks.0.hook_attn_out``.
        sae: A training config of SAELens, as ``sae_lens.TopKTrainingSAEConfig(d_in=64, d_sae=512,
            k=8)``.
        trainer: A ``sae_lens.config.SAETrainerConfig``: samples, batch size, learning rate.
        folder: Where SAELens' files are kept, which :func:`read_dictionary` reads; by default
            nowhere.
        sequences: Sequences whose activations are mixed at a time.
        seed: Of the initial weights and the order.

    Raises:
        ImportError: SAELens is not installed, or does not work with this TransformerLens.
        ValueError: the model has no such hook, or another width than ``sae.d_in`` there; an
            architecture that is no linear encoder and decoder around one activation.
    """
    try:
        from sae_lens.registry import get_sae_training_class
        from sae_lens.saes.sae import SAEMetadata
        from sae_lens.training.sae_trainer import SAETrainer
    except ImportError as error:
        raise ImportError(
            "SAELens is missing, or does not work with this TransformerLens: pip install "
            "'tl-sparse[sae]' in an environment of its own"
        ) from error
    points: Any = model.hook_dict
    if hook not in points:
        raise ValueError(f"the model has no hook {hook!r}")
    with torch.random.fork_rng(), frozen(model), ExitStack() as stack:
        torch.manual_seed(seed)
        batches = activation_batches(
            model, tokens, hook, trainer.train_batch_size_samples, sequences, seed
        )
        first = next(batches)
        if first.shape[1] != sae.d_in:
            raise ValueError(f"{hook} has {first.shape[1]} channels, and the SAE d_in={sae.d_in}")
        named = replace(sae, metadata=SAEMetadata(hook_name=hook))
        learned = get_sae_training_class(named.architecture())[0](named)
        if trainer.lr_end is None:  # what SAELens' own runner makes of it
            trainer = replace(trainer, lr_end=trainer.lr / 10)
        SAETrainer(trainer, learned, batches).fit()
        place = stack.enter_context(TemporaryDirectory()) if folder is None else folder
        learned.save_inference_model(str(place))
        return read_sae_lens(Path(place))


def activation_batches(
    model: nn.Module,
    tokens: Int[Tensor, "sequence pos"],
    hook: str,
    size: int,
    sequences: int = 32,
    seed: int = 0,
) -> Iterator[Float[Tensor, "sample channel"]]:
    """Batches of activations at a hook without end, sequences and samples in random order."""
    generator = torch.Generator().manual_seed(seed)
    run: Any = model
    device = next(model.parameters()).device
    rest = None
    while True:
        for rows in torch.randperm(len(tokens), generator=generator).split(sequences):
            seen: dict[str, Tensor] = {}
            with torch.no_grad():
                run.run_with_hooks(tokens[rows].to(device), fwd_hooks=[keep_in(seen, hook)])
            samples = seen[hook].flatten(2).flatten(0, 1)
            samples = samples[torch.randperm(len(samples), generator=generator).to(device)]
            rest = samples if rest is None else torch.cat([rest, samples])
            *whole, rest = rest.split(size) if len(rest) % size else (*rest.split(size), rest[:0])
            yield from whole
