import pytest

from tests.faithfulness.test_attention import attending
from tl_sparse.faithfulness.attention import evened, js_distance, pattern_effects, patterns
from tl_sparse.faithfulness.checks.attention_patterns import attention_patterns

__all__ = ["attending"]


def test_heads_that_keep_values_and_no_pattern_are_listed(attending):
    found_in = attending({(0, "attn_q", 1), (1, "attn_q", 0), (1, "attn_k", 0)})
    found = attention_patterns(found_in)
    heads = found.tables["heads"]
    assert heads[["layer", "head"]].values.tolist() == [[0, 0], [1, 0]]
    assert heads["patternless"].tolist() == [True, False]
    assert found.measure("patternless_heads").value == 1
    ratio = found.measure("pattern_ratio", "L0H0")
    felt = pattern_effects(found_in, patterns(found_in, [0], ()))[0][:, 0]
    apart = [
        js_distance(x, patterns(found_in, [0], ())[0][:, 0])
        for x in (
            patterns(found_in, [0], found_in.circuit_hooks())[0][:, 0],
            evened(patterns(found_in, [0], ())[0][:, 0]),
        )
    ]
    for row, last in enumerate(found_in.batch.last.tolist()):
        felt[row, last + 1 :] = 0
    mine, even = ((x * felt).sum() for x in apart)
    assert ratio.value == pytest.approx(float(mine / even), rel=1e-4)
    assert heads["worth"].tolist() == pytest.approx([1, 0])
    assert "L1H0 attends to does not matter" in " ".join(found.notes)
    js = found.measure("pattern_js", "L0H0")
    assert (js.value, js.null) == pytest.approx((heads["js"][0], heads["js_uniform"][0]), rel=0.1)
    mean = found.measure("pattern_js", "mean, last")
    assert mean.value == pytest.approx(heads["js_last"].mean())
