"""Folders in OpenAI's format, for the circuits that come beside such a model; pairs of prompts."""

import pytest
import torch

from tests.checkpoints.conftest import write as write


@pytest.fixture
def pairs(random_tokens):
    """Pairs of several lengths that begin alike, with the answers 3 and 4."""
    from tl_sparse.tasks import TaskBatch  # here, as its shapes are checked from then on

    generator = torch.Generator().manual_seed(6)
    tokens = random_tokens[:12, :9].clone().repeat_interleave(2, 0)
    last = torch.randint(4, 9, (24,), generator=generator)
    for row in range(1, 24, 2):
        tokens[row, 3:] = random_tokens[row, 3:9]
    answer = torch.tensor([3, 4]).repeat(12)
    texts = tuple(str(i) for i in range(24))
    return TaskBatch(tokens, last, answer, 7 - answer, texts, texts)
