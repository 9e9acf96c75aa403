"""What a page shows of a circuit's nodes: tokens and logits, values on examples, where heads look,
what removing each does, and where in text it is most active."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import ActivationMeans
from tl_sparse.ablation.eval_mode import eval_mode
from tl_sparse.ablation.kinds import takes_sources
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_losses
from tl_sparse.ablation.recording import kept_activations
from tl_sparse.circuits.importance import ablation_importance
from tl_sparse.nodes import extreme_tokens, top_examples
from tl_sparse.nodes.tokens import token_text
from tl_sparse.sites import SITE, NodeIndex
from tl_sparse.tasks import Task, TaskBatch, get, names
from tl_sparse.views import CircuitTable, PageCircuit, PageExample
from tl_sparse.views.examples import TokenExample
from tl_sparse.views.page_circuit import no_tokens

EFFECT_PAIRS = 16  # pairs of prompts over which a removal's effect is averaged
BATCH = 64
BIGRAMS = 4


@runtime_checkable
class OnPage(Protocol):
    """A circuit, as far as a page needs to know it."""

    @property
    def task(self) -> str:
        """Name of its task."""
        ...

    @property
    def index(self) -> NodeIndex:
        """The nodes it was chosen from."""
        ...

    @property
    def kept(self) -> Bool[Tensor, " node"]:
        """Which are kept."""
        ...

    @property
    def means(self) -> ActivationMeans:
        """What the others are set to."""
        ...

    @property
    def groups(self) -> Int[Tensor, " node"] | None:
        """The component of every node, where there are any."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """How it was found."""
        ...

    @property
    def notes(self) -> Mapping[str, str]:
        """What was written of its nodes."""
        ...

    @property
    def seed(self) -> int:
        """Seed of its prompts; -1 if unknown."""
        ...

    @property
    def nodes(self) -> pd.DataFrame:
        """A row per kept node."""
        ...

    @property
    def component(self) -> Int[Tensor, " node"]:
        """The component of every node."""
        ...

    @property
    def model_fingerprint(self) -> str:
        """SHA-256 of its model."""
        ...

    def table(self) -> CircuitTable:
        """What a drawing is made from."""
        ...

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """The model computes the circuit inside the block."""
        ...

    def check_model(self, model: nn.Module) -> None:
        """ValueError for another model."""
        ...


def page_circuit(
    circuit: OnPage,
    model: nn.Module | None = None,
    task: Task | None = None,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    *,
    title: str = "circuit",
    pairs: int = 2,
    k: int = 4,
) -> PageCircuit:
    """A circuit with all that a page shows of it.

    Works on a SparseTransformer and any TransformerLens model. A circuit whose ablation depends on
    the prompts (resampling, frozen norms) gets no values "in the circuit" and no effects.

    Args:
        circuit: The circuit.
        model: Its model; without it only nodes, edges and notes are shown.
        task: Its task, for examples; found by its name if it is a built-in one.
        tokens: Text in which each node's top examples of either sign are looked for.
        title: What tells it from the task's other circuits, such as "sparse" or "dense".
        pairs: Pairs of held-out prompts that are shown.
        k: Top examples at either end.

    Raises:
        ValueError: another model than the circuit's, or a task or tokens without a model.
    """
    key = f"{circuit.model_fingerprint[:16]}/{circuit.task}/{int(circuit.kept.sum())}"
    shown = PageCircuit(circuit.table(), title, notes=dict(circuit.notes), key=key)
    if model is None:
        if task is not None or tokens is not None:
            raise ValueError("examples of a task or a text need the circuit's model: give model=")
        return shown
    circuit.check_model(model)
    task = task or known_task(circuit.task, model)
    with eval_mode(model), torch.no_grad():
        if task is not None:
            shown = replace(
                shown,
                examples=examples(circuit, model, task, pairs),
                effects=effects(circuit, model, task),
            )
        return replace(
            shown,
            tokens=tokens_of(circuit, model),
            texts={} if tokens is None else texts_of(circuit, model, tokens, k),
        )


def known_task(name: str, model: nn.Module) -> Task | None:
    """The built-in task of that name for a model; None if it is none, or has no tokenizer."""
    part: Any = model
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or name not in names():
        return None
    try:
        return get(name, tokenizer, part.cfg.n_ctx)
    except ValueError:  # the tokenizer splits one of the answers
        return None


def ids(nodes: pd.DataFrame) -> list[str]:
    """The page's ids of nodes."""
    columns = zip(nodes["layer"], nodes["site"], nodes["channel"], strict=True)
    return [f"{layer}.{site}.{channel}" for layer, site, channel in columns]


