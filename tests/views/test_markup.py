import json
import xml.etree.ElementTree as ET

import pytest

from tl_sparse.views.markup import element, script_json, to_html


def test_json_survives_and_cannot_end_a_script():
    value = {"</script><!--": ["\u2028", "\u2029", "\ud800", "é", "&", 0.5, None]}
    text = script_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_json_refuses_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json([float("nan")])


def test_texts_and_attributes_are_escaped():
    root = ET.Element("p")
    element(root, "b", "</p><i>", title='"><i>', data_node="x", class_="c", id=None)
    html = to_html(root)
    assert "&lt;/p&gt;&lt;i&gt;" in html
    assert 'title="&quot;&gt;' in html
    assert 'data-node="x" class="c"' in html
    assert "id=" not in html
