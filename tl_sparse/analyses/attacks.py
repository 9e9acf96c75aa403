"""Attacks that a circuit predicts: long contexts and distractors.

Source: Gao et al. 2025, §3.2 and Figure 8.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.analyses.figures import dilution_figure, distractor_figure
from tl_sparse.analyses.runs import (
    CHUNK_PAIRS,
    Recorder,
    device_of,
    places,
    prompt_logit_diffs,
)
from tl_sparse.circuits import Circuit
from tl_sparse.node import Node, NodeName
from tl_sparse.sites import NodeIndex
from tl_sparse.storage.finite import check_weights
from tl_sparse.tasks import Split, TaskBatch, get
from tl_sparse.views.brief import brief
from tl_sparse.views.display import frame_html

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIZES = (3, 8, 13, 18, 23, 28, 33, 38, 43, 48, 53, 58, 63, 67)
"""Numbers of elements in Figure 8."""

_COMMENT = re.compile(r"""^# (\w+) [\[{'"] (\w+)\n""", re.MULTILINE)
_SECOND = re.compile(r"""\A(\w+ = (?:set\(\)|"")\n)(\w+) = (?:set\(\)|"")\n""")


@dataclass(frozen=True, eq=False)
class Dilution:
    """How well a task goes as its context grows, in the full model and in a circuit."""

    task: str
    """Name of the task."""
    examples: pd.DataFrame
    """A row per prompt and run: n (elements), run (``model`` or ``circuit``), pair, member (A or
    B), prompt, p_correct (of the right answer against the other), loss (nats), correct, and
    activation (the node's at the prompt's last token; NaN if none was asked for)."""
    refused: dict[int, str]
    """Sizes that do not fit the model's context, and why."""
    node: Node | None
    """The node whose activation was recorded."""
    split: Split
    """Whose names the prompts have."""
    seed: int
    """Seed of the prompts."""

    def __repr__(self) -> str:
        return brief(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per size, run and member: n, run, member, p_correct, loss, accuracy, activation,
        prompts. Figure 8 has the member whose list is nested (A of bracket_counting)."""
        grouped = self.examples.groupby(["n", "run", "member"], sort=False)
        return grouped.agg(
            p_correct=("p_correct", "mean"), loss=("loss", "mean"), accuracy=("correct", "mean"),
            activation=("activation", "mean"), prompts=("prompt", "size"),
        ).reset_index()  # fmt: skip

    def to_plotly(self) -> go.Figure:
        """Probability of the correct token against the number of elements, as in Figure 8, and
        beside it the node's activation if one was recorded."""
        node = None if self.node is None else str(self.node)
        return dilution_figure(self.task, self.to_dataframe(), node)

    def _repr_html_(self) -> str:
        line = f"sizes that do not fit: {', '.join(map(str, self.refused)) or 'none'}"
        return frame_html(f"Dilution: {self.task}", line, self.to_dataframe())


def dilution(
    model: nn.Module,
    task: str,
    sizes: Sequence[int] = SIZES,
    *,
    node: NodeName | None = None,
    circuit: Circuit | None = None,
    pairs: int = 64,
    split: Split = "held_out",
    seed: int = 0,
) -> Dilution:
    """Probability of the right answer, and a node's activation, against the number of elements.

    ``task`` is a built-in task with the variant ``dilution``. Run on the full model and, with
    ``circuit``, under the circuit's hooks. Prompts that do not fit the model's context are drawn
    again, and a size of which none fits is listed in ``refused``. Source: Gao et al. 2025, §3.2 and
    Figure 8 (the bracket's depth is an average over the context, so more elements dilute it).

    Raises:
        ValueError: unknown task, one without the variant, an unknown node, a circuit of another
            model, a model without tokenizer, or no size that fits.
    """
    tokenizer, n_ctx = _tokenizer(model)
    runs = _runs(model, circuit)
    node = None if node is None else Node(node).on(model)
    recorder = None if node is None else _recorder(model, node)
    get(task, tokenizer, n_ctx, variant="dilution")  # unknown names are refused, not listed
    frames, refused = [], {}
    with eval_mode(model):
        for n in sizes:
            posed = get(task, tokenizer, n_ctx, variant="dilution", n=n)
            try:
                batch = posed.batch(pairs, split=split, seed=seed)
            except ValueError as error:
                refused[n] = str(error)
                continue
            for run, hooks in runs:
                logit_diffs, activation = _measured(model, batch, hooks, recorder)
                frames.append(
                    _frame(batch, logit_diffs).assign(n=n, run=run, activation=activation)
                )
    if not frames:
        reason = next(iter(refused.values()), "none was given")
        raise ValueError(f"none of the sizes {', '.join(map(str, sizes))} fits: {reason}")
    columns = ["n", "run", "pair", "member", "prompt", "p_correct", "loss", "correct", "activation"]
    examples = pd.concat(frames, ignore_index=True)[columns]
    return Dilution(task, examples, refused, node, split, seed)


@dataclass(frozen=True, eq=False)
class Distractor:
    """What a distractor does to a task's answers, prompt by prompt."""

    task: str
    """Name of the task."""
    examples: pd.DataFrame
    """A row per prompt, condition and run: run (``model`` or ``circuit``), condition (``plain``;
    ``harmless``, the distractor's line without what distracts; ``distractor``), pair, member (A or
    B), prompt, p_correct (of the right answer against the other), loss (nats), correct."""
    split: Split
    """Whose names and templates the prompts have."""
    seed: int
    """Seed of the prompts."""

    def __repr__(self) -> str:
        return brief(self)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per run, condition and member (also ``both``): p_correct, loss, accuracy, success
        (share of prompts right when plain that are wrong now; NaN if none was right), prompts."""
        rows = []
        for run in self.examples["run"].unique():
            here = self.examples[self.examples["run"] == run]
            right = here[here["condition"] == "plain"]["correct"].to_numpy(bool)
            for condition in here["condition"].unique():
                rows += _summaries(here[here["condition"] == condition], right, run, condition)
        return pd.DataFrame(rows)

    def success_rate(self, run: str = "model", member: str = "both") -> float:
        """Share of prompts right when plain that the distractor makes wrong.

        Raises:
            ValueError: unknown run or member.
        """
        frame = self.to_dataframe()
        frame = frame[frame["condition"] == "distractor"]
        found = frame[(frame["run"] == run) & (frame["member"] == member)]
        if found.empty:
            raise ValueError(
                f"no results of run {run!r}, member {member!r}: choose from "
                f"{', '.join(frame['run'].unique())}, and A, B or both"
            )
        return float(found["success"].iloc[0])

    def to_plotly(self) -> go.Figure:
        """Probability of the right answer under each condition, by member and run."""
        return distractor_figure(self.task, self.examples)

    def _repr_html_(self) -> str:
        line = f"flips {self.success_rate():.1%} of the full model's right answers"
        return frame_html(f"Distractor: {self.task}", line, self.to_dataframe())


def distractor(
    model: nn.Module,
    task: str,
    *,
    circuit: Circuit | None = None,
    pairs: int = 128,
    split: Split = "held_out",
    seed: int = 0,
) -> Distractor:
    """Attack a task with its variant ``distractor`` and compare the same prompts without it.

    Each prompt is asked plain, with the distractor's line made harmless (a comment without its
    bracket or quote; a second variable that begins as a number), and with the distractor. Works on
    any TransformerLens model with a tokenizer; with ``circuit`` also under the circuit's hooks.
    Source: Gao et al. 2025, §3.2 (a `[` in a comment makes a flat list end as a nested one).

    Raises:
        ValueError: unknown task, one without the variant, a circuit of another model, a model
            without tokenizer, or prompts that do not fit its context.
    """
    tokenizer, n_ctx = _tokenizer(model)
    posed = get(task, tokenizer, n_ctx, variant="distractor")
    attacked = posed.batch(pairs, split=split, seed=seed)
    return distracted(
        model,
        task,
        rewritten(attacked, tokenizer, n_ctx, plain_prompt),
        attacked,
        harmless=rewritten(attacked, tokenizer, n_ctx, harmless_prompt),
        circuit=circuit,
        split=split,
        seed=seed,
    )


def distracted(
    model: nn.Module,
    name: str,
    plain: TaskBatch,
    attacked: TaskBatch,
    *,
    harmless: TaskBatch | None = None,
    circuit: Circuit | None = None,
    split: Split = "held_out",
    seed: int = 0,
) -> Distractor:
    """As :func:`distractor`, on prompts of your own, which correspond row by row.

    Raises:
        ValueError: batches that do not correspond, or a circuit of another model.
    """
    conditions = {"plain": plain, "harmless": harmless, "distractor": attacked}
    given = {key: batch for key, batch in conditions.items() if batch is not None}
    for key, batch in given.items():
        if batch.answers != plain.answers:
            raise ValueError(f"the {key} prompts do not correspond to the plain ones row by row")
    frames = []
    with eval_mode(model):
        for run, hooks in _runs(model, circuit):
            for key, batch in given.items():
                frame = _frame(batch, prompt_logit_diffs(model, batch, hooks))
                frames.append(frame.assign(run=run, condition=key))
    columns = ["run", "condition", "pair", "member", "prompt", "p_correct", "loss", "correct"]
    return Distractor(name, pd.concat(frames, ignore_index=True)[columns], split, seed)


def plain_prompt(prompt: str) -> str:
    """A prompt of a built-in ``distractor`` variant without the line that distracts.

    Raises:
        ValueError: there is no such line.
    """
    return _replaced(prompt, "", r"\1")


def harmless_prompt(prompt: str) -> str:
    """The same with the line kept and what distracts taken out of it: a comment without its bracket
    or quote, or a second variable that begins as 0.

    Raises:
        ValueError: there is no such line.
    """
    return _replaced(prompt, r"# \1 \2" + "\n", r"\1\2 = 0" + "\n")


def _replaced(prompt: str, comment: str, second: str) -> str:
    for pattern, text in ((_COMMENT, comment), (_SECOND, second)):
        if pattern.search(prompt):
            return pattern.sub(text, prompt, count=1)
    raise ValueError(f"no line that distracts in {prompt!r}")


def rewritten(
    batch: TaskBatch, tokenizer: Any, max_tokens: int, rewrite: Callable[[str], str]
) -> TaskBatch:
    """The batch with its prompts rewritten and its answers as they are.

    Raises:
        ValueError: a prompt has more than ``max_tokens`` tokens.
    """
    prompts = tuple(map(rewrite, batch.prompts))
    ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    longest = max(map(len, ids)) + 1
    if longest > max_tokens:
        raise ValueError(f"a rewritten prompt has {longest} tokens, more than {max_tokens}")
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    filler = bos if pad is None else pad
    rows = [[bos, *row, *[filler] * (longest - 1 - len(row))] for row in ids]
    last = torch.tensor([len(row) for row in ids])
    return replace(batch, tokens=torch.tensor(rows), last=last, prompts=prompts)


def _recorder(model: nn.Module, node: Node) -> Recorder:
    usual = NodeIndex.of(model).sites
    index = NodeIndex.of(model, (*usual, node.site) if node.site not in usual else usual)
    return Recorder(index, places(index, [node]), device_of(model))


@torch.no_grad()
def _measured(
    model: nn.Module, batch: TaskBatch, hooks: Sequence[FwdHook], recorder: Recorder | None
) -> tuple[Tensor, Any]:
    """Every prompt's logit_diff, and the recorded node at its last token."""
    if recorder is None:
        return prompt_logit_diffs(model, batch, hooks), np.nan
    logit_diffs, values = [], []
    for at in range(0, len(batch) // 2, CHUNK_PAIRS):
        part = batch.pairs(at, at + CHUNK_PAIRS)
        logit_diffs.append(task_logit_diffs(model, part, [*hooks, *recorder.hooks()]).cpu())
        taken = recorder.taken()[..., 0]
        values.append(taken.gather(1, part.last.to(taken.device)[:, None])[:, 0].cpu())
    return torch.cat(logit_diffs), torch.cat(values).numpy()


def _frame(batch: TaskBatch, logit_diffs: Float[Tensor, " prompt"]) -> pd.DataFrame:
    count = len(batch)
    return pd.DataFrame(
        {
            "pair": np.arange(count) // 2,
            "member": ["AB"[i % 2] for i in range(count)],
            "prompt": batch.prompts,
            "p_correct": logit_diffs.sigmoid().numpy(),
            "loss": torch.nn.functional.softplus(-logit_diffs).numpy(),
            "correct": (logit_diffs > 0).numpy(),
        }
    )


def _summaries(
    frame: pd.DataFrame, right_when_plain: np.ndarray, run: str, condition: str
) -> list[dict[str, Any]]:
    rows = []
    for member in ("both", "A", "B"):
        here = np.ones(len(frame), bool) if member == "both" else (frame["member"] == member).values
        part, could = frame[here], right_when_plain[here]
        fallen = could & ~part["correct"].to_numpy(bool)
        rows.append(
            {
                "run": run, "condition": condition, "member": member,
                "p_correct": part["p_correct"].mean(), "loss": part["loss"].mean(),
                "accuracy": part["correct"].mean(),
                "success": fallen.sum() / could.sum() if could.any() else np.nan,
                "prompts": len(part),
            }
        )  # fmt: skip
    return rows


def _runs(model: nn.Module, circuit: Circuit | None) -> list[tuple[str, list[FwdHook]]]:
    if circuit is None:
        check_weights(model)
        return [("model", [])]
    circuit.check_model(model)
    return [("model", []), ("circuit", circuit.hooks())]


def _tokenizer(model: Any) -> tuple[Any, int]:
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("the model has no tokenizer: there are no prompts for it")
    return model.tokenizer, model.cfg.n_ctx
