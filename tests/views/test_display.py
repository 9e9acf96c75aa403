import dataclasses

import pandas as pd

from tl_sparse.views import circuit_html, frame_html


def test_header_line_stands_before_the_picture(quote_circuit):
    html = circuit_html(quote_circuit)
    assert html.index("single_double_quote") < html.index("9 edges") < html.index("<svg")


def test_task_name_is_escaped(quote_circuit):
    html = circuit_html(dataclasses.replace(quote_circuit, task="<script>1</script>"))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_a_results_table_is_escaped_under_its_title():
    html = frame_html("<b>title", "a line", pd.DataFrame({"<i>": ["<u>"], "n": [1234]}))
    assert html.index("&lt;b&gt;title") < html.index("a line") < html.index("1,234")
    assert "&lt;u&gt;" in html
    assert not any(tag in html for tag in ("<b>title", "<i>", "<u>"))
