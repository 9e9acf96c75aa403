"""Where a model comes from and goes to: folders, the hub, OpenAI's format, TransformerLens.

Thin doors: each imports its room when called, as those rooms build models themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tl_sparse.model.parts import ModelParts

if TYPE_CHECKING:
    from tl_sparse.model.transformer import SparseTransformer


class FileMixin(ModelParts):
    """Loading, saving and converting."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> SparseTransformer:
        """Load a folder, a bundled model, or ``owner/name`` from the Hugging Face Hub.

        Half-precision weights become float32 unless ``dtype`` is given; the model is in eval mode.
        See ``tl_sparse.checkpoints.packed.from_pretrained``.
        """
        from tl_sparse.checkpoints.packed import from_pretrained

        return from_pretrained(name, device, dtype, revision)

    @classmethod
    def from_openai(
        cls,
        directory_or_url: str | Path,
        device: torch.device | str | None = None,
        strict: bool = True,
        tokenizer: Any = None,
        progress: bool = True,
    ) -> SparseTransformer:
        """Load a folder, or a web address, in openai/circuit_sparsity's format, in eval mode.

        ``tokenizer`` is one, or a folder or address with vocab.bpe and encoder.json; ``progress``
        is whether a download shows a bar. See ``tl_sparse.checkpoints.openai.from_openai``.
        """
        from tl_sparse.checkpoints.openai import from_openai

        return from_openai(directory_or_url, device, strict, tokenizer, progress)

    def to_openai(self, directory: str | Path, with_tokenizer: bool = True) -> None:
        """Write the model in openai/circuit_sparsity's format, all or nothing.

        See ``tl_sparse.checkpoints.openai.to_openai``.
        """
        from tl_sparse.checkpoints.openai import to_openai

        to_openai(self._itself, directory, with_tokenizer)

    @classmethod
    def from_transformer_lens(cls, model: Any) -> SparseTransformer:
        """Convert a HookedTransformer or TransformerBridge; see ``tl_sparse.checkpoints.transformer_lens``."""
        from tl_sparse.checkpoints.transformer_lens import from_transformer_lens

        return from_transformer_lens(model)

    @classmethod
    def from_transformer_lens_state_dict(
        cls, state_dict: Mapping[str, Tensor] | str | Path, config: Any, tokenizer: Any = None
    ) -> SparseTransformer:
        """Load a HookedTransformer's state dict or .pth file; see ``tl_sparse.checkpoints.transformer_lens``."""
        from tl_sparse.checkpoints.transformer_lens import from_transformer_lens_state_dict

        return from_transformer_lens_state_dict(state_dict, config, tokenizer)

    def to_transformer_lens(self) -> Any:
        """TransformerLens' own model with these weights; see ``tl_sparse.checkpoints.transformer_lens``."""
        from tl_sparse.checkpoints.transformer_lens import to_transformer_lens

        return to_transformer_lens(self._itself)

    def sparsify(self, density: float, floor: int = 4, **options: Any) -> SparseTransformer:
        """A copy with only the largest weights of every matrix, to train on from there.

        See ``tl_sparse.sparsity.sparsify.sparsify``, also for the options.
        """
        from tl_sparse.sparsity.sparsify import sparsify

        return sparsify(self._itself, density, floor, **options)

    def save_pretrained(
        self,
        folder: str | Path,
        training: Any = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
    ) -> None:
        """Write config, packed weights, tokenizer and model card to a folder, all or nothing.

        ``dtype`` is what the weights are stored in, by default their own; ``card`` is the text of
        the README.md. See ``tl_sparse.checkpoints.packed.save_pretrained``.
        """
        from tl_sparse.checkpoints.packed import save_pretrained

        save_pretrained(self._itself, folder, training, dtype, card)

    def push_to_hub(
        self,
        repo_id: str,
        training: Any = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
        **options: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub, in one commit.

        ``options`` (private, token, branch, create_pr, commit_message) are those of
        ``PyTorchModelHubMixin.push_to_hub``. Returns the commit's address.
        """
        from tl_sparse.checkpoints.packed import save_pretrained
        from tl_sparse.storage.hub import upload

        def save(folder: Path) -> None:
            save_pretrained(self._itself, folder, training, dtype, card)

        return upload(save, repo_id, **options)

    @property
    def _itself(self) -> SparseTransformer:
        return cast("SparseTransformer", self)  # the one class that this is a part of
