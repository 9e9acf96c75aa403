"""``Trainer``: one loop for sparse and dense models, one process or many, resumable to the bit."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.checkpoints.checkpoint import TrainingRecord
from tl_sparse.data import TokenizedCorpus, evenly_spaced, windows
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.progress import Bar, progress_bar
from tl_sparse.sparsity.matrices import WeightMatrix, weight_matrices
from tl_sparse.sparsity.projection import check_l0, final_budget, l0, project_all
from tl_sparse.storage.finite import check_weights
from tl_sparse.storage.locks import wait_for_lock
from tl_sparse.training import resume, train_step
from tl_sparse.training.config import TrainingConfig
from tl_sparse.training.objective import Moment, NextToken, Objective
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run measured."""

    metrics: pd.DataFrame
    """One row per logged step: step, tokens, loss, lr, density, validation_loss where taken, and
    the objective's columns."""
    record: TrainingRecord
    """What is stored with the model."""

    def __repr__(self) -> str:
        return brief(self)

    @property
    def validation_loss(self) -> float:
        """Last validation loss, nats per token."""
        return float(self.metrics["validation_loss"].dropna().iloc[-1])

    def to_dataframe(self) -> pd.DataFrame:
        """The metrics."""
        return self.metrics

    def _repr_html_(self) -> str:
        frame = self.metrics.dropna().reset_index(drop=True)
        return frame_html("Training", f"{len(frame)} steps with a validation loss", frame)


