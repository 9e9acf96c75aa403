"""Dictionaries trained by the Trainer: they learn, the model stays, runs go on exactly."""

from dataclasses import replace

import pytest
import torch

from tl_sparse import SparseTransformer
from tl_sparse.data.tokens import CorpusStats, TokenizedCorpus
from tl_sparse.tracing import (
    DictionaryTrainingConfig,
    Place,
    dictionary_run,
    load_dictionaries,
    places,
    save_dictionaries,
    train_dictionaries,
)
from tl_sparse.tracing.learned import LearnedDictionary

TINY = dictionary_run(8, batch_size=4, context=8, lr=0.02, eval_every=8, eval_sequences=4,
                      log_every=1, save_every=3)  # fmt: skip
CONFIG = DictionaryTrainingConfig(k=4, dead_after=4, aux_k=8, threshold_decay=0.7)
MLP = Place("blocks.0.mlp.hook_act_in", "blocks.0.hook_mlp_out", 40)
EMBED = Place("hook_embed", "hook_embed", 20, k=2)


@pytest.fixture
def corpus(make_tokenizer):
    from pathlib import Path

    import numpy as np

    from tl_sparse.data import CorpusConfig

    ids = (3 + np.random.default_rng(0).integers(0, 27, 1500)).astype(np.uint16)
    stats = CorpusStats(0, 0, 0, 0, 0, 0, 1000, 500, 0)
    return TokenizedCorpus(
        ids[:1000], ids[1000:], make_tokenizer(), CorpusConfig(), "words", stats, (), Path()
    )


@pytest.fixture
def model(small_model, corpus):
    return small_model("sinusoidal", tokenizer=corpus.tokenizer, n_layers=1)


def test_dictionaries_explain_more_with_training_and_the_model_stays(model, corpus):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    run = replace(TINY, steps=40)
    trained = train_dictionaries(model, corpus, (EMBED, MLP), CONFIG, run, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    metrics = trained.training.metrics
    for hook in ("hook_embed", "blocks.0.hook_mlp_out"):
        fvu = metrics[f"fvu/{hook}"]
        assert fvu[-3:].mean() < 0.6 * fvu[:3].mean(), hook
    frame = trained.to_dataframe()
    assert frame["dictionary"].tolist() == ["embed", "0.mlp"]
    assert "2 dictionaries" in repr(trained)
    assert "0.mlp" in trained._repr_html_()


def test_a_trained_dictionary_reconstructs_as_the_metrics_say(model, corpus):
    """Independent of the trainer: its error over the variance on text, in the model's units."""
    run = replace(TINY, steps=40)
    trained = train_dictionaries(model, corpus, (MLP,), CONFIG, run, progress=False)
    (found,) = trained.dictionaries
    tokens = corpus.validation_sequences(32, 8)
    _, cache = model.run_with_cache(tokens)
    x, y = cache[MLP.hook_in].flatten(0, 1), cache[MLP.hook_out].flatten(0, 1)
    features = found.encode(x)
    error = (y - found.decode(features)).square().sum() / (y - y.mean(0)).square().sum()
    last = trained.training.metrics.iloc[-5:]
    assert float(error) == pytest.approx(last["fvu/blocks.0.hook_mlp_out"].mean(), rel=0.3)
    assert float((features > 0).sum(1).float().mean()) == pytest.approx(4, rel=0.3)
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(found.d_sae))