def fixed(circuit: OnPage) -> bool:
    """Whether the circuit's ablation is the same for all prompts."""
    kind = circuit.config.get("ablation")
    return not (circuit.config.get("freeze_norm") or (kind is not None and takes_sources(kind)))


def tokens_of(circuit: OnPage, model: nn.Module) -> pd.DataFrame:
    """Tokens that write the channels that the circuit reads, and logits that those it writes
    move."""
    nodes = circuit.nodes.assign(id=ids(circuit.nodes))
    kinds = nodes["site"].map(lambda name: SITE[name].kind if name in SITE else "")
    nodes = nodes[kinds == "residual"]
    part: Any = model
    if nodes.empty or getattr(part, "W_E", None) is None:
        return no_tokens()
    found = extreme_tokens(model, torch.tensor(nodes["channel"].unique()))
    found["text"] = found["text"].fillna("<" + found["token"].astype(str) + ">")
    frames = []
    for side, role, wanted, weight in (
        ("embedding", "writes", "reads", "weight"), ("logits", "reads", "writes", "effective"),
    ):  # fmt: skip
        members = nodes[nodes["site"].map(lambda name, w=wanted: getattr(SITE[name], w))]
        rows = found[found["role"] == role].drop(columns="weight" if weight != "weight" else [])
        merged = members[["id", "channel"]].merge(rows, on="channel")
        frames.append(pd.DataFrame({"node": merged["id"], "side": side, "text": merged["text"],
                                    "weight": merged[weight]}))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def examples(circuit: OnPage, model: nn.Module, task: Task, pairs: int) -> tuple[PageExample, ...]:
    """Held-out prompts: both answers' odds, every kept node's values, its heads' patterns."""
    batch = task.batch(pairs, split="held_out", seed=max(circuit.seed, 0))
    named, index, kept = circuit.table().nodes, circuit.index, circuit.kept
    rows = [circuit.nodes.index.get_loc(i) for i in named.index]
    single = named["head"].isna() | named["head_channel"].notna()
    shown = [(r, name) for r, name, one in zip(rows, ids(named), single, strict=True) if one]
    device = next(model.parameters()).device
    tokens = batch.tokens.to(device)
    whole = task_logit_diffs(model, batch).sigmoid().tolist()
    values = kept_activations(model, tokens, index, kept, BATCH)
    patterns = head_patterns(model, tokens, circuit.nodes)
    alone, inside = None, [None] * len(batch)
    if fixed(circuit):
        with circuit.applied(model):
            inside = task_logit_diffs(model, batch).sigmoid().tolist()
            alone = kept_activations(model, tokens, index, kept, BATCH)
    found = []
    for i in range(len(batch)):
        n = int(batch.last[i]) + 1
        answers = int(batch.correct_token[i]), int(batch.incorrect_token[i])
        found.append(
            PageExample(
                tokens=tuple(text(model, token) for token in batch.tokens[i, :n].tolist()),
                correct_token=text(model, answers[0]),
                incorrect_token=text(model, answers[1]),
                p_model=whole[i],
                p_circuit=inside[i],
                activations={name: values[r, i, :n].numpy() for r, name in shown},
                circuit_activations=None if alone is None else {
                    name: alone[r, i, :n].numpy() for r, name in shown
                },
                attention={name: x[i, :n, :n].numpy() for name, x in patterns.items()},
                bigram=bigram_adds(model, int(batch.tokens[i, n - 1]), answers),
            )
        )  # fmt: skip
    return tuple(found)


