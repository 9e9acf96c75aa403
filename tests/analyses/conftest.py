"""Circuits that are known without pruning, in the hand-written models of the circuits' tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.known_circuits import ANSWERS, MARKS


@pytest.fixture
def circuit_of(random_tokens: Any) -> Callable[..., Any]:
    """``circuit_of(model, task, nodes)``: the circuit of those nodes, all others at their means."""

    def build(model: Any, task: Any, nodes: Any) -> Any:
        from tl_sparse.ablation import activation_means
        from tl_sparse.circuits import PruningConfig
        from tl_sparse.circuits.pruning_run import build_circuit, set_up

        means = activation_means(model, random_tokens)
        config = PruningConfig(
            headroom=0.0, target_loss=0.6, steps=8, selection_pairs=16, report_pairs=16
        )
        problem = set_up(model, task, config, means=means)
        kept = torch.zeros(means.index.n_nodes, dtype=torch.bool)
        for layer, site, channel in nodes:
            kept[means.index.slices[means.index.hook(layer, site)].start + channel] = True
        return build_circuit(problem, kept, kept.float(), n_active=int(kept.sum()))

    return build


@pytest.fixture
def chain(planted: Any, marks: Any, circuit_of: Any) -> tuple[Any, Any, Any]:
    """The planted model, its task, and the circuit of exactly the chain's six nodes."""
    model, nodes = planted()
    return model, marks, circuit_of(model, marks, nodes)


@pytest.fixture
def last_word(words: Any) -> Any:
    """The task: w3 follows w5, and w4 follows w6."""
    from tl_sparse.tasks import Task, task

    @task(answers=(" w3", " w4"), source="test")
    def last(rng, split):
        """Whether the last word is w5 or w6."""
        low, high = (20, 25) if split == "train" else (25, 30)
        filler = " ".join(f"w{rng.randrange(low, high)}" for _ in range(rng.randint(3, 7)))
        return tuple(f"{filler} w{mark}" for mark in MARKS)

    return Task.bind(last, words, max_tokens=12)


@pytest.fixture
def two_valued(words: Any, last_word: Any, circuit_of: Any) -> tuple[Any, Any, Any]:
    """A model, a task and a circuit of three nodes, each with two values over all tokens.

    A token's stream channel 0 is 12 for w5 and -12 for all others; one neuron carries it on to
    channel 2, which the unembedding reads. Nothing else is read.
    """
    from tl_sparse.config import SparseTransformerConfig
    from tl_sparse.model.transformer import SparseTransformer

    config = SparseTransformerConfig(
        n_layers=1, d_model=8, d_head=4, n_heads=2, d_mlp=12, n_ctx=12, d_vocab=30
    )
    model = SparseTransformer(config, words).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln" not in name:
                parameter.zero_()
        model.embed.W_E[:, 0] = -12.0
        model.embed.W_E[MARKS[0], 0] = 12.0
        model.embed.W_E[:, 3] = 12.0
        mlp = model.blocks[0].mlp
        mlp.W_in[0, 5], mlp.b_in[5] = 1.0, 8.0
        mlp.W_out[5, 2], mlp.b_out[2] = 4.0, -32.0
        model.unembed.W_U[2, ANSWERS[0]], model.unembed.W_U[2, ANSWERS[1]] = 4.0, -4.0
    nodes = {(0, "mlp_in", 0), (0, "mlp_neuron", 5), (0, "mlp_out", 2)}
    return model, last_word, circuit_of(model, last_word, nodes)