def test_a_stopped_run_goes_on_exactly(model, corpus, tmp_path, monkeypatch):
    def run(folder):
        config = replace(CONFIG, dead_after=2)  # so that dead features have their part
        return train_dictionaries(
            model, corpus, (EMBED, MLP), config, TINY, folder, progress=False
        ).dictionaries

    whole = run(tmp_path / "whole")
    plain, calls = LearnedDictionary.losses, []

    def stops(self, x, y):
        calls.append(0)
        if len(calls) > 2 * 4:
            raise KeyboardInterrupt
        return plain(self, x, y)

    monkeypatch.setattr(LearnedDictionary, "losses", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint-00000003").is_dir()
    monkeypatch.setattr(LearnedDictionary, "losses", plain)
    for one, other in zip(whole, run(tmp_path / "parts"), strict=True):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_checkpoint_of_other_places_is_refused(model, corpus, tmp_path):
    train_dictionaries(model, corpus, (MLP,), CONFIG, TINY, tmp_path, progress=False)
    with pytest.raises(ValueError, match="belongs to another run"):
        train_dictionaries(model, corpus, (EMBED,), CONFIG, TINY, tmp_path, progress=False)


def test_dead_features_come_back():
    """A feature that nothing activates is moved by the term for dead ones, and by nothing else."""
    place = Place("x", "x", 8)
    for weight, moves in ((1 / 32, True), (0.0, False)):
        config = DictionaryTrainingConfig(k=2, dead_after=1, aux_k=2, aux_weight=weight)
        learned = LearnedDictionary(place, 4, 4, config, 0)
        x = torch.randn(32, 4)
        learned.start(x, x)
        with torch.no_grad():
            learned.b_enc[3] = -100.0
            learned.idle[3] = 5.0
        learned.losses(x, x)["loss"].backward()
        assert bool(learned.W_dec.grad[3].abs().sum() > 0) is moves
        assert bool(learned.dead[3])
        assert learned.weights()["b_enc"].shape == (8 - int(learned.dead.sum()),)


def test_relu_and_l1_leave_fewer_active_than_without(model, corpus):
    l0 = []
    for l1 in (0.0, 0.3):
        config = DictionaryTrainingConfig(activation="relu", l1=l1)
        run = replace(TINY, steps=25)
        trained = train_dictionaries(model, corpus, (MLP,), config, run, progress=False)
        l0.append(trained.to_dataframe()["l0"][0])
        assert trained.dictionaries[0].activation == "relu"
    assert l0[1] < 0.7 * l0[0]


def test_saved_dictionaries_come_back_to_the_bit(model, corpus, tmp_path):
    trained = train_dictionaries(model, corpus, (EMBED, MLP), CONFIG, TINY, progress=False)
    save_dictionaries(trained.dictionaries, tmp_path / "d", model)
    for one, other in zip(
        trained.dictionaries, load_dictionaries(tmp_path / "d", model), strict=True
    ):
        assert (one.name, one.hook_in, one.k) == (other.name, other.hook_in, other.k)
        assert dict(other.metadata)["steps"] == 8
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    save_dictionaries(trained.dictionaries, tmp_path / "half", model, torch.bfloat16)
    half = load_dictionaries(tmp_path / "half")
    assert torch.equal(half[1].W_dec, trained.dictionaries[1].W_dec.bfloat16().float())
    with torch.no_grad():
        model.embed.W_E[0, 0] += 1.0
    with pytest.raises(ValueError, match="made for another model"):
        load_dictionaries(tmp_path / "d", model)
    with pytest.raises(FileNotFoundError, match="bundled dictionaries"):
        load_dictionaries(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="two dictionaries are called embed"):
        save_dictionaries([trained.dictionaries[0]] * 2, tmp_path / "d")


def test_places(small_model):
    found = places(small_model(n_layers=2), 2)
    assert [(p.hook_in, p.hook_out) for p in found[:3]] == [
        ("hook_embed", "hook_embed"),
        ("blocks.0.hook_attn_out", "blocks.0.hook_attn_out"),
        ("blocks.0.mlp.hook_act_in", "blocks.0.hook_mlp_out"),
    ]
    assert [p.n_features for p in found] == [15, 32, 32, 32, 32]
    assert len(places(small_model("attn_only", n_layers=2))) == 3
    with pytest.raises(ValueError, match="choose from embed, attn, mlp"):
        places(small_model(), parts=("resid",))


def test_what_cannot_be_trained_is_refused(model, corpus):
    other = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="from_transformer_lens"):
        train_dictionaries(other, corpus, (MLP,))
    for chosen, message in (
        ((Place("hook_nothing", "hook_embed", 4),), "no hook hook_nothing"),
        ((EMBED, EMBED), "two dictionaries at hook_embed"),
        ((), "no places"),
        ((Place("blocks.0.attn.hook_z", "blocks.0.hook_attn_out", 4),), "another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            train_dictionaries(model, corpus, chosen, CONFIG, TINY, progress=False)
    with pytest.raises(ValueError, match="k=0"):
        DictionaryTrainingConfig(k=0)
    with pytest.raises(ValueError, match="4 features, of which 9"):
        Place("x", "x", 4, k=9)


def test_the_bundled_dictionaries_are_the_bundled_models():
    """They load for their model, and the model keeps its loss with all of them in it."""
    model = SparseTransformer.from_pretrained("python-dense")
    found = load_dictionaries("python-dense", model)
    assert [each.name for each in found] == ["embed", "0.attn", "0.mlp", "1.attn", "1.mlp"]
    text = "def main(argv):\n    for name in names:\n        print('quoted text')\n"
    tokens = model.to_tokens(text * 2)[:, :64]
    seen, hooks = {}, []
    for each in found:
        if each.transcoder:
            hooks.append((each.hook_in, lambda x, hook: seen.update({hook.name: x})))
        hooks.append((each.hook_out, lambda x, hook, d=each: d.decode(
            d.encode(seen[d.hook_in] if d.transcoder else x))))  # fmt: skip
    with torch.no_grad():
        whole = float(model(tokens, return_type="loss"))
        spliced = float(model.run_with_hooks(tokens, return_type="loss", fwd_hooks=hooks))
        mean = float(model.run_with_hooks(
            tokens, return_type="loss",
            fwd_hooks=[(d.hook_out, lambda x, hook: x.mean((0, 1)).expand_as(x)) for d in found],
        ))  # fmt: skip
    assert spliced - whole < 0.15 * (mean - whole)