def bigram_adds(
    model: nn.Module, token: int, answers: tuple[int, int]
) -> tuple[tuple[str, float], ...]:
    """What the bigram table adds after a token: to the answers' logits, and to its highest."""
    part: Any = model
    if "bigram" not in part._modules:
        return ()
    adds = part.bigram.W_B[token].detach().float().cpu()
    most = dict.fromkeys([*answers, *adds.topk(min(BIGRAMS, len(adds))).indices.tolist()])
    return tuple((text(model, t), float(adds[t])) for t in most)


def text(model: nn.Module, token: int) -> str:
    """A token's text, or its id where it has none."""
    tokenizer = getattr(model, "tokenizer", None)
    words = None if tokenizer is None else token_text(tokenizer, token)
    return f"<{token}>" if words is None else words


def head_patterns(
    model: nn.Module, tokens: Int[Tensor, "prompt pos"], nodes: pd.DataFrame
) -> dict[str, Float[Tensor, "prompt query key"]]:
    """Attention patterns of the heads that have kept nodes, by the head's name ("L0H5")."""
    part: Any = model
    heads = nodes[nodes["head"].notna()][["layer", "head"]].drop_duplicates()
    wanted: dict[str, list[tuple[int, int]]] = {}
    for layer, head in heads.itertuples(index=False):
        wanted.setdefault(f"blocks.{layer}.attn.hook_pattern", []).append((layer, int(head)))
    found = {}

    def keep(x: Tensor, hook: Any) -> None:
        for layer, head in wanted[hook.name]:
            found[f"L{layer}H{head}"] = x[:, head].detach().float().clamp(0, 1).cpu()

    points = [(name, keep) for name in wanted if name in part.hook_dict]
    if points:
        part.run_with_hooks(tokens, return_type=None, fwd_hooks=points)
    return found


def effects(circuit: OnPage, model: nn.Module, task: Task) -> dict[str, float]:
    """What removing each node (or component) alone adds to the circuit's loss, in nats."""
    named = circuit.table().nodes
    if not fixed(circuit) or named.empty:
        return {}
    batch = task.batch(EFFECT_PAIRS, split="held_out", seed=max(circuit.seed, 0))
    device = next(model.parameters()).device
    with circuit.applied(model):
        rises = removal_effects(circuit, model, batch.to(device))
    return dict(zip(ids(named), rises[named.index.tolist()].tolist(), strict=True))


def removal_effects(circuit: OnPage, model: nn.Module, batch: TaskBatch) -> Float[Tensor, " node"]:
    """Of every kept node: the rise of the loss when its component is removed besides."""
    index, kept, values = circuit.index, circuit.kept.cpu(), circuit.means.values
    if circuit.groups is None:
        return ablation_importance(model, batch, index, values, keep=kept).scores.cpu()
    component = circuit.component
    members, place = component[kept].unique(return_inverse=True)
    keep = torch.cat([kept[None], kept & (component != members[:, None])])
    losses = masked_losses(model, batch, index, keep, values).cpu()
    rises = torch.zeros(index.n_nodes)
    rises[kept] = (losses[1:] - losses[0])[place]
    return rises


def texts_of(
    circuit: OnPage, model: nn.Module, tokens: Int[Tensor, "sequence pos"], k: int
) -> dict[str, dict[str, list[TokenExample]]]:
    """Node to its top examples of either sign in the text; none of whole heads."""
    nodes = circuit.table().nodes
    nodes = nodes[nodes["head"].isna() | nodes["head_channel"].notna()]
    if nodes.empty:
        return {}
    found = top_examples(  # in the order of the nodes
        model, tokens, circuit.nodes["name"][nodes.index].tolist(), k=k, quantiles=(),
        index=circuit.index, progress=False,
    )  # fmt: skip
    return {name: found.lists(i) for i, name in enumerate(ids(nodes))}