class Trainer:
    """Trains a SparseTransformer on a corpus (Gao et al. 2025, appendix A.2).

    Each step: learning rate and density of the step, next-token cross-entropy and its gradient,
    gradient rule, AdamW on all weights, top-k projection. Gradients and moments are never masked.
    Another ``objective`` may take the place of cross-entropy, and bring modules that are trained
    beside the model, with a gradient rule each of its own.

    With ``folder`` it writes metrics.jsonl, resumable checkpoints, and at the end the model; run
    again with the same arguments, it resumes from the last checkpoint exactly, unless ``restart``
    asks to begin anew. Interrupted by Ctrl-C, it ends the step and saves a checkpoint first. One
    run at a time works in a folder: another waits for it, and then goes on from what it left. What
    others put into the folder is left alone, or refused where a file of the run would go.
    """

    def __init__(
        self,
        model: SparseTransformer,
        corpus: TokenizedCorpus,
        config: TrainingConfig | None = None,
        folder: str | Path | None = None,
        *,
        objective: Objective | None = None,
        progress: bool = True,
        wandb_project: str | None = None,
        restart: bool = False,
    ) -> None:
        self.model, self.corpus, self.config = model, corpus, config or TrainingConfig()
        self.folder = None if folder is None else Path(folder)
        self.objective: Objective = objective or NextToken()
        self.companions = self.objective.companions
        self.progress, self.restart = progress, restart
        self.accelerator = train_step.make_accelerator()
        self.context = self.config.context or model.config.n_ctx
        train_step.check_run(
            model, corpus, self.config, self.context, self.accelerator.num_processes
        )
        self.model.to(self.accelerator.device)
        self.objective.start(self.accelerator.device)
        self.matrices = self.sparse_matrices()
        groups = self.objective.parameter_groups()
        self.optimizer = train_step.make_optimizer(model, self.config, groups)
        self.wandb = self.start_wandb(wandb_project)
        self.step = 0
        self.rows: list[dict[str, Any]] = []

    # ----------------------------------------------------------------------------------------------
    # the loop

    def train(self) -> TrainingResult:
        """Train (or go on training) to the last step; returns what was measured.

        Raises:
            ValueError: the folder holds a checkpoint of another run, has something else where the
                run would write, or cannot be locked; or weights are NaN or infinite to begin with.
            RuntimeError: the loss or a weight is no longer finite.
        """
        if self.folder is None:
            return self.run()
        with self.lock(self.folder):
            self.resume(self.folder)
            return self.run()

    def run(self) -> TrainingResult:
        """Train from the present step to the last, and save the model."""
        if self.step == 0 and any(p.requires_grad for p in self.model.parameters()):
            train_step.fill_bigram_table(self.model, self.corpus, self.config.bigram_smoothing)
        check_weights(self.model)
        model = self.distributed_model()
        self.model.train()
        bar = progress_bar(
            total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True,
            disable=not (self.progress and self.accelerator.is_main_process),
        )  # fmt: skip
        with bar, resume.interrupt_deferred() as interrupted:
            self.run_steps(model, bar, interrupted)
        self.model.eval()
        record = self.record()
        if self.folder is not None and self.accelerator.is_main_process:
            self.model.save_pretrained(self.folder / resume.MODEL, record)
            for name, companion in self.companions.items():
                companion.save_pretrained(self.folder / name)
        self.accelerator.wait_for_everyone()
        if self.wandb is not None:
            self.wandb.finish()
        return TrainingResult(pd.DataFrame(self.rows), record)

    def run_steps(self, model: nn.Module, bar: Bar, interrupted: threading.Event) -> None:
        """Steps until finished or interrupted, with metrics and checkpoints at their times."""
        config = self.config
        started, first = time.perf_counter(), self.step
        while not self.finished():
            measured = self.train_step(model)
            self.step += 1
            last = self.step == config.steps
            evaluates = last or self.step % config.eval_every == 0
            if evaluates or self.step % config.log_every == 0:
                row = self.measure(measured, evaluates)
                self.log(row)
                elapsed = time.perf_counter() - started
                rate = (self.step - first) * config.batch_size * self.context / elapsed
                bar.set_postfix_str(self.postfix(row, rate), refresh=False)
            bar.update(1)
            if self.finished() or self.step % config.save_every == 0 or interrupted.is_set():
                self.save_checkpoint()
            if interrupted.is_set():
                raise KeyboardInterrupt(f"training interrupted after step {self.step}")

    def finished(self) -> bool:
        """Whether the last step is taken, or ``stop_at_loss`` reached at the final density."""
        goal, row = self.config.stop_at_loss, self.rows[-1] if self.rows else None
        if self.step >= self.config.steps or goal is None or row is None:
            return self.step >= self.config.steps
        measured = row["validation_loss"] if row["step"] == self.step else None
        return measured is not None and measured <= goal and self.has_final_density()

    def has_final_density(self) -> bool:
        """Whether the weights are as sparse as they are to become."""
        sparsity, now = self.config.sparsity, (self.step, self.config.steps)
        return sparsity is None or (
            sparsity.density_at(*now) == sparsity.density
            and sparsity.embedding_density_at(*now) == sparsity.final_embedding_density
        )

    def train_step(self, model: nn.Module) -> dict[str, Float[Tensor, ""]]:
        """One optimiser step; returns what was measured on this process' sequences: the mean
        training loss, and what the objective adds."""
        config = self.config
        train_step.set_learning_rate(self.optimizer, config, self.step)
        measured = []
        batches = self.batch(self.step).chunk(config.accumulation)
        for index, tokens in enumerate(batches):
            syncs = index == len(batches) - 1
            moment = self.moment(index, len(batches))
            with nullcontext() if syncs else self.accelerator.no_sync(model):
                measured.append(self.objective.backward(model, tokens, moment))
        if not self.objective.is_loss_of_model:
            train_step.average_gradients(self.trained())
        for module in self.trained():
            train_step.apply_gradient_rule(module.parameters(), config.gradient)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if config.sparsity is not None:
            project_all(self.matrices, config.sparsity, self.step + 1, config.steps)
        if config.decay_after_projection:
            train_step.decay_matrices(self.optimizer, config)
        return {name: torch.stack([m[name] for m in measured]).mean() for name in measured[0]}

    def moment(self, part: int, parts: int) -> Moment:
        """Which backward pass of the present step it is."""
        config, process = self.config, self.accelerator.process_index
        autocast = partial(train_step.autocast, config.precision, self.accelerator.device)
        seed = (config.seed, self.step, part, process)
        return Moment(self.step, config.steps, seed, parts, autocast)

    def batch(self, step: int) -> Int[Tensor, "sequence pos"]:
        """This process' sequences of a step."""
        config, tokens = self.config, self.corpus.train
        starts = train_step.training_starts(
            config.seed, step, config.batch_size, len(tokens), self.context
        )
        mine = starts[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.sequences(tokens, mine)

    def sequences(self, tokens: np.ndarray, starts: np.ndarray) -> Int[Tensor, "sequence pos"]:
        """Windows of a token stream; the first token is BOS where the model expects one."""
        expects = self.model.config.default_prepend_bos and self.model.tokenizer is not None
        bos = self.model.tokenizer.bos_token_id if expects else None
        return windows(tokens, starts, self.context, bos).to(self.accelerator.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean next-token loss (nats) on fixed, evenly spaced validation sequences."""
        tokens = self.corpus.validation
        starts = evenly_spaced(self.config.eval_sequences, len(tokens), self.context)
        losses = []
        self.model.eval()
        for part in np.array_split(starts, math.ceil(len(starts) / 64)):
            with train_step.autocast(self.config.precision, self.accelerator.device):
                loss = self.model(
                    self.sequences(tokens, part), return_type="loss", loss_per_token=True
                )
            losses.append(loss.mean(-1))
        self.model.train()
        # every process measures the same; the mean makes it the same to the bit
        return float(self.accelerator.reduce(torch.cat(losses).mean(), "mean"))

    # ----------------------------------------------------------------------------------------------
    # parts

    def distributed_model(self) -> nn.Module:
        """The model itself, or wrapped to average gradients over processes."""
        if self.accelerator.num_processes == 1:
            return self.model
        if not self.objective.is_loss_of_model:
            train_step.share_weights(self.trained())
            return self.model
        wrapped = self.accelerator.prepare_model(self.model)
        self.matrices = self.sparse_matrices()  # wrapping gave the weights new storage
        return wrapped

    def trained(self) -> list[Any]:
        """What is trained: the model, and the objective's companions."""
        return [self.model, *self.companions.values()]

    def sparse_matrices(self) -> tuple[WeightMatrix, ...]:
        """The matrices to project, none for a dense model.

        Raises:
            ValueError: a budget is below its floors: now, not after an hour of annealing.
        """
        sparsity = self.config.sparsity
        if sparsity is None:
            return ()
        matrices = weight_matrices(self.model, biases=sparsity.sparse_biases)
        for matrix in matrices:
            final_budget(matrix, sparsity)
        return matrices

    def measure(self, measured: dict[str, Float[Tensor, ""]], evaluates: bool) -> dict[str, Any]:
        """The row of metrics of the step just taken.

        Raises:
            RuntimeError: the loss is not finite.
        """
        means = {name: float(self.accelerator.reduce(x, "mean")) for name, x in measured.items()}
        mean = means["loss"]
        if not math.isfinite(mean):
            raise RuntimeError(f"the training loss is {mean} at step {self.step}: lower lr, or use "
                               "gradient='normalise'")  # fmt: skip
        validation = self.validation_loss() if evaluates else None
        if validation is not None and not math.isfinite(validation):
            raise RuntimeError(f"the validation loss is {validation} at step {self.step}: lower "
                               "lr, or use gradient='normalise'")  # fmt: skip
        sparsity, step = self.config.sparsity, self.step
        return {
            "step": step,
            "tokens": step * self.config.batch_size * self.context,
            "loss": mean,
            "lr": self.config.lr_at(step - 1),
            "density": 1.0 if sparsity is None else sparsity.density_at(step, self.config.steps),
            "l0": sum(l0(self.matrices or weight_matrices(self.model)).values()),
            "validation_loss": validation,
            **{name: means.get(name) for name in self.objective.columns},
        }

    def postfix(self, row: dict[str, Any], rate: float) -> str:
        """What the progress bar says."""
        validation = [r["validation_loss"] for r in self.rows if r["validation_loss"] is not None]
        shown = f", val {validation[-1]:.3f}" if validation else ""
        return f"loss {row['loss']:.3f}{shown}, L0 {row['l0']:,}, {rate / 1000:.1f}k tok/s"

    def log(self, row: dict[str, Any]) -> None:
        """Keep a row, and append it to metrics.jsonl and wandb."""
        self.rows.append(row)
        if not self.accelerator.is_main_process:
            return
        if self.folder is not None:
            resume.append_metrics(self.folder, row)
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def start_wandb(self, project: str | None) -> Any:
        """A wandb run on the main process, if a project is named."""
        if project is None or not self.accelerator.is_main_process:
            return None
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"wandb_project={project!r} needs wandb: pip install 'tl-sparse[wandb]'"
            ) from error

        return wandb.init(project=project, config=self.description())

    def description(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed."""
        return {
            "training": asdict(self.config) | self.objective.description(),
            "model": self.model.config.to_dict(),
            "corpus": self.corpus.fingerprint,
        }

    def record(self) -> TrainingRecord:
        """The record saved with the model; its L0 is checked to be exact once density is final.

        Raises:
            RuntimeError: a weight is not finite, so that no such model is ever saved.
            ValueError: a matrix is over or under its budget.
        """
        for module in self.trained():
            train_step.check_finite(module, self.step)
        counts = l0(weight_matrices(self.model))
        if self.config.sparsity is not None and self.has_final_density():
            counts = check_l0(self.matrices, self.config.sparsity)
        validation = [r["validation_loss"] for r in self.rows if r["validation_loss"] is not None]
        return TrainingRecord(
            steps=self.step,
            tokens=self.step * self.config.batch_size * self.context,
            validation_loss=validation[-1] if validation else None,
            l0=counts,
            config=asdict(self.config) | self.objective.description(),
            corpus=self.corpus.fingerprint,
        )

    def save_checkpoint(self) -> None:
        """Write a checkpoint from which :meth:`train` resumes exactly."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        run, record = self.description(), self.record()
        parts = resume.Parts(self.model, self.optimizer, self.companions)
        resume.save_checkpoint(self.folder, self.step, run, parts, record)

    def resume(self, folder: Path) -> None:
        """Go on from the newest checkpoint of a folder, or begin there; its lock is held."""
        run, anew = self.description(), self.restart and self.step == 0
        names = tuple(self.objective.columns)
        resume.check_folder(folder, run, self.config.steps, anew, names)
        resume.check_companions(folder, tuple(self.companions))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            resume.clean(folder, tuple(self.companions))
            if anew:
                resume.remove_run(folder)
        self.accelerator.wait_for_everyone()
        parts = resume.Parts(self.model, self.optimizer, self.companions)
        found = resume.load_checkpoint(folder, run, parts)
        if found is not None:
            self.step, self.rows = found, resume.read_metrics(folder, found, names)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            resume.remove_older(folder, self.step, run)
            resume.write_metrics(folder, self.rows)

    @contextmanager
    def lock(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of a folder; the main process does it for all of this run."""
        if not self.accelerator.is_main_process:
            while not self.is_agreed(True):
                pass  # the main process waits between two attempts
            yield
            return
        path, progress = folder / resume.LOCK, self.progress
        with wait_for_lock(path, progress, self.is_agreed):
            yield

    def is_agreed(self, ready: bool) -> bool:
        """Whether every process of this run is ready."""
        if self.accelerator.num_processes == 1:
            return ready
        each = torch.tensor(float(ready), device=self.accelerator.device)
        return int(self.accelerator.reduce(each, "sum")) == self.accelerator.num_processes
