import pytest

from tests.faithfulness.test_attention import attending
from tl_sparse.faithfulness.checks.attention_patterns import attention_patterns

__all__ = ["attending"]


def test_heads_that_keep_values_and_no_pattern_are_listed(attending):
    found = attention_patterns(attending({(0, "attn_q", 1), (1, "attn_q", 0), (1, "attn_k", 0)}))
    heads = found.tables["heads"]
    assert heads[["layer", "head"]].values.tolist() == [[0, 0], [1, 0]]
    assert heads["patternless"].tolist() == [True, False]
    assert found.measure("patternless_heads").value == 1
    ratio = found.measure("pattern_ratio", "L0H0")
    assert ratio.value == pytest.approx(heads["js"][0] / heads["js_uniform"][0], rel=1e-4)
    js = found.measure("pattern_js", "L0H0")
    assert (js.value, js.null) == pytest.approx((heads["js"][0], heads["js_uniform"][0]), rel=0.1)
    mean = found.measure("pattern_js", "mean, last")
    assert mean.value == pytest.approx(heads["js_last"].mean())
