import numpy as np
import pytest

from tl_sparse.sites import SITE_NAMES
from tl_sparse.views.style import (
    SITE_STYLES,
    circuit_line,
    edge_opacity,
    edge_width,
    node_labels,
    node_names,
    number,
    strength,
    visible,
)


def test_every_site_has_a_style():
    assert tuple(SITE_STYLES) == SITE_NAMES


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" x\n", "·x↵"),
        ("\t", "⇥"),
        ("\x00", "\\u0000"),
        ("\u202etxt", "\\u202etxt"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("é→😀", "é→😀"),
        ("", ""),
    ],
)
def test_tokens_show_what_has_no_glyph(token, shown):
    assert visible(token) == shown


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1432, "0.143"), (-2.5, "−2.5"), (12345.6, "12,346"), (4.2e-5, "4.2e−5"), (999.7, "1,000")],
)
def test_numbers_are_short_with_a_true_minus(value, text):
    assert number(value) == text


def test_number_of_nan_is_a_dash_and_zeros_can_be_kept():
    assert number(float("nan")) == "–"
    assert number(0.15, keep_zeros=True) == "0.150"
    assert number(219.6, keep_zeros=True) == "220"


def test_names_say_layer_site_and_head(quote_circuit):
    names = node_names(quote_circuit.nodes)
    assert names[2] == "layer 0 · neuron 863"
    assert names[9] == "layer 10 · key 1 of head 82"
    assert node_labels(quote_circuit.nodes)[8:] == ["q1", "k1", "v0", "83"]


def test_line_gives_the_circuits_numbers(quote_circuit):
    line = circuit_line(quote_circuit)
    for fact in ("0.143 (target 0.15)", "0.121", "97.2 %", "12 nodes", "9 edges", "toy", "seed 3"):
        assert fact in line


def test_stronger_edges_are_wider_and_more_opaque():
    relative = strength(np.array([-4.0, 1.0, 2.0]))
    assert relative.tolist() == [1.0, 0.25, 0.5]
    for crowd in (10, 5000):
        assert edge_width(relative, crowd).argsort().tolist() == [1, 2, 0]
        opacity = edge_opacity(relative, crowd)
        assert opacity.argsort().tolist() == [1, 2, 0]
        assert ((opacity > 0) & (opacity <= 1)).all()


def test_zero_weights_have_no_strength():
    assert strength(np.zeros(2)).tolist() == [0.0, 0.0]
    assert strength(np.zeros(0)).tolist() == []
