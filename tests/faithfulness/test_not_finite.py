"""Whatever takes long refuses NaN and infinite weights, means and logits before it begins."""

from dataclasses import replace

import pytest
import torch

from tl_sparse import SparseTransformer
from tl_sparse.ablation import activation_means, positional_means, resample_sources
from tl_sparse.analyses import binarise
from tl_sparse.circuits import (
    PruningConfig,
    circuit_from_ranking,
    compile_circuit,
    prune,
    prune_edges,
    prune_many,
    rank_nodes,
    search,
)
from tl_sparse.circuits.baselines import METHODS
from tl_sparse.faithfulness import evaluate, faithful_prune, necessity
from tl_sparse.sparsity.sparsify import sparsify
from tl_sparse.storage.finite import NotFinite
from tl_sparse.studies.frontier import frontier

CONFIG = PruningConfig(headroom=0.0, steps=4, batch_pairs=4, selection_pairs=8, report_pairs=8)


def ranked(s):
    scores = rank_nodes(s.model, s.task, "random", means=s.means, config=CONFIG)
    return circuit_from_ranking(s.model, s.task, scores, CONFIG, means=s.means)


ENTRIES = {
    "means": lambda s: activation_means(s.model, s.tokens),
    "resample": lambda s: resample_sources(s.model, s.tokens),
    "positional": lambda s: positional_means(s.model, s.tokens),
    "prune": lambda s: prune(s.model, s.task, CONFIG, means=s.means, progress=False),
    "prune_many": lambda s: prune_many(s.model, [(s.task, CONFIG)], means=s.means, progress=False),
    "faithful_prune": lambda s: faithful_prune(s.model, s.task, CONFIG, means=s.means),
    "search": lambda s: search(s.model, s.task, CONFIG, means=s.means, progress=False),
    **{
        method: lambda s, m=method: rank_nodes(s.model, s.task, m, means=s.means, config=CONFIG)
        for method in METHODS
    },
    "ranking": ranked,
    "prune_edges": lambda s: prune_edges(s.model, s.circuit, s.task, progress=False),
    "evaluate": lambda s: evaluate(s.model, s.circuit, s.task, progress=False),
    "compile": lambda s: compile_circuit(
        s.circuit, s.model, s.task.batch(4, split="held_out", seed=0)
    ),
    "binarise": lambda s: binarise(s.model, s.circuit, s.task, progress=False),
    "necessity": lambda s: necessity(s.model, s.circuit, s.task),
    "frontier": lambda s: frontier({"one": s.model}, s.tokens, progress=False),
    "sparsify": lambda s: sparsify(s.model, 0.5),
    "to_transformer_lens": lambda s: s.model.to_transformer_lens(),
}


class Setting:
    def __init__(self, chain, tokens):
        self.model, self.task, self.circuit = chain
        self.tokens, self.means = tokens, self.circuit.means


@pytest.fixture
def setting(chain, random_tokens):
    return Setting(chain, random_tokens)


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_a_weight_that_is_not_finite_is_refused_before_any_run(setting, monkeypatch, entry):
    with torch.no_grad():
        setting.model.blocks[0].mlp.W_in[0, 0] = torch.nan if len(entry) % 2 else torch.inf
    monkeypatch.setattr(SparseTransformer, "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(NotFinite, match=r"weights of this SparseTransformer.*blocks\.0\.mlp\.W_in"):
        ENTRIES[entry](setting)


@pytest.mark.parametrize("entry", ["prune", "exact", "search", "faithful_prune", "evaluate"])
def test_means_that_are_not_finite_are_refused_before_any_run(setting, monkeypatch, entry):
    values = setting.means.values.clone()
    values[3] = -torch.inf
    setting.means = replace(setting.means, values=values)
    setting.circuit = replace(setting.circuit, means=setting.means)
    monkeypatch.setattr(SparseTransformer, "forward", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(NotFinite, match="1 value is NaN or infinite, in means"):
        ENTRIES[entry](setting)


@pytest.mark.parametrize("entry", ["prune", "attribution", "search", "faithful_prune"])
def test_logits_that_are_not_finite_are_refused_before_anything_is_trained(
    setting, monkeypatch, entry
):
    """Finite weights whose products are too large for the dtype."""
    model = setting.model
    with torch.no_grad():
        model.unembed.W_U.copy_(3e38 * torch.randn(model.unembed.W_U.shape).sign())
    setting.means = activation_means(model, setting.tokens)
    for name in ("pruning.train_masks", "train_gates.train_gates"):
        monkeypatch.setattr(f"tl_sparse.circuits.{name}", lambda *_: pytest.fail("it trained"))
    with pytest.raises(NotFinite, match="logit differences of this SparseTransformer"):
        ENTRIES[entry](setting)


def test_activations_that_are_not_finite_have_no_means(small_model, random_tokens):
    model = small_model("no_norm")
    with torch.no_grad():
        model.blocks[0].mlp.W_in.fill_(3e38)
        model.embed.W_E.fill_(1e3)
    with pytest.raises(NotFinite, match=r"mean activations on these tokens.*blocks\.0\.mlp"):
        activation_means(model, random_tokens)
    with pytest.raises(NotFinite, match=r"activations on these tokens.*blocks\.0\.mlp"):
        resample_sources(model, random_tokens)
