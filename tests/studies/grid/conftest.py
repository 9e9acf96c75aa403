"""A small corpus, and weights by which a small model does the task for_while and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

LENGTH = 48


@pytest.fixture(scope="session")
def corpus(sixty_sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Sixty small files and idioms."""
    from tl_sparse.data import CorpusConfig, build_corpus

    config = CorpusConfig(sources=(str(sixty_sources),), idiom_share=0.3)
    return build_corpus(config, tmp_path_factory.mktemp("cache"), progress=False)


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


def plant(model: Any, extra: int = 0, weight: float = 4.0) -> None:
    """Write the chain into a model with one layer."""
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
def planted() -> Callable[..., None]:
    """``planted(model, extra)`` writes the chain into a model with one layer."""
    return plant
