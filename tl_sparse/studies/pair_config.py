"""What a loss-matched pair is: its two models, the third that is bridged to the dense one, and what
was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from tl_sparse.bridges import BridgeTrainingConfig
from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.data import CorpusConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.projection import SparsityConfig, constant_sparsity
from tl_sparse.storage.json_dataclass import check_fields
from tl_sparse.studies.trained import Kind
from tl_sparse.tasks import TaskResult
from tl_sparse.training.config import TrainingConfig
from tl_sparse.views.brief import brief
from tl_sparse.views.display import fields_html

StoredDtype = Literal["fp32", "bf16", "fp16"]
PairRecipe = Literal["first", "second", "accelerator"]

DTYPES: dict[StoredDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def sparse_model() -> SparseTransformerConfig:
    """The sparse model that ships."""
    return SparseTransformerConfig(
        n_layers=2,
        d_model=128,
        n_ctx=64,
        d_vocab=1024,
        positional_embedding_type="sinusoidal_concat",
        d_pos=16,
        use_attention_sinks=True,
        bigram_table="frozen",
        activation_density=ActivationDensity.paper(0.25),
    )


def dense_model() -> SparseTransformerConfig:
    """The dense model that ships: half as wide, without AbsTopK."""
    return replace(
        sparse_model(), d_model=64, n_heads=None, d_mlp=None, activation_density=ActivationDensity()
    )


def sparse_training() -> TrainingConfig:
    """The CPU recipe, three times as long."""
    return TrainingConfig.recipe("cpu", steps=4800)


def dense_training() -> TrainingConfig:
    """The CPU recipe without weight sparsity; its loss is measured often, to stop in time.

    Equal loss does not mean equal skill: wide models reach it on rare words before they have
    learned the tasks. With a high learning rate that has mostly decayed by then they have learned
    more of them.
    """
    return TrainingConfig.recipe("cpu", steps=1600, lr=0.02, sparsity=None, eval_every=20)


def bridged_training() -> TrainingConfig:
    """The trained sparse model's further run, with its bridges: all weights that it may have, now
    and to the end."""
    sparsity = constant_sparsity(1 / 16, floor=4, embedding_floor=4)
    return TrainingConfig.recipe("cpu", steps=5000, lr=0.003, eval_every=500, sparsity=sparsity)


def bridging() -> BridgeTrainingConfig:
    """What the bridged model is trained for: every loss, all five sites in every step."""
    return BridgeTrainingConfig(tail_share=0.4)


@dataclass(frozen=True)
class PairConfig:
    """Train a sparse model, a dense one that stops at its validation loss, and perhaps bridges.

    The defaults are the recipe of the models that ship with this package. Run again with the same
    options, an interrupted training resumes exactly, and a finished one is not repeated: trained
    models are kept in the cache.
    """

    out: str
    """Folder for the models, each in a subfolder with its model card."""
    name: str = "python"
    """What the models are called: NAME-sparse and NAME-dense, and NAME-sparse-seed1 and so on for
    every seed after the first."""
    seeds: tuple[int, ...] = (0, 1)
    """A pair is trained for each: it seeds the initial weights and the order of the data."""
    cache: str | None = None
    """Folder for corpus and checkpoints; default the user's cache (or TL_SPARSE_CACHE)."""
    corpus: CorpusConfig = field(default_factory=lambda: CorpusConfig(idiom_share=0.5))
    """The text, the same for every seed. Its own seed is best left 0: the tasks' held-out code is
    what a corpus of seed 0 holds out."""
    sparse: SparseTransformerConfig = field(default_factory=sparse_model)
    """The sparse model; d_vocab is taken from the corpus, the seed from ``seeds``."""
    dense: SparseTransformerConfig = field(default_factory=dense_model)
    """The dense model, likewise."""
    sparse_training: TrainingConfig = field(default_factory=sparse_training)
    """The sparse run; its seed is taken from ``seeds``."""
    dense_training: TrainingConfig = field(default_factory=dense_training)
    """The dense run, likewise; it stops at the sparse model's loss."""
    bridged: bool = False
    """Whether a third model is trained: the first seed's sparse one, trained on together with
    bridges to its dense partner. It is called NAME-bridged, its bridges NAME-bridges."""
    bridged_training: TrainingConfig = field(default_factory=bridged_training)
    """The bridged run; its weights must be as few as the sparse model's, from the start."""
    bridging: BridgeTrainingConfig = field(default_factory=bridging)
    """The bridged run's losses, and what of them is computed in a step."""
    dtype: StoredDtype = "fp16"
    """Type in which the weights are stored."""
    pairs: int = 128
    """Held-out prompt pairs per task."""
    target_loss: float = 0.15
    """Held-out loss below which a model counts as solving a task."""
    recipe: PairRecipe = "first"
    """The recipe that the other options start from on the command line (``pair_recipe`` gives it in
    Python): first, of the models that ship; second, of longer runs on text with more idioms, and
    bridged; accelerator, the second's in larger batches and many more steps, for a GPU."""

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"name={self.name!r} must be usable as the name of a folder")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={self.seeds} must be different integers of at least 0")
        check_fields(self)
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be at least 1")
        if not self.target_loss > 0:
            raise ValueError(f"target_loss={self.target_loss} must be positive")
        if self.sparse_training.sparsity is None or self.dense_training.sparsity is not None:
            raise ValueError("sparse_training needs a sparsity, and dense_training none")
        final, further = self.sparse_training.sparsity, self.bridged_training.sparsity
        if self.bridged and (further is None or further != _constant(final)):
            raise ValueError(
                "bridged_training.sparsity must be sparse_training's final one from the start: "
                f"{_constant(final)}"
            )
        if self.dense_training.stop_at_loss is not None:
            raise ValueError(
                "dense_training.stop_at_loss is the sparse model's loss: leave it unset"
            )
        self._check_same_text("n_ctx", self.sparse, self.dense)
        for name in ("context", "eval_sequences"):
            self._check_same_text(name, self.sparse_training, self.dense_training, "_training")

    @staticmethod
    def _check_same_text(name: str, sparse: Any, dense: Any, suffix: str = "") -> None:
        """ValueError if the two models' losses are not measured on the same text."""
        one, other = getattr(sparse, name), getattr(dense, name)
        if one != other:
            raise ValueError(
                f"sparse{suffix}.{name}={one} and dense{suffix}.{name}={other} differ, so the two "
                "losses could not be compared"
            )

    def model(self, kind: Kind, seed: int, d_vocab: int) -> SparseTransformerConfig:
        """The architecture of one model."""
        chosen = self.sparse if kind == "sparse" else self.dense
        return replace(chosen, d_vocab=d_vocab, seed=seed)

    def training(self, kind: Kind, seed: int, goal: float | None = None) -> TrainingConfig:
        """The run of one model; it stops at the loss ``goal``, if there is one."""
        if kind == "sparse":
            return replace(self.sparse_training, seed=seed)
        return replace(self.dense_training, seed=seed, stop_at_loss=goal)

    @property
    def bridged_name(self) -> str:
        """Name of the bridged model."""
        return f"{self.name}-bridged"

    @property
    def bridges_name(self) -> str:
        """Name of its bridges' folder."""
        return f"{self.name}-bridges"

    def model_name(self, kind: Kind, seed: int) -> str:
        """Name of one model, and of its folder."""
        return f"{self.name}-{kind}" + ("" if seed == self.seeds[0] else f"-seed{seed}")


