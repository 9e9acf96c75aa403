"""SAELens, unchanged: training a dictionary on our activations and splicing one into our model.

It runs with TransformerLens 3 (``make test-tl3``), because sae-lens asks for a TransformerLens
below 4.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tests.conformance.models import N_CTX, SMALL, build
from tl_sparse.model.legacy_aliases import install_legacy_aliases

options = pytest.mark.parametrize("option", ["plain", "abstopk_writes", "paper"])
HOOK = "blocks.1.hook_mlp_out"

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("sae_lens") is None,
        reason="sae-lens is not installed: `make test-tl3` sets up an environment that has it",
    ),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:sae_lens"),
]


@pytest.fixture(scope="module")
def lens():
    with install_legacy_aliases():
        import sae_lens
        from sae_lens.evals import EvalConfig, run_evals
        from sae_lens.training.activation_scaler import ActivationScaler
    return SimpleNamespace(
        sae_lens=sae_lens, EvalConfig=EvalConfig, run_evals=run_evals, Scaler=ActivationScaler
    )


def training_runner(lens, model, steps=1):
    """A TopK dictionary of the MLP's writes, on random sequences."""
    from datasets import Dataset

    sae_lens, batch = lens.sae_lens, 64
    rows = torch.randint(3, 30, (64, N_CTX), generator=torch.Generator().manual_seed(0)).tolist()
    config = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.TopKTrainingSAEConfig(d_in=SMALL["d_model"], d_sae=64, k=8, device="cpu"),
        model_name="a sparse transformer", hook_name=HOOK, dataset_path="random tokens",
        is_dataset_tokenized=True, streaming=False, context_size=N_CTX, prepend_bos=False,
        training_tokens=batch * steps, train_batch_size_tokens=batch, lr=3e-3,
        store_batch_size_prompts=8, n_batches_in_buffer=8, eval_batch_size_prompts=4,
        n_eval_batches=1, n_checkpoints=0, checkpoint_path=None, output_path=None, verbose=False,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return sae_lens.LanguageModelSAETrainingRunner(
        config, override_dataset=Dataset.from_list([{"tokens": row} for row in rows]),
        override_model=model,
    )  # fmt: skip


def random_sae(lens, seed=5):
    sae = lens.sae_lens.StandardSAE(
        lens.sae_lens.StandardSAEConfig(d_in=SMALL["d_model"], d_sae=48, device="cpu")
    )
    sae.cfg.metadata.hook_name = HOOK
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return sae


@pytest.fixture
def spliceable(lens):
    """Our model with SAELens' methods mixed in, and the same weights."""
    from tl_sparse import SparseTransformer

    class Spliceable(lens.sae_lens.HookedSAETransformer, SparseTransformer):
        pass

    def spliceable(option):
        ours = build(option)
        model = Spliceable(ours.config, ours.tokenizer)
        model.load_state_dict(ours.state_dict())
        return ours, model.eval()

    return spliceable


@options
def test_the_activations_store_sees_the_models_activations(claim, lens, option, tokens):
    claim("SAELens ActivationsStore", option, "unchanged")
    model = build(option)
    store = training_runner(lens, model).activations_store
    _, cache = model.run_with_cache(tokens)
    seen = store.get_activations(tokens)
    torch.testing.assert_close(seen.reshape(cache[HOOK].shape), cache[HOOK], atol=0, rtol=0)


