"""SAEs trained by SAELens on a model at hand."""

import importlib.util
from itertools import islice

import pytest
import torch

from tl_sparse.tracing.sae_lens_training import activation_batches, train_with_sae_lens

HOOK = "blocks.0.hook_attn_out"
HAS_SAE_LENS = importlib.util.find_spec("sae_lens") is not None


def test_batches_are_the_activations_each_once_in_another_order(small_model):
    model, tokens = small_model(n_layers=1), torch.arange(3, 27).view(4, 6)
    _, cache = model.run_with_cache(tokens)
    expected = cache[HOOK].flatten(0, 1)
    found = list(islice(activation_batches(model, tokens, HOOK, 5, sequences=2), 9))
    assert [len(x) for x in found] == [5] * 9
    once = torch.cat(found)[:24]  # 4 x 6 tokens, then the next round
    distance = torch.cdist(once, expected, compute_mode="donot_use_mm_for_euclid_dist")
    assert sorted(distance.argmin(1).tolist()) == list(range(24))
    assert float(distance.amin(1).max()) < 1e-5
    assert distance.argmin(1).tolist() != list(range(24))
    again = list(islice(activation_batches(model, tokens, HOOK, 5, sequences=2), 9))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.skipif(HAS_SAE_LENS, reason="says what is missing where it is")
def test_without_sae_lens_the_message_says_what_to_install(small_model):
    with pytest.raises(ImportError, match=r"tl-sparse\[sae\]"):
        train_with_sae_lens(small_model(n_layers=1), torch.zeros(1, 2).long(), HOOK, None, None)


@pytest.mark.skipif(not HAS_SAE_LENS, reason="SAELens: `make test-tl3`")
def test_an_sae_of_sae_lens_learns_a_sparse_transformers_activations(small_model, tmp_path):
    import sae_lens
    from sae_lens.config import SAETrainerConfig

    from tl_sparse.tracing import Splice, read_dictionary

    model = small_model(n_layers=1)
    tokens = torch.randint(3, 30, (64, 8), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(tokens)
    x = cache[HOOK].flatten(0, 1)
    options = {"normalize_activations": "expected_average_only_in"}
    sae = sae_lens.TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=40, k=4, **options)

    def missed(steps):
        trainer = SAETrainerConfig(steps * 64, 64, lr=0.02, n_batches_for_norm_estimate=4)
        found = train_with_sae_lens(model, tokens, HOOK, sae, trainer, tmp_path / str(steps))
        assert all(p.requires_grad for p in model.parameters())
        error = (x - found.decode(found.encode(x))).square().sum()
        return float(error / (x - x.mean(0)).square().sum()), found

    (before, _), (after, found) = missed(1), missed(150)
    assert after < 0.5 * before
    assert found.hook_in == HOOK
    assert Splice(model, [found]).sites == ("0.attn",)
    assert torch.equal(read_dictionary(tmp_path / "150").W_dec, found.W_dec)
    with pytest.raises(ValueError, match="channels, and the SAE d_in=3"):
        train_with_sae_lens(model, tokens, HOOK, sae_lens.TopKTrainingSAEConfig(d_in=3, d_sae=4),
                            SAETrainerConfig(64, 64))  # fmt: skip
    with pytest.raises(ValueError, match="no hook 'nowhere'"):
        train_with_sae_lens(model, tokens, "nowhere", sae, SAETrainerConfig(64, 64))
