"""Texts of different lengths in one batch, through a tokenizer that splits words into letters."""

import itertools

import pytest
import torch

from tl_sparse.compat import KeyValueCache

OPTIONS = ["plain", "standard", "concat", "sinusoidal", "sinks", "bigram_learned"]
TEXTS = ["a bad cab", "fade", "g"]


def letters(pad="<pad>"):
    """A token for each letter, and one for the space between words."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<bos>", "<eos>", " ", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(WordLevel({letter: i for i, letter in enumerate(vocabulary)}))
    core.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token=pad
    )


@pytest.fixture
def model(small_model):
    """``model(option, pad)`` in double precision."""
    return lambda option, pad="<pad>": small_model(option, tokenizer=letters(pad)).double()


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_words_become_letters(model):
    tokens = model("plain").to_tokens(TEXTS)
    assert tokens.shape == (3, 10)
    assert model("plain").to_str_tokens("a bad") == ["<bos>", "a", " ", "b", "a", "d"]


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pad", ["<pad>", "<bos>", "<eos>"])
def test_a_text_has_the_logits_that_it_has_alone(model, option, pad):
    model = model(option, pad)
    for side, prepend_bos in itertools.product(("left", "right"), (True, False)):
        how = {"padding_side": side, "prepend_bos": prepend_bos}
        logits = model(TEXTS, **how)
        for text, row in zip(TEXTS, logits, strict=True):
            alone = model(text, prepend_bos=prepend_bos)[0]
            close(row[-len(alone) :] if side == "left" else row[: len(alone)], alone)


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lengths", [(10,), (4, 6), (1, 8, 1), (9, 1)])
def test_a_cache_gives_the_logits_of_one_run(model, option, lengths):
    model = model(option)
    tokens, mask = model.to_padded_tokens(TEXTS, padding_side="left")
    whole = model(tokens, attention_mask=mask)
    cache, seen, pieces = KeyValueCache.init_cache(model.cfg, "cpu", 3), 0, []
    for n in lengths:
        here = slice(seen, seen + n)
        pieces.append(model(tokens[:, here], attention_mask=mask[:, here], past_kv_cache=cache))
        seen += n
    close(torch.cat(pieces, 1)[mask], whole[mask])


@torch.no_grad()
@pytest.mark.parametrize("pad", ["<pad>", "<bos>", "<eos>", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_that_bring_their_bos_have_the_logits_that_they_have_alone(model, pad, side):
    """Which tokens are padding follows from the lengths: no id tells a BOS from padding."""
    model, how = model("standard", pad), {"padding_side": side, "prepend_bos": False}
    padding = pad or "<eos>"
    texts = ["<bos>a bad cab", "<bos>fade", "<bos>", "<bos><bos>a<eos>", f"{padding}{padding}b"]
    logits = model(texts, **how)
    for text, row in zip(texts, logits, strict=True):
        alone = model(text, prepend_bos=False)[0]
        close(row[-len(alone) :] if side == "left" else row[: len(alone)], alone)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_follows_a_padded_batch_in_a_cache_does_not_see_the_padding(model, side):
    model, words = model("standard"), torch.tensor([[5, 6], [7, 8], [9, 9]])
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 3)
    model(TEXTS, padding_side=side, past_kv_cache=cache)
    later = model(words, past_kv_cache=cache)
    for text, row, more in zip(TEXTS, later, words, strict=True):
        whole = torch.cat([model.to_tokens(text), more[None]], dim=1)
        close(row, model(whole)[0, -2:])


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_of_one_text_is_a_run_of_the_batch_at_any_layer(model, option):
    """Starting at a layer, the mask says where padding is."""
    model = model(option)
    model.set_tokenizer(model.tokenizer, default_padding_side="left")
    resid, tokens, _, mask = model.input_to_embed(TEXTS)
    whole = model(TEXTS)
    assert torch.equal(model(resid, start_at_layer=0, tokens=tokens, attention_mask=mask), whole)
    assert torch.equal(model(tokens, attention_mask=mask), whole)
    _, cache = model.run_with_cache(TEXTS)
    close(cache.decompose_resid().sum(0), cache["resid_post", 1])
    for i, text in enumerate(TEXTS):
        _, alone = model.run_with_cache(text)
        n = alone["resid_post", 1].shape[1]
        close(cache["resid_post", 1][i, -n:], alone["resid_post", 1][0])
        close(cache["pattern", 0][i, :, -n:, -n:], alone["pattern", 0][0])
        assert (cache["pattern", 0][i, :, -n:, :-n] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("use_past_kv_cache", [False, True])
def test_a_text_continues_as_it_does_alone(model, option, use_past_kv_cache):
    model = model(option)
    how = {
        "max_new_tokens": 2, "do_sample": False, "stop_at_eos": False, "return_type": "tokens",
        "use_past_kv_cache": use_past_kv_cache,
    }  # fmt: skip
    together = model.generate(TEXTS, **how)
    for text, row in zip(TEXTS, together, strict=True):
        alone = model.generate(text, **how)[0]
        assert torch.equal(row[-len(alone) :], alone)
