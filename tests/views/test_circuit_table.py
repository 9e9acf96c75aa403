from dataclasses import replace
from math import nan


def test_line_gives_the_circuits_numbers(quote_circuit):
    line = quote_circuit.line
    for fact in ("0.143 (target 0.15)", "0.121", "97.2 %", "12 nodes", "9 edges", "toy", "seed 3"):
        assert fact in line


def test_line_leaves_out_what_is_not_known(quote_circuit):
    unknown = replace(quote_circuit, model_name="", seed=None, loss=nan, accuracy=nan)
    assert unknown.line == "loss not measured · 12 nodes · 9 edges"
