from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.analyses.conftest import last_word, two_valued
from tl_sparse.faithfulness.checks.binarisation import binarisation

__all__ = ["last_word", "two_valued"]


def test_a_circuit_of_two_valued_nodes_loses_nothing(two_valued, tested):
    test = tested(*two_valued)
    found = binarisation(test).measure("binarised_loss")
    plain = F.softplus(-test.circuit_logit_diffs).mean()
    assert found.value == pytest.approx(float(plain), abs=0.05)
    assert found.null == pytest.approx(float(F.softplus(-test.empty_logit_diffs).mean()))
    assert found.low <= found.value <= found.high < found.null
    assert len(found.examples) == len(test.batch)


def test_binarising_is_fitted_on_train_prompts_and_measured_on_the_test_ones(whole):
    few = replace(whole, batch=whole.batch.pairs(0, 4))
    one = binarisation(whole).measure("binarised_loss")
    other = binarisation(few).measure("binarised_loss")
    assert torch.allclose(one.examples[:8], other.examples, atol=1e-5)
