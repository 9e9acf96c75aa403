import math

import numpy as np
import pandas as pd

from tl_sparse.views.chart import Look, Panel, chart


def points(**changes):
    columns = {
        "series": ["s", "s", "t"], "x": [2.0, 1.0, 3.0], "y": [20.0, 10.0, 0.0],
        "x_low": [1.5, math.nan, 2.0], "x_high": [2.5, math.nan, 4.0],
        "y_low": [10.0, math.nan, 0.0], "y_high": [40.0, math.nan, 0.0],
        "label": ["<b>", "", ""], "hover": ["h", "i", "j"],
    }  # fmt: skip
    return pd.DataFrame(columns | changes)


def test_points_bars_and_series_are_drawn():
    panels = [Panel(points(), "x", "y", "one", log_y=True), Panel(points(), "x", "y", "two")]
    figure = chart("Title", panels, look=Look("joined"), note="a note")
    by_panel = {(trace.name, trace.xaxis): trace for trace in figure.data}
    # what is not positive has no place on a logarithmic axis
    assert set(by_panel) == {("s", "x"), ("s", "x2"), ("t", "x2")}
    trace = by_panel["s", "x"]
    assert list(trace.x) == [2.0, 1.0]
    np.testing.assert_allclose(trace.error_y.array, [20.0, 0.0])
    np.testing.assert_allclose(trace.error_y.arrayminus, [10.0, 0.0])
    np.testing.assert_allclose(trace.error_x.array, [0.5, 0.0])
    assert trace.text[0] == "&lt;b&gt;"
    assert trace.showlegend
    assert not by_panel["s", "x2"].showlegend  # one entry a series
    assert by_panel["s", "x2"].marker.color == trace.marker.color
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.type == "linear"
    [note] = [note for note in figure.layout.annotations if note.text == "a note"]
    assert (note.y, note.yanchor) == (1, "bottom")  # above the plot: legends below grow


def test_a_level_is_drawn_with_its_words():
    figure = chart("T", [Panel(points(), "x", "y", y_level=(0.7, "chance"))])
    (line,) = figure.layout.shapes
    assert line.y0 == line.y1 == 0.7
    assert "chance" in [note.text for note in figure.layout.annotations]
