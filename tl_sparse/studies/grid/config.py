"""What a study is: a grid of models, and the tasks and losses to prune them to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import tyro

from tl_sparse.circuits import PruningConfig
from tl_sparse.config import ActivationDensity, SparseTransformerConfig
from tl_sparse.data import CorpusConfig
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.sparsity.matrices import weight_matrices
from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.storage.json_dataclass import check_fields
from tl_sparse.tasks import check_names
from tl_sparse.training.config import TrainingConfig

L0Unit = Literal["nonzeros", "density"]
PAPER_TARGETS = (0.5, 0.35, 0.15, 0.05, 0.035, 0.015)
SPARSITY = SparsityConfig(floor=1, embedding_floor=4, lr_factor="normalised")


def base_model() -> SparseTransformerConfig:
    """Two layers; width, vocabulary and seed come from the grid."""
    return SparseTransformerConfig(
        n_layers=2,
        n_ctx=64,
        positional_embedding_type="sinusoidal_concat",
        d_pos=16,
        use_attention_sinks=True,
        bigram_table="frozen",
        activation_density=ActivationDensity.paper(0.5),
    )


def sparse_training() -> TrainingConfig:
    """The CPU recipe with one learning rate for every density at the end of training."""
    return TrainingConfig.recipe("cpu", lr=0.04, sparsity=SPARSITY)


def dense_training() -> TrainingConfig:
    """The CPU recipe without weight sparsity; its loss is measured often, to stop in time."""
    return TrainingConfig.recipe("cpu", steps=2400, lr=0.02, sparsity=None, eval_every=20)


@dataclass(frozen=True)
class Cell:
    """One setting of the grid."""

    width: int
    """d_model."""
    l0: float
    """Weight sparsity, in the unit of the study."""

    @property
    def name(self) -> str:
        """For folders and legends, such as ``d64-l8000``."""
        return f"d{self.width}-l{self.l0:g}"


@dataclass(frozen=True)
class StudyConfig:
    """Train a grid of sparse models and dense partners, prune them, and draw the paper's figures.

    Run again, it goes on where it stopped; several runs on one folder share the work; with a larger
    grid (and --overwrite, for the report) only what is new is done. It writes Figures 2, 3, 31 and
    32 of Gao et al. 2025 for your models.
    """

    out: tyro.conf.Positional[str]
    """Folder for models, circuits, tables (CSV) and report.html."""
    cache: str | None = None
    """Folder for the corpus; default the user's cache (or TL_SPARSE_CACHE)."""
    corpus: CorpusConfig = field(default_factory=lambda: CorpusConfig(idiom_share=0.5))
    """The text, the same for all models."""
    widths: tuple[int, ...] = (32, 64, 96)
    """Values of d_model."""
    l0: tuple[float, ...] = (4000.0, 8000.0, 16000.0)
    """Weight sparsities, each at every width."""
    l0_unit: L0Unit = "nonzeros"
    """nonzeros: that many weights of the blocks are not zero, the same number at every width (the
    paper's L0). density: that share of them."""
    embedding_nonzeros: int = 8
    """Nonzeros per token in embedding and unembedding, the same in all sparse models."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A sparse model of every setting is trained for each: it seeds weights and order of data."""
    compare: tuple[str, ...] = ()
    """Settings that get loss-matched dense partners, circuits at all of ``targets`` and attribution
    pruning, by name, such as d64-l8000; default the widest model with the middle L0."""
    dense_width: int | None = None
    """d_model of the dense partners; default half their sparse partner's. Wide ones reach the loss
    before they have learned the tasks."""
    model: SparseTransformerConfig = field(default_factory=base_model)
    """Architecture of all models; d_model, d_vocab and seed come from the grid."""
    training: TrainingConfig = field(default_factory=sparse_training)
    """The sparse runs; seed and density come from the grid."""
    dense_training: TrainingConfig = field(default_factory=dense_training)
    """The dense runs, which stop at their partner's validation loss."""
    tasks: tuple[str, ...] = ()
    """Tasks to prune for, where a model does them; default all."""
    compare_tasks: tuple[str, ...] = ()
    """Tasks to compare models on; one that does not do them all has no point in a figure. Default
    those that all compared models do."""
    target_loss: float = 0.15
    """Loss of the circuits by which settings are compared (Figures 3 and 32)."""
    targets: tuple[float, ...] = PAPER_TARGETS
    """Losses of the circuits of the settings in ``compare`` (Figures 2 and 31)."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """The search for a circuit; its target comes from ``target_loss`` and ``targets``."""
    mean_sequences: int = 512
    """Validation sequences over which removed nodes are averaged, and losses compared."""
    controls: int = 20
    """Random node sets beside each circuit (Figure 32)."""
    together: int = 8
    """Circuits of one model that are trained in shared forward passes."""

    draw_only: bool = False
    """Do no work: write tables and figures of what is finished."""

    def __post_init__(self) -> None:
        for name in ("widths", "l0", "seeds", "targets"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < 0:
                raise ValueError(f"{name}={values} must be one or more different numbers, none < 0")
        for name in ("embedding_nonzeros", "mean_sequences", "controls", "together"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_fields(self)
        check_names(self.tasks)
        check_names(self.compare_tasks, self.tasks)
        settings = [cell.name for cell in self.cells()]
        if unknown := sorted(set(self.compare) - set(settings)):
            raise ValueError(
                f"compare: unknown setting(s) {', '.join(unknown)}; choose from "
                f"{', '.join(settings)}"
            )
        if self.training.sparsity is None or self.dense_training.sparsity is not None:
            raise ValueError("training needs a sparsity, and dense_training none")
        if self.dense_training.stop_at_loss is not None:
            raise ValueError("dense_training.stop_at_loss is the partner's loss: leave it unset")
        for target in (self.target_loss, *self.targets):
            replace(self.pruning, target_loss=target)
        for cell in self.cells():
            self.sparsity(cell)

    def cells(self) -> tuple[Cell, ...]:
        """Every setting of the grid, widths within L0."""
        return tuple(Cell(width, l0) for l0 in self.l0 for width in self.widths)

    def compared(self) -> tuple[Cell, ...]:
        """The settings in ``compare``, or its default."""
        if not self.compare:
            return (Cell(max(self.widths), sorted(self.l0)[len(self.l0) // 2]),)
        return tuple(cell for cell in self.cells() if cell.name in self.compare)

    def targets_of(self, cell: Cell) -> tuple[float, ...]:
        """The losses to which circuits of a setting are pruned, largest first."""
        more = self.targets if cell in self.compared() else ()
        return tuple(sorted({self.target_loss, *more}, reverse=True))

    def architecture(
        self, cell: Cell, seed: int, d_vocab: int, dense: bool
    ) -> SparseTransformerConfig:
        """The architecture of a sparse model, or of its dense partner."""
        width = cell.width
        if dense:
            width = self.dense_width or max(2, width // 2)
        density = ActivationDensity() if dense else self.model.activation_density
        return replace(
            self.model, d_model=width, n_heads=None, d_mlp=None, d_vocab=d_vocab, seed=seed,
            activation_density=density,
        )  # fmt: skip

    def sparsity(self, cell: Cell) -> SparsityConfig:
        """The weight sparsity of a setting.

        Raises:
            ValueError: more weights than the width has, or more nonzeros per token than channels.
        """
        base = self.training.sparsity
        assert base is not None
        density = cell.l0
        if self.l0_unit == "nonzeros":
            # a vocabulary of any size: the blocks do not depend on it
            density = cell.l0 / block_weights(self.architecture(cell, 0, 2, dense=False))
        if not 0 < density <= 1:
            raise ValueError(
                f"l0={cell.l0:g} ({self.l0_unit}) at width {cell.width} is a density of "
                f"{density:.3g}, which must lie in (0, 1]"
            )
        if self.embedding_nonzeros > cell.width:
            raise ValueError(
                f"embedding_nonzeros={self.embedding_nonzeros} are more than the {cell.width} "
                "channels of the narrowest model"
            )
        return replace(
            base, density=density, embedding_density=self.embedding_nonzeros / cell.width
        )

    def sparse_run(self, cell: Cell, seed: int) -> TrainingConfig:
        """How a sparse model is trained."""
        return replace(self.training, seed=seed, sparsity=self.sparsity(cell))

    def dense_run(self, seed: int, goal: float) -> TrainingConfig:
        """How a dense partner is trained: until its loss is ``goal`` nats."""
        return replace(self.dense_training, seed=seed, stop_at_loss=goal)


@cache
def block_weights(architecture: SparseTransformerConfig) -> int:
    """How many weights the matrices of a model's blocks have."""
    matrices = weight_matrices(SparseTransformer(architecture))
    return sum(matrix.numel for matrix in matrices if matrix.role == "block")
