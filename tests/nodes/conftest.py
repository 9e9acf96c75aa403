import pytest

CONNECTED = ("together", "layer_norm", "standard", "attn_only", "tied", "sinusoidal")
"""Options of a model between which the kinds of connections differ."""


@pytest.fixture(params=CONNECTED)
def sparse_model(small_model, request):
    """A small model with four fifths of its weights zero, of each kind in turn."""
    return small_model(request.param, zeros=0.8)
