import math

import numpy as np
import pytest
import torch

from tl_sparse.analyses import residual_kurtosis
from tl_sparse.analyses.kurtosis import kurtosis


def by_hand(x):
    """Biased fourth standardised moment of every column, one column at a time."""
    found = []
    for column in np.asarray(x, dtype=np.float64).T:
        apart = column - column.mean()
        found.append((apart**4).mean() / (apart**2).mean() ** 2)
    return np.array(found)


def test_kurtosis_of_known_distributions():
    flat = torch.tensor([-1.0, 1.0]).repeat(50)
    rare = torch.zeros(100)
    rare[:10] = 5.0
    columns = torch.stack([flat, rare, torch.full((100,), 3.0)], dim=1).double()
    found = kurtosis(columns)
    # two equal values: 1; a share p of ones: (1 - 3 p (1 - p)) / (p (1 - p))
    assert found[0].item() == pytest.approx(1.0)
    assert found[1].item() == pytest.approx((1 - 3 * 0.09) / 0.09)
    assert found[2].isnan()


def test_a_gaussian_has_three_whatever_its_mean_and_scale():
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(1000 + 0.01 * x).item() == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_both_axes_of_the_residual_stream(small_model, batch_size):
    model = small_model("together")
    tokens = torch.randint(3, 30, (7, 9), generator=torch.Generator().manual_seed(0))
    found = residual_kurtosis(model, tokens, skip=1, batch_size=batch_size)
    assert found.hooks == (
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
    )
    _, cache = model.run_with_cache(tokens)
    for place, hook in enumerate(found.hooks):
        x = cache[hook][:, 1:].reshape(-1, 16).detach().numpy()
        np.testing.assert_allclose(found.over_tokens[place], by_hand(x), rtol=1e-4)
        np.testing.assert_allclose(found.over_channels[place], by_hand(x.T), rtol=1e-4)
    last = found.over_tokens[-1].mean().item()
    assert found.log_mean_over_tokens == pytest.approx(math.log(last), rel=1e-5)
    assert found.log_mean_over_channels == pytest.approx(
        math.log(found.over_channels[-1].mean().item()), rel=1e-5
    )


def test_few_used_channels_are_seen_on_the_axis_of_channels(planted, random_tokens):
    # all tokens but two have -12, 12 and 0.1-sized noise: heavy over channels
    model, _ = planted()
    found = residual_kurtosis(model, random_tokens)
    first = found.over_channels[0]
    assert first.min() > 2.0
    assert found.over_tokens[0, 3].isnan()  # channel 3 is 12 for every token
    # as channel 4 is -12, and 1 and 2 are 0
    frame = found.to_dataframe().query("hook == 'blocks.0.hook_resid_pre' and axis == 'tokens'")
    assert frame["constant"].tolist() == [4]
    assert frame["n"].tolist() == [4]
    assert len(found.to_plotly().data) == 2
    assert "Residual kurtosis" in found._repr_html_()


def test_a_dense_transformer_lens_model_is_measured_too(dense_model, random_tokens):
    found = residual_kurtosis(dense_model, random_tokens)
    assert found.over_tokens.shape == (3, 16)
    assert found.over_channels.shape == (3, random_tokens.numel())
    assert bool(found.over_tokens.isfinite().all())


def test_no_token_left_is_an_error(small_model):
    with pytest.raises(ValueError, match="no token is left"):
        residual_kurtosis(small_model(), torch.zeros(2, 4, dtype=torch.long), skip=4)


def test_training_mode_is_restored(small_model, tokens):
    model = small_model().train()
    residual_kurtosis(model, tokens)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