@options
def test_a_few_steps_of_training_lower_the_reconstruction_error(claim, lens, option, tokens):
    claim("SAELens SAE training", option, "unchanged")
    model = build(option)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, cache = model.run_with_cache(tokens)
    wanted = cache[HOOK]

    def error(sae):
        return float(((sae(wanted) - wanted).square().mean() / wanted.var()).detach())

    runner = training_runner(lens, model, steps=60)
    untrained = error(runner.sae)
    sae = runner.run()
    assert error(sae) < 0.5 * untrained
    assert (sae.encode(wanted) != 0).sum(-1).max() <= 8
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@options
@torch.no_grad()
def test_evaluation_reports_the_models_own_losses(claim, lens, option):
    claim("SAELens run_evals", option, "unchanged")
    model, sae = build(option), random_sae(lens)
    store = training_runner(lens, model).activations_store
    batch = store.get_batch_tokens(4)
    store.get_batch_tokens = lambda *args, **kwargs: batch
    counts = {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1}
    config = lens.EvalConfig(batch_size_prompts=4, compute_ce_loss=True, compute_kl=True, **counts)
    metrics, _ = lens.run_evals(
        sae=sae, activation_store=store, model=model, eval_config=config,
        activation_scaler=lens.Scaler(), verbose=False,
    )  # fmt: skip
    reported = metrics["model_performance_preservation"]

    def loss(edit):
        return float(model.run_with_hooks(batch, return_type="loss", fwd_hooks=[(HOOK, edit)]))

    expected = {
        "ce_loss_without_sae": float(model(batch, return_type="loss")),
        "ce_loss_with_sae": loss(lambda x, hook: sae.decode(sae.encode(x))),
        "ce_loss_with_ablation": loss(lambda x, hook: torch.zeros_like(x)),
    }
    assert len(set(expected.values())) == 3
    for name, value in expected.items():
        assert reported[name] == pytest.approx(value, abs=1e-5), name


@options
@torch.no_grad()
def test_a_spliced_model_equals_a_hook_that_reconstructs(claim, lens, spliceable, option, tokens):
    claim("SAELens HookedSAETransformer", option, "unchanged")
    ours, model = spliceable(option)
    sae = random_sae(lens)
    clean = ours(tokens)
    assert torch.equal(model(tokens), clean)

    hook = (HOOK, lambda x, hook: sae.decode(sae.encode(x)))
    expected = ours.run_with_hooks(tokens, fwd_hooks=[hook])
    assert not torch.equal(expected, clean)
    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), expected)
    with model.saes(saes=[sae]):
        assert torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens), clean), "it stays spliced"

    logits, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    _, reference = ours.run_with_cache(tokens)
    features = sae.encode(reference[HOOK])
    torch.testing.assert_close(cache[f"{HOOK}.hook_sae_acts_post"], features, atol=0, rtol=0)
    assert torch.equal(logits, expected)


@options
@torch.no_grad()
def test_with_the_error_term_nothing_changes_but_features_can_be_edited(
    claim, lens, spliceable, option, tokens
):
    claim("SAELens HookedSAETransformer", option, "unchanged")
    ours, model = spliceable(option)
    sae, clean = random_sae(lens), ours(tokens)
    whole = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(whole, clean, atol=1e-5, rtol=1e-5)

    def drop(features, hook):
        features = features.clone()
        features[..., 7] = 0.0
        return features

    def drop_by_hand(x, hook):
        features = sae.encode(x)
        return x + sae.decode(drop(features, None)) - sae.decode(features)

    feature_hook = (f"{HOOK}.hook_sae_acts_post", drop)
    with model.saes(saes=[sae], use_error_term=True):
        edited = model.run_with_hooks(tokens, fwd_hooks=[feature_hook])
    expected = ours.run_with_hooks(tokens, fwd_hooks=[(HOOK, drop_by_hand)])
    assert (expected - clean).abs().max() > 1e-3
    torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-4)


@options
@torch.no_grad()
def test_reset_gives_the_model_back_bit_for_bit(claim, lens, spliceable, option, tokens):
    claim("SAELens HookedSAETransformer", option, "unchanged")
    ours, model = spliceable(option)
    names = set(model.hook_dict)
    model.add_sae(random_sae(lens))
    assert not torch.equal(model(tokens), ours(tokens))
    assert f"{HOOK}.hook_sae_acts_post" in model.hook_dict
    model.reset_saes()
    logits, cache = model.run_with_cache(tokens)
    expected, reference = ours.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert set(model.hook_dict) == names
    assert all(torch.equal(cache[name], reference[name]) for name in reference)
