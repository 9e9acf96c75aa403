import pandas as pd
import pytest

from tl_sparse.faithfulness.controls import few
from tl_sparse.faithfulness.ranking import ranking_curve, ranking_measures


def test_the_ranking_that_the_circuit_was_chosen_from(whole):
    (better, worse), table = ranking_measures(whole, whole.circuit.tau)
    curve = ranking_curve(few(whole), whole.circuit.tau)
    expected = curve.table.drop(columns="f_absolute").rename(columns={"f_signed": "f"})
    pd.testing.assert_frame_equal(table, expected, atol=1e-6)
    assert (better.name, worse.name) == ("cpr", "cmd")
    assert better.value == pytest.approx(curve.cpr, abs=1e-6)
    areas = [(1 - table["f"]).abs().iloc[i : i + 2].mean() for i in range(len(table) - 1)]
    assert worse.value == pytest.approx((areas * table["fraction"].diff()[1:]).sum(), abs=1e-6)
    assert better.low <= better.value <= better.high
    assert better.value > better.null
    assert worse.value < worse.null
    assert better.examples.tolist() == pytest.approx(curve.table["f_signed"].tolist(), abs=1e-6)
