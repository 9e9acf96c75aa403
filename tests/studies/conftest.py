"""A small corpus, and small models that do one task, for_while, by a chain of three nodes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LENGTH = 48
CHAIN = ((0, "attn_in", 0), (0, "attn_v", 1), (0, "attn_out", 1))


@pytest.fixture(scope="session")
def corpus(sixty_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sixty small files and idioms."""
    from tl_sparse.data import CorpusConfig, build_corpus

    config = CorpusConfig(sources=(str(sixty_sources),), idiom_share=0.3)
    return build_corpus(config, tmp_path_factory.mktemp("cache"), progress=False)


def small_config(corpus: Any, name: str) -> Any:
    from tl_sparse.config import SparseTransformerConfig

    return SparseTransformerConfig(
        n_layers=1, d_model=16 if name == "sparse" else 8, d_head=4, n_ctx=LENGTH, d_mlp=12,
        d_vocab=len(corpus.tokenizer), bigram_table="frozen",
    )  # fmt: skip


def plant(model: Any, extra: int = 0, weight: float = 4.0) -> None:
    """Write the chain, and ``extra`` more weights from and to its nodes, into a model."""
    from tl_sparse import tasks

    answers = tasks.get("for_while", model.tokenizer, LENGTH).answer_ids
    marks = [model.tokenizer.encode(word)[0] for word in ("for", "while")]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (model.blocks[0].ln1, model.blocks[0].ln2, model.ln_final):
            norm.w.fill_(1.0)
        model.W_E[:, 3], model.W_E[:, 4] = 3.0, -3.0
        model.W_E[marks[0], 0], model.W_E[marks[1], 0] = 3.0, -3.0
        attn = model.blocks[0].attn
        attn.W_V[0, 0, 1], attn.W_O[0, 1, 1] = 1.0, weight
        model.W_U[1, answers[0]], model.W_U[1, answers[1]] = 10.0, -10.0
        model.blocks[0].mlp.W_in.view(-1)[:extra] = 0.01


@pytest.fixture
def solver(corpus: Any) -> Callable[..., Any]:
    """``solver(extra=0, d_model=8)``: a model that does for_while by a chain of three nodes.

    ``extra`` weights join nodes of the MLP, so that edges can be counted there too.
    """

    def build(extra: int = 0, d_model: int = 8, weight: float = 4.0) -> Any:
        from tl_sparse.config import SparseTransformerConfig
        from tl_sparse.model.transformer import SparseTransformer

        config = SparseTransformerConfig(
            n_layers=1, d_model=d_model, d_head=4, n_ctx=LENGTH, d_mlp=12,
            d_vocab=len(corpus.tokenizer),
        )  # fmt: skip
        model = SparseTransformer(config, corpus.tokenizer).eval()
        plant(model, extra, weight)
        return model

    return build


@pytest.fixture(autouse=True)
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparsity whose floors the small models' matrices can hold."""
    from tl_sparse.sparsity.projection import SparsityConfig
    from tl_sparse.studies import demo

    rule = SparsityConfig(density=0.25, floor=1, embedding_floor=1)
    monkeypatch.setattr(demo, "SPARSITY", rule)


@pytest.fixture
def small_config_of() -> Callable[..., Any]:
    """``small_config_of(corpus, name)``: the architecture of the sparse or dense small model."""
    return small_config


@pytest.fixture
def planted_in() -> Callable[..., None]:
    """``planted_in(model, extra)`` gives a small model weights that do the task."""
    return plant


@pytest.fixture
def solvers(corpus: Any) -> Callable[..., tuple[Any, Any]]:
    """``solvers(extra)``: the sparse and the dense model as the study knows them."""

    def build(losses: tuple[float, float] = (2.5, 2.52), extra: int = 5) -> tuple[Any, Any]:
        from tl_sparse.ablation import activation_means
        from tl_sparse.model.transformer import SparseTransformer
        from tl_sparse.sparsity.matrices import weight_matrices
        from tl_sparse.sparsity.projection import l0
        from tl_sparse.studies.demo import TrainedModel
        from tl_sparse.tasks import evaluate_task, get

        made = []
        for name, loss in zip(("sparse", "dense"), losses, strict=True):
            model = SparseTransformer(small_config(corpus, name), corpus.tokenizer).eval()
            plant(model, extra)
            text = corpus.validation_sequences(20, 48)
            results = {
                task: evaluate_task(model, get(task, corpus.tokenizer, 48), 4)
                for task in ("for_while", "var_if")
            }
            made.append(
                TrainedModel(
                    name=name, model=model, means=activation_means(model, text),
                    validation_loss=loss, seconds=1.5, tasks=results,
                    l0=l0(weight_matrices(model)),
                )
            )  # fmt: skip
        return tuple(made)

    return build


@pytest.fixture
def circuit_of() -> Callable[..., Any]:
    """``circuit_of(trained, nodes)``: a circuit of the nodes named, with results made up."""

    def build(trained: Any, nodes: Any = CHAIN, task: str = "for_while", seed: int = 0) -> Any:
        from tl_sparse.circuits import Calibration, Circuit, circuit_edges

        index = trained.means.index
        kept = torch.zeros(index.n_nodes, dtype=torch.bool)
        for layer, site, channel in nodes:
            kept[index.slices[index.hook(layer, site)].start + channel] = True
        losses = torch.tensor([0.11, 0.13, 0.05, 0.07])
        return Circuit(
            task=task, index=index, kept=kept, tau=kept.float(), means=trained.means,
            edges=circuit_edges(trained.model, index, kept), losses=losses,
            losses_calibrated=losses / 3, correct=losses < 0.12, calibration=Calibration(2.0, 0.1),
            selection_loss=0.1, model_loss=0.01, target_loss=0.15, n_active=9, seed=seed,
            config={"steps": 1}, model_name="SparseTransformer",

        )  # fmt: skip

    return build
