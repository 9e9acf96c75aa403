"""Where a row begins and ends when it is continued, whatever its special tokens are."""

import pytest
import torch

from tests.conformance.models import theirs

GREEDY = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False}
EVERY_PAD = pytest.mark.parametrize("pad", ["<pad>", "<bos>", "<eos>", None])


def by_hand(model, tokens, n=3):
    for _ in range(n):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


@torch.no_grad()
@EVERY_PAD
@pytest.mark.filterwarnings("ignore:some rows of tokens begin with more pad tokens")
@pytest.mark.parametrize("use_past_kv_cache", [False, True])
def test_a_real_bos_is_never_taken_for_padding(small_model, make_tokenizer, pad, use_past_kv_cache):
    model = small_model("standard", tokenizer=make_tokenizer(pad))
    how = GREEDY | {"use_past_kv_cache": use_past_kv_cache}
    for rows in ([[1, 1, 6], [1, 4, 5]], [[0, 0, 4], [2, 2, 2]]):
        tokens = torch.tensor(rows)
        expected = by_hand(model, tokens)
        assert torch.equal(model.generate(tokens, prepend_bos=False, **how), expected)
        stream = model.generate_stream(tokens, max_tokens_per_yield=1, padding_side="left", **how)
        assert torch.equal(torch.cat(list(stream), 1), expected)
    found = model.generate("<bos> w4", return_type="tokens", **how)
    assert torch.equal(found, by_hand(model, torch.tensor([[1, 1, 4]])))
    model.cfg.default_prepend_bos = False
    assert torch.equal(model.generate(tokens, **how), expected)
    found = model.generate("<bos> w4", return_type="tokens", **how)
    assert torch.equal(found, by_hand(model, torch.tensor([[1, 4]])))


def test_tokens_continue_as_transformer_lens_continues_them(small_model, make_tokenizer):
    model = small_model("plain", tokenizer=make_tokenizer("<bos>"))  # 2.18 misplaces positions
    tokens = torch.tensor([[1, 1, 6], [1, 4, 5]])
    how = GREEDY | {"prepend_bos": False, "use_past_kv_cache": False, "verbose": False}
    assert torch.equal(model.generate(tokens, **how), theirs(model).generate(tokens, **how))


@torch.no_grad()
@EVERY_PAD
@pytest.mark.parametrize("padding_side", ["right", None])
def test_texts_continue_as_each_alone(small_model, make_tokenizer, pad, padding_side):
    """New tokens come on the right, so texts are padded on the left, as in TransformerLens."""
    model = small_model("standard", tokenizer=make_tokenizer(pad))
    how = GREEDY | {"return_type": "tokens", "padding_side": padding_side}
    for texts, prepend_bos in (
        (["w3 w4 w5", "w9", "w6 w7"], True),
        (["w3 w4 w5", "<bos> w9", "<bos> <bos>"], False),
    ):
        together = model.generate(texts, prepend_bos=prepend_bos, **how)
        tokens, mask = model.to_padded_tokens(texts, prepend_bos, padding_side="left")
        assert torch.equal(model.generate(tokens, attention_mask=mask, **how), together)
        for text, row in zip(texts, together, strict=True):
            alone = by_hand(model, model.to_tokens(text, prepend_bos=prepend_bos))[0]
            assert torch.equal(row[-len(alone) :], alone)


def test_there_must_be_a_token_to_go_on_from(small_model, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer())
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for call in (
        lambda: model.generate(torch.tensor([[1, 4, 5], [1, 6, 0]]), attention_mask=mask),
        lambda: model.generate(["w4", ""], prepend_bos=False),
        lambda: model.generate("", prepend_bos=False),
        lambda: list(model.generate_stream("", prepend_bos=False)),
    ):
        with pytest.raises(ValueError, match="every row must end in a token to go on from"):
            call()


@pytest.fixture
def echo(small_model, make_tokenizer):
    """``echo(pad)``: after w3 comes w3, after w4 the end, after w5 w6, which comes after itself."""

    def build(pad):
        model = small_model("bigram_frozen", tokenizer=make_tokenizer(pad))
        with torch.no_grad():
            for parameter in (model.unembed.W_U, model.unembed.b_U, model.bigram.W_B):
                parameter.zero_()
            for token, then in ((3, 3), (4, 2), (5, 6), (6, 6), (2, 7)):
                model.bigram.W_B[token, then] = 9.0
        return model

    return build


@EVERY_PAD
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_ends_where_its_row_ended(echo, make_tokenizer, pad, adds_bos):
    """The texts are written by hand; those of TransformerLens 3.9 are the same."""
    model = echo(pad)
    model.set_tokenizer(make_tokenizer(pad, adds_bos))
    texts, expected = ["w3", "w4", "w8 w4"], ["w3 w3 w3 w3", "w4", "w8 w4"]
    how = {"max_new_tokens": 3, "do_sample": False}
    assert model.generate(texts, **how) == expected
    assert [model.generate(text, **how) for text in texts] == expected
    for n in (1, 2, 25):
        stream = list(model.generate_stream(texts, max_tokens_per_yield=n, **how))
        assert ["".join(parts) for parts in zip(*stream, strict=True)] == expected
    tokens, mask = model.to_padded_tokens(texts, padding_side="left")
    as_text = {"return_type": "str", "attention_mask": mask}
    assert model.generate(tokens, **as_text, **how) == expected
    # without stopping, what comes after the end is text as well
    assert model.generate("w4", stop_at_eos=False, **how).startswith("w4 w7")


def test_a_stop_token_that_is_a_word_is_said_once(echo):
    model = echo("<pad>")
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": [6, 2]}
    assert model.generate(["w5", "w3", "w4"], **how) == ["w5 w6", "w3 w3 w3 w3", "w4"]
    assert model.generate("w5", **how) == "w5 w6"
    assert model.generate("w5 w6", **how) == "w5 w6 w6"  # only what is new can end it
    ids = model.generate(["w5", "w3"], return_type="tokens", **how)
    assert ids.tolist() == [[1, 5, 6, 6, 6], [1, 3, 3, 3, 3]]


@torch.no_grad()
@EVERY_PAD
def test_padding_counts_for_no_frequency_penalty(small_model, make_tokenizer, pad):
    """A row's penalty is for its own tokens, padding is none of them."""
    model = small_model("standard", tokenizer=make_tokenizer(pad))
    model.unembed.b_U[[0, 1, 2]] += 3.0  # all special tokens are likely
    how = {"max_new_tokens": 4, "stop_at_eos": False, "return_type": "tokens"}
    texts = ["w3 w4 w5 w6 w7", "w9"]
    together = model.generate(texts, top_k=1, freq_penalty=1.5, temperature=0.5, **how)
    for text, row in zip(texts, together, strict=True):
        alone = model.to_tokens(text)
        for _ in range(4):
            logits = model(alone)[0, -1] / 0.5 - 1.5 * torch.bincount(alone[0], minlength=30)
            alone = torch.cat([alone, logits.argmax()[None, None]], dim=1)
        assert torch.equal(row[-alone.shape[1] :], alone[0])