def _constant(sparsity: SparsityConfig) -> SparsityConfig:
    return constant_sparsity(
        sparsity.density, sparsity.floor, sparsity.embedding_density, sparsity.embedding_floor,
        sparsity.sparse_biases,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PairMember:
    """One model of a pair, as stored, with what was measured of it."""

    name: str
    """Name of its folder."""
    kind: Kind
    """``sparse`` or ``dense``."""
    model: SparseTransformer
    """The model as loaded from that folder, in eval mode."""
    record: TrainingRecord
    """How it came to be, with the validation loss that its training ended with."""
    stored_loss: float
    """Validation loss of the stored weights on the same text, nats per token."""
    tasks: Mapping[str, TaskResult]
    """Held-out results of the stored weights on every task."""
    hours: float
    """Time that its training took; NaN where that is not known."""
    machine: str
    """What it was trained on, in words."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    def solved(self, target_loss: float) -> tuple[str, ...]:
        """Tasks with a held-out loss below the target, best first."""
        ranked = sorted(self.tasks, key=lambda task: self.tasks[task].loss)
        return tuple(task for task in ranked if self.tasks[task].loss < target_loss)


@dataclass(frozen=True, eq=False)
class Pair:
    """A sparse and a dense model of equal validation loss."""

    seed: int
    """Seed of the weights and the data order of both."""
    sparse: PairMember
    """The sparse model."""
    dense: PairMember
    """The dense model."""

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return fields_html(self)

    @property
    def members(self) -> tuple[PairMember, PairMember]:
        """Sparse, then dense."""
        return self.sparse, self.dense

    def solved(self, target_loss: float) -> tuple[str, ...]:
        """Tasks with a held-out loss below the target in both, best first by the worse one."""
        worse = {t: max(m.tasks[t].loss for m in self.members) for t in self.sparse.tasks}
        ranked = sorted(worse, key=worse.__getitem__)
        return tuple(task for task in ranked if worse[task] < target_loss)
