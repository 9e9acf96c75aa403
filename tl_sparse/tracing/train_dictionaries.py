"""``train_dictionaries``: SAEs and transcoders of a model, trained by the package's own Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tl_sparse.ablation.eval_mode import frozen
from tl_sparse.data import TokenizedCorpus
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.tracing.dictionary import Dictionary
from tl_sparse.tracing.dictionary_config import (
    DictionaryTrainingConfig,
    Place,
    dictionary_run,
    places,
)
from tl_sparse.tracing.learned import LearnedDictionary
from tl_sparse.tracing.objective import MEASURED, DictionaryObjective, activations_at
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.trainer import Trainer, TrainingResult
from tl_sparse.views.display import frame_html


@dataclass(frozen=True, repr=False)
class TrainedDictionaries:
    """Dictionaries, and what was measured while they were trained."""

    dictionaries: tuple[Dictionary, ...]
    """One for each place, ready for a ``Splice``; features that were dead at the end are left
    out."""
    training: TrainingResult
    """The run; its metrics have ``fvu``, ``l0`` and ``dead`` of every place."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per dictionary: what it is, the error over the variance (fvu), active features per
        token (l0) and share of dead features (dead), of the last logged batch."""
        last = self.training.metrics.iloc[-1]
        return pd.DataFrame(
            {
                "dictionary": each.name,
                "hook_in": each.hook_in,
                "hook_out": each.hook_out,
                "features": each.d_sae,
                **{name: float(last[f"{name}/{each.hook_out}"]) for name in MEASURED},
            }
            for each in self.dictionaries
        )

    def __repr__(self) -> str:
        total = sum(each.d_sae for each in self.dictionaries)
        return f"TrainedDictionaries({len(self.dictionaries)} dictionaries, {total:,} features)"

    def _repr_html_(self) -> str:
        return frame_html("Dictionaries", repr(self), self.to_dataframe())


def train_dictionaries(
    model: SparseTransformer,
    corpus: TokenizedCorpus,
    chosen: Sequence[Place] | None = None,
    config: DictionaryTrainingConfig | None = None,
    training: TrainingConfig | None = None,
    folder: str | Path | None = None,
    *,
    progress: bool = True,
    restart: bool = False,
) -> TrainedDictionaries:
    """Train sparse autoencoders and transcoders of a model, whose weights stay as they are.

    All of them see the same text, at once. It is a run of :class:`~tl_sparse.Trainer`: checkpoints
    in ``folder``, exact resume, bf16 and several processes are the same.

    Args:
        model: A SparseTransformer; ``SparseTransformer.from_transformer_lens`` makes one of a
            TransformerLens model. (SAEs of other models can be trained by SAELens, and read with
            :func:`read_dictionary`.)
        corpus: Text in the model's tokenizer.
        chosen: Where; by default :func:`places`.
        config: What for.
        training: The run; by default :func:`dictionary_run`. Without sparsity.
        folder: Where it is kept, and resumed from.
        progress: Show a progress bar.
        restart: Begin anew in a folder with an earlier run.

    Raises:
        TypeError: the model is no SparseTransformer.
        ValueError: a hook that the model does not have, two dictionaries at one hook, settings that
            do not fit, or as ``Trainer.train``.
        RuntimeError: as ``Trainer.train``.

    Source: Ge et al. 2024 (arXiv 2405.13868), §2, equations 1 and 2 (the y of the second is the
    MLP's output at the same token).
    """
    if not isinstance(model, SparseTransformer):
        raise TypeError(
            f"dictionaries are trained on a SparseTransformer, not on a {type(model).__name__}: "
            "SparseTransformer.from_transformer_lens makes one of a TransformerLens model"
        )
    training, config = training or dictionary_run(), config or DictionaryTrainingConfig()
    if training.sparsity is not None:
        raise ValueError("the model's weights stay as they are: give a TrainingConfig with "
                         "sparsity=None")  # fmt: skip
    chosen = places(model) if chosen is None else tuple(chosen)
    check_places(model, chosen)
    example = torch.zeros(1, 2, dtype=torch.long, device=model.W_E.device)
    with torch.no_grad():
        seen = activations_at(model, example, chosen)
    if flat := sorted(hook for hook, x in seen.items() if x.ndim != 3):
        raise ValueError(f"{flat[0]} has another shape than [batch, pos, channel]")
    objective = DictionaryObjective(
        model, chosen, {h: x.shape[-1] for h, x in seen.items()}, config
    )
    with frozen(model):
        trainer = Trainer(model, corpus, training, folder, objective=objective, progress=progress,
                          restart=restart)  # fmt: skip
        result = trainer.train()
    made = {
        "trained_by": "tl_sparse", "model": objective.of, "steps": result.record.steps,
        "tokens": result.record.tokens, "corpus": corpus.fingerprint,
    }  # fmt: skip
    return TrainedDictionaries(
        tuple(dictionary_of(each, made) for each in objective.learned.dictionaries), result
    )


def dictionary_of(learned: LearnedDictionary, metadata: dict[str, object]) -> Dictionary:
    """A dictionary as it is used, from one in training."""
    weights: dict[str, Any] = dict(learned.weights())
    place, settings = learned.place, asdict(learned.config) | {"k": learned.k}
    return Dictionary(
        hook_in=place.hook_in, hook_out=place.hook_out, activation=learned.config.activation,
        k=learned.k if learned.config.activation == "batchtopk" else None,
        metadata=metadata | {"training": settings}, **weights,
    )  # fmt: skip


def check_places(model: SparseTransformer, chosen: Sequence[Place]) -> None:
    """ValueError unless every place is one of the model's hooks, and none is taken twice."""
    if not chosen:
        raise ValueError("no places for dictionaries")
    for place in chosen:
        for hook in (place.hook_in, place.hook_out):
            if hook not in model.hook_dict:
                raise ValueError(f"the model has no hook {hook}; places(model) are those usual")
    outs = [place.hook_out for place in chosen]
    if double := sorted({hook for hook in outs if outs.count(hook) > 1}):
        raise ValueError(f"two dictionaries at {double[0]}")
