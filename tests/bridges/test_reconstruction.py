"""Fractions of variance unexplained, against a plain computation."""

import pytest

from tl_sparse.bridges import BridgedPair, Bridges, BridgesConfig, fit_bridges, reconstruction


def test_fvu_is_error_over_variance_of_all_tokens(small_model, many_tokens):
    dense, sparse = small_model("standard"), small_model(d_model=12, n_heads=3)
    pair = BridgedPair(dense, sparse, Bridges(BridgesConfig.of(dense, sparse, density=0.5)))
    found = reconstruction(pair, many_tokens, batch_size=7, skip=1, progress=False)
    frame = found.to_dataframe().set_index("site")
    for site in pair.sites:
        x, y = (
            model.run_with_cache(many_tokens)[1][pair.hook(side, site)][:, 1:]
            .flatten(0, 1)
            .detach()
            for side, model in (("dense", dense), ("sparse", sparse))
        )
        pairs = {"encoder": (pair.bridges.encode(site, x), y),
                 "decoder": (pair.bridges.decode(site, y), x)}  # fmt: skip
        for name, (guess, target) in pairs.items():
            apart = (guess - target).square().sum() / (target - target.mean(0)).square().sum()
            assert frame[name][site] == pytest.approx(apart.item(), rel=1e-4)
        assert frame["l0"][site] == 6
    assert int(found.n_tokens.sum()) == 30 * 11
    assert len(found.to_plotly().data) == 2
    assert "0.mid" in found._repr_html_()
    assert "330 tokens" in repr(found)


def test_linear_bridges_have_the_fvu_that_fitting_found_on_held_out_tokens(
    small_model, many_tokens
):
    dense, sparse = small_model("standard"), small_model(d_model=12, n_heads=3)
    fitted = fit_bridges(dense, sparse, many_tokens, held_out=0.5, progress=False)
    pair = BridgedPair(dense, sparse, fitted.bridges)
    frame = reconstruction(pair, many_tokens[1::2], progress=False).to_dataframe()
    table = fitted.to_dataframe().pivot(index="site", columns="map", values="fvu")
    for name in ("encoder", "decoder"):
        for site, fvu in zip(frame["site"], frame[name], strict=True):
            assert fvu == pytest.approx(table[name][site], rel=1e-4)
