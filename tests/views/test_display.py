import base64
import dataclasses
import re
from html import unescape

import pandas as pd

from tl_sparse.views import circuit_html, circuit_svg, frame_html


def test_header_line_stands_before_the_picture(quote_circuit):
    html = circuit_html(quote_circuit)
    assert html.index("single_double_quote") < html.index("9 edges") < html.index("<img")


def test_task_name_is_escaped(quote_circuit):
    html = circuit_html(dataclasses.replace(quote_circuit, task="<script>1</script>"))
    assert "&lt;script&gt;1" in html
    (frame,) = re.findall('srcdoc="(.*?)"', html, re.DOTALL)
    assert "><script" not in html.replace(frame, "")  # in a quoted attribute it is text
    assert "<script>1" not in unescape(frame)


def test_what_drops_styles_and_frames_shows_a_static_picture(quote_circuit):
    html = circuit_html(quote_circuit)
    (picture,) = re.findall('src="data:image/svg\\+xml;base64,(.*?)"', html)
    assert base64.b64decode(picture).decode() == circuit_svg(quote_circuit, tooltips=False)
    assert html.count('style="display:none"') == 2  # the picture and its heading


def test_a_results_table_is_escaped_under_its_title():
    html = frame_html("<b>title", "a line", pd.DataFrame({"<i>": ["<u>"], "n": [1234]}))
    assert html.index("&lt;b&gt;title") < html.index("a line") < html.index("1,234")
    assert "&lt;u&gt;" in html
    assert not any(tag in html for tag in ("<b>title", "<i>", "<u>"))
