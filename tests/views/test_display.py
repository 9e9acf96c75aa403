import dataclasses

from tl_sparse.views import CircuitLike, circuit_html


def test_header_line_stands_before_the_picture(quote_circuit):
    html = circuit_html(quote_circuit)
    assert html.index("single_double_quote") < html.index("9 edges") < html.index("<svg")


def test_task_name_is_escaped(quote_circuit):
    html = circuit_html(dataclasses.replace(quote_circuit, task="<script>1</script>"))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_plain_object_with_the_attributes_is_circuit_like(quote_circuit):
    assert isinstance(quote_circuit, CircuitLike)
    assert not isinstance(object(), CircuitLike)
