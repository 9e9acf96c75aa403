"""Text to tokens and back as TransformerLens' own model does it, and padded batches."""

import numpy as np
import pytest
import torch

from tests.conformance.models import build, every_option, expressible, reference
from tl_sparse import compat

TEXTS = ["w5 w9 w20 w4", "w7", "w11 w12"]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("padding_side", [None, "left", "right"])
def test_text_becomes_the_tokens_that_transformer_lens_makes_of_it(
    claim, prepend_bos, padding_side
):
    claim("to_tokens(prepend_bos, padding_side, truncate)", "any", "unchanged")
    model, other = build(), reference("plain")
    how = {"prepend_bos": prepend_bos, "padding_side": padding_side}
    for text in (TEXTS, "w5 w9", ["w3"], "", " ".join(["w8"] * 20)):
        ours = model.to_tokens(text, **how)
        assert torch.equal(ours, other.to_tokens(text, **how)), (text, how)
    long = model.to_tokens("w8 " * 20, truncate=False, **how)
    assert torch.equal(long, other.to_tokens("w8 " * 20, truncate=False, **how))


def test_tokens_become_the_text_that_transformer_lens_makes_of_them(claim):
    claim("to_string, to_str_tokens, to_single_token, …", "any", "unchanged")
    model, other = build(), reference("plain")
    batch = model.to_tokens(TEXTS)
    for tokens in (batch, batch[0], [1, 5, 9], torch.tensor(7), batch.numpy(), [[3, 4], [5, 6]]):
        assert model.to_string(tokens) == other.to_string(tokens), tokens
    for text in ("w5 w9", TEXTS, batch[0], batch[:1], batch[0].numpy(), np.array(4)):
        assert model.to_str_tokens(text) == other.to_str_tokens(text), text
        no_bos = model.to_str_tokens(text, prepend_bos=False)
        assert no_bos == other.to_str_tokens(text, prepend_bos=False)
    assert model.to_single_token("w9") == other.to_single_token("w9") == 9
    assert model.to_single_str_token(9) == other.to_single_str_token(9) == "w9"
    for both in (model, other):
        with pytest.raises(AssertionError):
            both.to_single_token("w9 w4")
    for token, text, mode in (("w9", "w5 w9 w4 w9", "first"), (9, batch[0], "last"),
                              ("w9", "w5 w9 w4 w9", "last")):  # fmt: skip
        place = model.get_token_position(token, text, mode)
        assert place == other.get_token_position(token, text, mode)
    for both in (model, other):
        with pytest.raises(AssertionError):
            both.get_token_position("w29", "w5 w9")


@every_option
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_text_of_a_padded_batch_gets_the_logits_that_it_gets_alone(claim, option, side):
    claim("padded batches (left, right)", option, "unchanged")
    model = build(option)
    together = model(TEXTS, padding_side=side)
    for text, row in zip(TEXTS, together, strict=True):
        alone = model(text)[0]
        close(row[-len(alone) :] if side == "left" else row[: len(alone)], alone)
    if expressible(option) and side == "right":
        close(model(TEXTS), reference(option)(TEXTS))
    if option == "standard" and side == "left" and compat.HAS_HOOKED_TRANSFORMER:
        real = model.to_tokens(TEXTS, padding_side=side) != 0
        theirs = reference(option)(TEXTS, padding_side=side)
        close(together[real], theirs[real])


@every_option
def test_an_attention_mask_hides_what_it_masks(claim, option):
    claim("forward(attention_mask)", option, "unchanged")
    model = build(option)
    tokens = torch.tensor([[14, 15, 1, 5, 9], [1, 5, 9, 20, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    logits = model(tokens, attention_mask=mask)
    close(logits[0, 2:], model(tokens[:1, 2:])[0])
    close(logits[1], model(tokens[1:])[0])
    other_pads = tokens.clone()
    other_pads[0, :2] = 22
    close(model(other_pads, attention_mask=mask)[0, 2:], logits[0, 2:])


@every_option
def test_a_key_value_cache_continues_where_the_run_before_it_ended(claim, option):
    claim("forward(past_kv_cache), input_to_embed", option, "unchanged")
    model = build(option)
    tokens = torch.tensor([[1, 5, 12, 9, 21, 4], [1, 20, 7, 5, 3, 8]])
    whole = model(tokens)
    cache = compat.KeyValueCache.init_cache(model.cfg, model.cfg.device, 2)
    pieces = [model(tokens[:, a:b], past_kv_cache=cache) for a, b in ((0, 3), (3, 4), (4, 6))]
    close(torch.cat(pieces, 1), whole)
    resid, ids, shortformer, _ = model.input_to_embed(tokens)
    assert shortformer is None
    assert torch.equal(ids, tokens)
    assert torch.equal(resid, model(tokens, stop_at_layer=0))
    if expressible(option) and compat.HAS_HOOKED_TRANSFORMER:
        close(resid, reference(option).input_to_embed(tokens)[0])
