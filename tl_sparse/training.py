"""``Trainer``: one loop for sparse and dense models, one process or many, resumable to the bit."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_sparse.checkpoints import (
    TrainingRecord,
    atomic_folder,
    load_tensors,
    read_json,
    read_tensors,
    save_pretrained,
)
from tl_sparse.data import TokenizedCorpus, bigram_log_probs
from tl_sparse.matrices import weight_matrices
from tl_sparse.model import SparseTransformer
from tl_sparse.recipes import TrainingConfig
from tl_sparse.sparsity import check_l0, l0, project_all

METRICS, STATE, OPTIMIZER = "metrics.jsonl", "trainer.json", "optimizer.pt"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run measured."""

    metrics: pd.DataFrame
    """One row per logged step: step, tokens, loss, lr, density, and validation_loss where taken."""
    record: TrainingRecord
    """What is stored with the model."""

    @property
    def validation_loss(self) -> float:
        """Last validation loss, nats per token."""
        return float(self.metrics["validation_loss"].dropna().iloc[-1])

    def to_dataframe(self) -> pd.DataFrame:
        """The metrics."""
        return self.metrics

    def _repr_html_(self) -> str:
        return self.metrics.dropna().to_html(index=False)


class Trainer:
    """Trains a SparseTransformer on a corpus (Gao et al. 2025, appendix A.2).

    Each step: learning rate and density of the step, next-token cross-entropy and its gradient,
    gradient rule, AdamW on all weights, top-k projection. Gradients and moments are never masked.

    With ``folder`` it writes metrics.jsonl, resumable checkpoints, and at the end the model; run
    again with the same arguments, it resumes from the last checkpoint exactly. Interrupted by
    Ctrl-C, it saves a checkpoint first.
    """

    def __init__(
        self,
        model: SparseTransformer,
        corpus: TokenizedCorpus,
        config: TrainingConfig | None = None,
        folder: str | Path | None = None,
        *,
        progress: bool = True,
        wandb_project: str | None = None,
    ) -> None:
        self.model, self.corpus, self.config = model, corpus, config or TrainingConfig()
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self.accelerator = Accelerator()
        self.context = self.config.context or model.config.n_ctx
        self.validate()
        self.model.to(self.accelerator.device)
        self.matrices: tuple[Any, ...] = ()
        if self.config.sparsity is not None:
            self.matrices = weight_matrices(model, biases=self.config.sparsity.sparse_biases)
            # a budget below its floors is an error now, not after an hour of annealing
            last = self.config.steps
            project_check(self.matrices, self.config, last)
        self.optimizer = self.make_optimizer()
        self.wandb = self.start_wandb(wandb_project)
        self.step = 0
        self.rows: list[dict[str, Any]] = []

    def validate(self) -> None:
        """Refuse a run that cannot go well, before anything is touched."""
        for split in ("train", "validation"):
            if len(getattr(self.corpus, split)) < self.context + 1:
                raise ValueError(
                    f"the corpus' {split} part has {len(getattr(self.corpus, split))} tokens, "
                    f"fewer than one sequence of {self.context}; add text or lower context"
                )
        if self.context > self.model.config.n_ctx:
            raise ValueError(f"context={self.context} exceeds the model's n_ctx="
                             f"{self.model.config.n_ctx}")  # fmt: skip
        split_into = self.accelerator.num_processes * self.config.accumulation
        if self.config.batch_size % split_into:
            raise ValueError(
                f"batch_size={self.config.batch_size} must be a multiple of processes x "
                f"accumulation = {split_into}"
            )

    # ----------------------------------------------------------------------------------------------
    # the loop

    def train(self) -> TrainingResult:
        """Train (or go on training) to the last step; returns what was measured.

        Raises:
            RuntimeError: the loss is no longer finite.
        """
        if self.folder is not None and not self.resume():
            self.reset_metrics(keep_below=0)
        if self.step == 0:
            self.fill_bigram_table()
        model = self.distributed_model()
        self.model.train()
        bar = tqdm(
            total=self.config.steps, initial=self.step, unit="step", dynamic_ncols=True,
            disable=not (self.progress and self.accelerator.is_main_process),
        )  # fmt: skip
        try:
            self.run_steps(model, bar)
        except KeyboardInterrupt:
            self.save_checkpoint()
            raise
        finally:
            bar.close()
        self.model.eval()
        record = self.record()
        if self.folder is not None and self.accelerator.is_main_process:
            save_pretrained(self.model, self.folder / "model", record)
        self.accelerator.wait_for_everyone()
        return TrainingResult(pd.DataFrame(self.rows), record)

    def run_steps(self, model: nn.Module, bar: tqdm) -> None:
        config = self.config
        started, first = time.perf_counter(), self.step
        while self.step < config.steps:
            loss = self.train_step(model)
            self.step += 1
            last = self.step == config.steps
            if self.step % config.log_every == 0 or self.step % config.eval_every == 0 or last:
                row = self.measure(loss)
                if self.step % config.eval_every == 0 or last:
                    row["validation_loss"] = self.validation_loss()
                self.log(row)
                elapsed = time.perf_counter() - started
                rate = (self.step - first) * config.batch_size * self.context / elapsed
                bar.set_postfix_str(self.postfix(row, rate), refresh=False)
            bar.update(1)
            if self.step % config.save_every == 0 or last:
                self.save_checkpoint()

    def train_step(self, model: nn.Module) -> Float[Tensor, ""]:
        """One optimiser step; returns the mean training loss of this process' sequences."""
        config = self.config
        lr = config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr if group["sharkfin"] else config.plain_lr_at(self.step)
        losses = []
        batches = self.batch(self.step).chunk(config.accumulation)
        for index, tokens in enumerate(batches):
            syncs = index == len(batches) - 1
            with nullcontext() if syncs else self.accelerator.no_sync(model), self.autocast():
                loss = model(tokens, return_type="loss")
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        self.apply_gradient_rule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if config.sparsity is not None:
            project_all(self.matrices, config.sparsity, self.step + 1, config.steps)
        if config.decay_after_projection:
            self.decay(lr)
        return torch.stack(losses).mean()

    def batch(self, step: int) -> Int[Tensor, "sequence pos"]:
        """This process' sequences of a step: a function of seed and step alone."""
        rng = np.random.default_rng([self.config.seed, step])
        high = len(self.corpus.train) - self.context
        starts = rng.integers(0, high, self.config.batch_size)
        mine = starts[self.accelerator.process_index :: self.accelerator.num_processes]
        return self.sequences(self.corpus.train, mine)

    def sequences(self, tokens: np.ndarray, starts: np.ndarray) -> Int[Tensor, "sequence pos"]:
        """Windows of a token stream; the first token is BOS where the model expects one."""
        windows = tokens[starts[:, None] + np.arange(self.context)].astype(np.int64)
        if self.model.config.default_prepend_bos and self.model.tokenizer is not None:
            windows[:, 0] = self.model.tokenizer.bos_token_id
        return torch.from_numpy(windows).to(self.accelerator.device)

    def apply_gradient_rule(self) -> None:
        """Normalise, or clip, the root mean square over all gradients (§A.2, Fig. 16)."""
        if self.config.gradient == "none":
            return
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        total = torch.stack(torch._foreach_norm(grads)).norm()
        rms = total / math.sqrt(sum(g.numel() for g in grads))
        scale = 1.0 / (rms + 1e-5)
        torch._foreach_mul_(grads, scale.clamp(max=1.0) if self.config.gradient == "clip" else scale)

    @torch.no_grad()
    def decay(self, lr: float) -> None:
        decayed = [p for p in self.optimizer.param_groups[0]["params"] if p.requires_grad]
        torch._foreach_mul_(decayed, 1.0 - lr * self.config.weight_decay)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean next-token loss (nats) on fixed, evenly spaced validation sequences."""
        high = len(self.corpus.validation) - self.context
        starts = np.unique(np.linspace(0, high, self.config.eval_sequences).astype(np.int64))
        losses = []
        self.model.eval()
        for part in np.array_split(starts, math.ceil(len(starts) / 64)):
            with self.autocast():
                tokens = self.sequences(self.corpus.validation, part)
                losses.append(self.model(tokens, return_type="loss", loss_per_token=True).mean(-1))
        self.model.train()
        return float(torch.cat(losses).mean())

    # ----------------------------------------------------------------------------------------------
    # parts

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW; matrices decay, other parameters do not, a learned bigram table keeps a plain lr."""
        config = self.config
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        table = [p for n, p in trained.items() if n.endswith("W_B")]
        matrices = [p for n, p in trained.items() if ".W_" in n and not n.endswith("W_B")]
        chosen = {id(p) for p in [*table, *matrices]}
        rest = [p for p in trained.values() if id(p) not in chosen]
        decay = 0.0 if config.decay_after_projection else config.weight_decay
        groups = [
            {"params": matrices, "weight_decay": decay, "sharkfin": True},
            {"params": rest, "weight_decay": 0.0, "sharkfin": True},
            # under the 1/sqrt(L0) factor a learned table grows without bound
            {"params": table, "weight_decay": 0.0, "sharkfin": False},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, eps=config.eps,
            betas=(config.beta1, config.beta2), fused=True,
        )  # fmt: skip

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where asked for, or by default on a CUDA GPU that has it."""
        device = self.accelerator.device.type
        wanted = self.config.precision
        if wanted == "auto":
            wanted = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        return torch.autocast(device, torch.bfloat16) if wanted == "bf16" else nullcontext()

    def distributed_model(self) -> nn.Module:
        """The model itself, or wrapped to average gradients over processes."""
        if self.accelerator.num_processes == 1:
            return self.model
        return self.accelerator.prepare_model(self.model)

    def fill_bigram_table(self) -> None:
        """Put smoothed corpus log-probabilities into an empty bigram table."""
        if self.model.config.bigram_table == "none" or bool(self.model.bigram.W_B.any()):
            return
        table = bigram_log_probs(self.corpus, self.config.bigram_smoothing)
        with torch.no_grad():
            self.model.bigram.W_B[: len(table), : len(table)] = table.to(self.model.W_E.device)

    def measure(self, loss: Tensor) -> dict[str, Any]:
        mean = float(self.accelerator.reduce(loss, "mean"))
        if not math.isfinite(mean):
            raise RuntimeError(f"the training loss is {mean} at step {self.step}: lower lr, or use "
                               "gradient='normalise'")  # fmt: skip
        sparsity, step, steps = self.config.sparsity, self.step, self.config.steps
        return {
            "step": step,
            "tokens": step * self.config.batch_size * self.context,
            "loss": mean,
            "lr": self.config.lr_at(step - 1),
            "density": 1.0 if sparsity is None else sparsity.density_at(step, steps),
            "l0": sum(l0(self.matrices or weight_matrices(self.model)).values()),
            "validation_loss": None,
        }

    def postfix(self, row: dict[str, Any], rate: float) -> str:
        validation = [r["validation_loss"] for r in self.rows if r["validation_loss"] is not None]
        shown = f", val {validation[-1]:.3f}" if validation else ""
        return f"loss {row['loss']:.3f}{shown}, L0 {row['l0']:,}, {rate / 1000:.1f}k tok/s"

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self.accelerator.is_main_process:
            return
        if self.folder is not None:
            with (self.folder / METRICS).open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def start_wandb(self, project: str | None) -> Any:
        if project is None or not self.accelerator.is_main_process:
            return None
        import wandb

        return wandb.init(project=project, config=self.description())

    def description(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed."""
        return {
            "training": asdict(self.config),
            "model": self.model.config.to_dict(),
            "corpus": self.corpus.fingerprint,
        }

    def record(self) -> TrainingRecord:
        """The record saved with the model; its L0 is checked to be exact at the end of a run."""
        counts = l0(weight_matrices(self.model))
        if self.config.sparsity is not None and self.step == self.config.steps:
            counts = check_l0(self.matrices, self.config.sparsity)
        validation = [r["validation_loss"] for r in self.rows if r["validation_loss"] is not None]
        return TrainingRecord(
            steps=self.step,
            tokens=self.step * self.config.batch_size * self.context,
            validation_loss=validation[-1] if validation else None,
            l0=counts,
            config=asdict(self.config),
            corpus=self.corpus.fingerprint,
        )

    # ----------------------------------------------------------------------------------------------
    # checkpoints

    def save_checkpoint(self) -> None:
        """Write a checkpoint from which :meth:`train` resumes exactly; older ones go afterwards."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        target = self.folder / f"{PREFIX}{self.step:08d}"
        with atomic_folder(target) as work:
            save_pretrained(self.model, work / "model", self.record())
            torch.save(self.optimizer.state_dict(), work / OPTIMIZER)
            state = {
                "step": self.step,
                "tl_sparse_version": version("tl-sparse"),
                "run": self.description(),
            }
            (work / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for old in self.checkpoints():
            if old != target:
                shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints in the folder, oldest first."""
        assert self.folder is not None
        return sorted(path for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())

    def resume(self) -> bool:
        """Load the newest checkpoint of the folder, if there is one.

        Raises:
            ValueError: it comes from another run: model, training or corpus differ.
        """
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.checkpoints()
        if not found:
            return False
        state = read_json(found[-1] / STATE)
        mine = json.loads(json.dumps(self.description()))
        differing = [key for key in mine if state["run"].get(key) != mine[key]]
        if differing:
            raise ValueError(
                f"{found[-1]} belongs to another run (its {', '.join(differing)} differs): use "
                "another folder, or delete it"
            )
        load_tensors(self.model, read_tensors(found[-1] / "model" / "model.safetensors"),
                     str(found[-1]))  # fmt: skip
        path = found[-1] / OPTIMIZER
        device = self.accelerator.device
        self.optimizer.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        self.step = state["step"]
        if self.accelerator.is_main_process:
            self.reset_metrics(keep_below=self.step)
        return True

    def reset_metrics(self, keep_below: int) -> None:
        """Drop logged rows that lie after the step from which the run goes on."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # a killed process can leave half a line behind
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self.rows = [row for row in rows if row["step"] <= keep_below]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(scratch, path)


def project_check(matrices: tuple[Any, ...], config: TrainingConfig, step: int) -> None:
    """Raise now if a matrix' final budget lies below its floors."""
    from tl_sparse.sparsity import n_kept

    sparsity = config.sparsity
    assert sparsity is not None
    for matrix in matrices:
        if matrix.role == "block":
            n_kept(matrix, sparsity.density, sparsity.floor)
        else:
            floor = sparsity.embedding_floor if matrix.role == "embedding" else 0
            n_kept(matrix, sparsity.final_embedding_density, floor)
