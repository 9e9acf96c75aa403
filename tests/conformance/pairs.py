"""A clean and a corrupted prompt, a metric, and what path tools are told of the models they get."""

import pytest
import torch
from transformer_lens.tools import analysis

from tests.conformance.models import build
from tl_sparse import compat

CLEAN = torch.tensor([[1, 5, 12, 7]])
CORRUPTED = torch.tensor([[1, 9, 12, 7]])

SUM = "residual_relu"  # the option whose stream is not a sum of writes
NO_SUM = "the stream is not the sum of what is written to it"


def metric(logits):
    """A logit difference at the last position, [] from [batch, pos, d_vocab]."""
    return logits[0, -1, 4] - logits[0, -1, 8]


def double(option, **changes):
    """The option's model in double precision, for finite differences and exact identities."""
    return build(option, **changes).double()


def caches(model, clean=CLEAN, corrupted=CORRUPTED):
    """The caches of both prompts."""
    return model.run_with_cache(clean)[1], model.run_with_cache(corrupted)[1]


def edge_config():
    """The edge granularity's config; skips the test where TransformerLens does not have it."""
    if compat.HAS_HOOKED_TRANSFORMER:
        pytest.skip("TransformerLens has it from 4 on")
    return analysis.EdgeAttributionConfig(granularity="edge")
