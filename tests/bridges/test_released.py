"""The released bridged models by name, on a small copy of the release, and their empty files."""

import json

import pytest
import torch

from tests.checkpoints.openai_reference_model import random_state
from tests.checkpoints.test_released_models import BRIDGES, DENSE
from tl_sparse.bridges import bridge_released, path_table, released_bridges


@pytest.fixture
def release(container):
    """A small copy of the release with dense1_4x and csp_bridges2, its empty bridges too."""
    base, root, _ = container
    for name, config in (("dense1_4x", DENSE | {"d_model": 16}), ("csp_bridges2", BRIDGES)):
        config = config | {"vocab_size": 300}
        folder = root / "models" / name
        folder.mkdir()
        (folder / "beeg_config.json").write_text(json.dumps(config))
        torch.save(random_state(config), folder / "final_model.pt")
    (folder / "final_bridges.pt").write_bytes(b"")
    return base, folder


def test_the_released_pair_is_bridged_by_name(release):
    base, _ = release
    text = [f"def f{i}(x):\n    return x + {i}" for i in range(12)]
    pair, fitted = bridge_released(text, base_url=base, progress=False)
    assert pair.dense.config.d_model == 16
    assert pair.sparse.config.activation_density.attn_in == 0.125
    assert len(pair.sites) == 2 * pair.sparse.config.n_layers + 1
    n_ctx = pair.sparse.config.n_ctx
    n_tokens = sum(min(pair.sparse.to_tokens(each).shape[1], n_ctx) for each in text)
    assert fitted.n_tokens + fitted.n_held_out == n_tokens
    tokens = pair.sparse.to_tokens(text[0])[:, :n_ctx]
    table = path_table(pair, tokens, back="none", progress=False)
    assert table.values.isfinite().all()


def test_the_releases_empty_bridges_are_named(release):
    base, folder = release
    with pytest.raises(
        ValueError, match=r"final_bridges\.pt is broken on the server itself: it is empty"
    ):
        released_bridges("csp_bridges2", base_url=base, progress=False)
    with pytest.raises(ValueError, match=r"it is empty \(0 bytes\), as OpenAI's own.*fit bridges"):
        released_bridges(folder)


def test_bridges_that_hold_something_are_given_as_they_are(release):
    base, folder = release
    weight = torch.randn(3, 4)
    torch.save({"encoders": [{"weight": weight}], "step": 3}, folder / "final_bridges.pt")
    found = released_bridges("csp_bridges2", base_url=base, progress=False)
    assert list(found) == ["encoders.0.weight"]
    assert torch.equal(found["encoders.0.weight"], weight)
    torch.save({"step": 3}, folder / "final_bridges.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        released_bridges(folder)
