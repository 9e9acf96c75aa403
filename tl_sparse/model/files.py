"""Where a model comes from and goes to: folders, the hub, OpenAI's format, TransformerLens.

Every loader makes a :class:`~tl_sparse.checkpoints.checkpoint.Checkpoint` first, and every model
that is loaded is built from one in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tl_sparse.checkpoints.checkpoint import Checkpoint, TrainingRecord, check_tensors
from tl_sparse.checkpoints.openai import read_openai, read_openai_hub, write_openai
from tl_sparse.checkpoints.openai_hub import is_openai_hub
from tl_sparse.checkpoints.openai_models import released_name
from tl_sparse.checkpoints.packed import check_dtype, read_packed, write_packed
from tl_sparse.checkpoints.transformer_lens import (
    check_same_logits,
    read_state_dict,
    read_transformer_lens,
    to_transformer_lens,
)
from tl_sparse.model.parts import ModelParts
from tl_sparse.model.sparse_weights import hold_sparse
from tl_sparse.model.weights import HALF
from tl_sparse.storage.finite import check_finite, check_weights
from tl_sparse.storage.hub import CONFIG, find_model, upload
from tl_sparse.storage.json_files import read_json

Model = TypeVar("Model", bound="FileMixin")


class FileMixin(ModelParts):
    """Loading, saving and converting."""

    @classmethod
    def from_checkpoint(cls: type[Model], checkpoint: Checkpoint, copy: bool = True) -> Model:
        """A model built from a checkpoint, in eval mode on the CPU.

        Args:
            checkpoint: Config, tensors and tokenizer.
            copy: Whether the model gets copies of the tensors. False: it takes the tensors
                themselves, which nobody else may use or change then, so that a big model needs its
                memory once.

        Raises:
            ValueError: tensors are missing, unexpected, or of another shape than the config's.
        """
        model = cls(checkpoint.config, checkpoint.tokenizer, device="meta")
        assign_tensors(model, checkpoint.tensors, checkpoint.origin, copy)
        return model.eval()

    def to_checkpoint(self) -> Checkpoint:
        """What the model is saved as; the tensors share the model's storage."""
        return Checkpoint(self.config, self.state_dict(), self.tokenizer)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> Model:
        """Load a model that :meth:`save_pretrained` wrote; it is in eval mode.

        ``openai/circuit-sparsity``, which has a layout of its own, is read too, without running its
        code; :meth:`from_openai` has more options for it.

        Args:
            name: a folder, the name of a bundled model, or the id of a model on the Hugging Face
                Hub, such as ``owner/name``.
            device: where to; default the CPU.
            dtype: of the loaded weights; default float32 for a model stored in half precision
                (which is exact, and what CPUs are fast in), and else the stored dtype.
            revision: a branch, tag or commit of a hub model.

        Raises:
            FileNotFoundError: there is no such model, or a file of it is missing.
            ValueError: another schema version, unknown config keys, damaged weights, or tensors
                that are missing, unexpected or of the wrong shape.
        """
        if dtype is not None:
            check_dtype(dtype)
        try:
            folder = find_model(name, revision)
        except FileNotFoundError as error:
            if released_name(str(name)) is None:
                raise
            told = f"{name} is one of OpenAI's released models: load it with from_openai"
            raise FileNotFoundError(told) from error
        path = folder / CONFIG
        if path.is_file() and is_openai_hub(read_json(path)):
            return cls._from_openai_checkpoint(read_openai_hub(folder)).to(device or "cpu", dtype)
        checkpoint = read_packed(folder)
        if dtype is None and {tensor.dtype for tensor in checkpoint.tensors.values()} <= HALF:
            dtype = torch.float32
        return cls.from_checkpoint(checkpoint).to(device=device or "cpu", dtype=dtype)

    def save_pretrained(
        self,
        folder: str | Path,
        training: TrainingRecord | None = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
    ) -> None:
        """Write config, packed weights, tokenizer and model card to a folder atomically.

        Args:
            folder: where to; a model that is there already is replaced.
            training: how the model came to be.
            dtype: what the weights are stored in; default is their own dtype, which keeps every
                bit. A narrower one rounds each weight once, and no nonzero weight to zero.
            card: text of the README.md; default is to keep the one that the folder has, if any.

        Raises:
            ValueError: the training record's L0 is not that of the weights, a weight is too large
                for the dtype, or the folder holds files that are no part of a checkpoint.
        """
        write_packed(self.to_checkpoint(), folder, training, dtype, card)

    def push_to_hub(
        self,
        repo_id: str,
        training: TrainingRecord | None = None,
        dtype: torch.dtype | None = None,
        card: str | None = None,
        **options: Any,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub, in one commit.

        ``options`` (private, token, branch, create_pr, commit_message) are those of
        ``PyTorchModelHubMixin.push_to_hub``. Returns the commit's address.
        """

        def save(folder: Path) -> None:
            self.save_pretrained(folder, training, dtype, card)

        return upload(save, repo_id, **options)

    @classmethod
    def from_openai(
        cls: type[Model],
        place: str | Path,
        device: torch.device | str | None = None,
        strict: bool = True,
        tokenizer: Any = None,
        progress: bool = True,
        base_url: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        sparse_weights: bool = False,
    ) -> Model:
        """Load a released model by name, or any in openai/circuit_sparsity's format, in eval mode.

        ``from_openai("csp_yolo2")``, a folder, an address, or ``from_openai("hf:owner/name")``; see
        :func:`tl_sparse.checkpoints.openai.read_openai` for the arguments and errors.

        Two traps: strings get no beginning-of-text token in front, as in the released code, so that
        positions are those of the published circuits; and in half precision (``dtype``, default
        float32) AbsTopK keeps other channels here and there, which gives a warning
        (:func:`tl_sparse.analyses.changed_selections` counts them).

        A model needs its memory once while it is loaded. With ``sparse_weights`` it then holds its
        nonzeros alone; see :meth:`sparse_weights`.
        """
        if dtype is not None:
            check_dtype(dtype)
        model = cls._from_openai_checkpoint(
            read_openai(place, strict, tokenizer, progress, base_url)
        )
        if sparse_weights:
            hold_sparse(model)
        return model.to(device or "cpu", dtype)

    @classmethod
    def _from_openai_checkpoint(cls: type[Model], checkpoint: Checkpoint) -> Model:
        check_finite(checkpoint.tensors, checkpoint.origin)
        return cls.from_checkpoint(checkpoint, copy=False)  # just read, and nobody else's

    def to_openai(self, directory: str | Path, with_tokenizer: bool = True) -> None:
        """Write the model in openai/circuit_sparsity's format atomically.

        See :func:`tl_sparse.checkpoints.openai.write_openai` for the arguments and errors.
        """
        check_weights(self)
        write_openai(self.to_checkpoint(), directory, with_tokenizer)

    @classmethod
    def from_transformer_lens(cls: type[Model], model: Any) -> Model:
        """A model that computes what a HookedTransformer or TransformerBridge does.

        It holds copies of the weights, in eval mode, on the same device and in the same dtype, with
        the same tokenizer; hooks that both have hold the same activations. The two are run on
        random tokens and compared first, so a model that computes what its config does not tell is
        refused.

        Raises:
            TypeError: ``model`` is neither of the two.
            ValueError: its architecture is none that a SparseTransformer can have (the fields and
                their values are named), there are hooks on it, weights are NaN or infinite, or its
                logits are not reproduced.
        """
        if isinstance(model, FileMixin):  # below TransformerLens 4 it is a HookedTransformer too
            raise TypeError(
                "from_transformer_lens takes a HookedTransformer or a TransformerBridge, not a "
                f"{type(model).__name__}"
            )
        checkpoint = read_transformer_lens(model)
        check_weights(model)
        ours = cls.from_checkpoint(checkpoint).to(model.cfg.device)
        check_same_logits(model, ours)
        return ours

    @classmethod
    def from_transformer_lens_state_dict(
        cls: type[Model],
        state_dict: Mapping[str, Tensor] | str | Path,
        config: Any,
        tokenizer: Any = None,
    ) -> Model:
        """Load a HookedTransformer's state dict or .pth file, in eval mode.

        See :func:`tl_sparse.checkpoints.transformer_lens.read_state_dict` for arguments and errors.
        """
        checkpoint = read_state_dict(state_dict, config, tokenizer)
        model = cls.from_checkpoint(checkpoint)
        check_finite(checkpoint.tensors, checkpoint.origin)
        return model

    def to_transformer_lens(self) -> Any:
        """TransformerLens' own model that computes what this one does, with copies of its weights.

        See :func:`tl_sparse.checkpoints.transformer_lens.to_transformer_lens`.
        """
        check_weights(self)
        return to_transformer_lens(self.to_checkpoint())


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy tensors into a model, strictly: names and shapes must fit, and no value is rounded.

    The model takes the widest dtype among them. ``origin`` is where they come from, for messages.

    Raises:
        ValueError: tensors are missing, unexpected, of the wrong shape, or no plain floats.
    """
    check_tensors(tensors, model.state_dict(), origin)
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    nn.Module.to(model, widest)  # not the model's own, which warns of half precision: it is stored
    model.load_state_dict(dict(tensors), strict=True)


def assign_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], origin: str, copy: bool
) -> None:
    """Make tensors the weights of a model that has none yet (on ``"meta"``), strictly.

    The model takes the widest dtype among them. Each weight is a tensor of its own in memory, as
    after :func:`load_tensors`: what shares memory with another, or is a view of more, is copied.

    Raises:
        ValueError: tensors are missing, unexpected, of the wrong shape, or no plain floats.
    """
    check_tensors(tensors, model.state_dict(), origin)
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    taken: set[int] = set()
    state = {}
    for name, given in tensors.items():
        tensor = given.detach().to("cpu", widest)
        storage = tensor.untyped_storage()
        own = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        if (
            (copy and tensor.data_ptr() == given.data_ptr())
            or not own
            or storage.data_ptr() in taken
        ):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(tensor.untyped_storage().data_ptr())
        state[name] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():  # the biases of models without any, which no file has
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=widest)
    nn.Module.to(model, "cpu")
