import pytest

from tl_sparse.views.text import number, plotly_text, visible


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


def test_plotly_shows_texts_as_they_are():
    assert plotly_text("it's <b>\n&\x00") == "it's &lt;b&gt;<br>&amp;\\u0000"
