import pytest
import torch
import torch.nn.functional as F

from tl_sparse.compat import KeyValueCache

POSITIONS = ["plain", "standard", "concat", "sinusoidal"]
SMOOTH = ["plain", "standard", "concat", "sinusoidal", "sinks", "bigram_learned", "layer_norm"]


# --------------------------------------------------------------------------------------------------
# inputs and outputs


def test_return_types(small_model, tokens):
    model = small_model()
    logits = model(tokens)
    loss = model(tokens, return_type="loss")
    assert logits.shape == (2, 8, 30)
    assert model(tokens, return_type=None) is None
    both = model(tokens, return_type="both")
    assert torch.equal(both.logits, logits)
    assert torch.equal(both.loss, loss)
    log_probs = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, -log_probs.mean())
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(per_token, -log_probs)
    torch.testing.assert_close(model.loss_fn(logits, tokens), loss)


def test_unknown_return_type_names_the_types(small_model, tokens):
    with pytest.raises(ValueError, match=r"return_type='logit' is unknown; choose from.*'both'"):
        small_model()(tokens, return_type="logit")


def test_loss_counts_real_tokens_only(small_model, tokens):
    model = small_model()
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    masked = model(tokens, return_type="loss", attention_mask=mask)
    rows = [model(tokens[:1, :5], return_type="loss", loss_per_token=True)[0],
            model(tokens[1:], return_type="loss", loss_per_token=True)[0]]  # fmt: skip
    torch.testing.assert_close(masked, torch.cat(rows).mean(), atol=1e-5, rtol=1e-5)
    per_token = model(tokens, return_type="loss", attention_mask=mask, loss_per_token=True)
    assert (per_token[0, 4:] == 0).all()


def test_logits_and_tokens_of_a_loss_are_of_one_shape(small_model, tokens):
    model = small_model()
    logits = model(tokens)
    for other in (tokens[:1], tokens[:, 1:], torch.zeros(7, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="do not belong to tokens of shape"):
            model.loss_fn(logits, other)


def test_loss_of_a_half_precision_model_is_single_and_of_a_double_model_double(small_model, tokens):
    model = small_model()
    assert model.bfloat16()(tokens, return_type="loss").dtype == torch.float32
    assert model.double()(tokens, return_type="loss").dtype == torch.float64


def test_one_row_of_tokens_is_a_batch_of_one(small_model, tokens):
    model = small_model()
    assert torch.equal(model(tokens[0]), model(tokens[:1]))
    assert torch.equal(model(tokens[0].int()), model(tokens[:1]))


def test_strings_are_tokenized(small_model, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer())
    expected = model(torch.tensor([[1, 4, 5]]))
    assert torch.equal(model("w4 w5"), expected)
    assert torch.equal(model(["w4 w5"]), expected)
    assert model(["w4 w5"], prepend_bos=False).shape[1] == 2


def test_a_residual_stream_without_start_at_layer_is_refused(small_model):
    with pytest.raises(ValueError, match="needs start_at_layer"):
        small_model()(torch.randn(1, 4, 16))


def test_too_long_an_input_is_refused(small_model):
    with pytest.raises(ValueError, match="13 tokens do not fit n_ctx=12"):
        small_model()(torch.zeros(1, 13, dtype=torch.long))


# --------------------------------------------------------------------------------------------------
# starting and stopping at a layer


def test_stopping_and_starting_again_gives_the_same_bits(small_model, tokens, option):
    model = small_model(option)
    logits, cache = model.run_with_cache(tokens)
    for layer in range(3):
        resid = model(tokens, stop_at_layer=layer)
        name = "blocks.1.hook_resid_post" if layer == 2 else f"blocks.{layer}.hook_resid_pre"
        assert torch.equal(resid, cache[name])
        assert torch.equal(model(resid, start_at_layer=layer, tokens=tokens), logits)
    middle = model(model(tokens, stop_at_layer=1), start_at_layer=1, stop_at_layer=2)
    assert torch.equal(middle, cache["blocks.1.hook_resid_post"])
    assert torch.equal(model(tokens, stop_at_layer=-1), cache["blocks.1.hook_resid_pre"])


@pytest.mark.parametrize("option", ["plain", "together"])
def test_starting_at_a_layer_of_a_padded_batch(small_model, tokens, option):
    model = small_model(option)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    resid = model(tokens, stop_at_layer=1, attention_mask=mask)
    logits = model(resid, start_at_layer=1, tokens=tokens, attention_mask=mask)
    assert torch.equal(logits, model(tokens, attention_mask=mask))


@pytest.mark.parametrize("option", ["bigram_frozen", "bigram_learned"])
def test_bigram_table_without_tokens_is_refused_not_dropped(small_model, tokens, option):
    model = small_model(option)
    resid = model(tokens, stop_at_layer=1)
    with pytest.raises(ValueError, match="bigram table needs tokens="):
        model(resid, start_at_layer=1)
    assert model(resid, start_at_layer=1, stop_at_layer=2).shape == resid.shape


def test_loss_of_a_residual_stream_needs_tokens(small_model, tokens):
    model = small_model()
    resid = model(tokens, stop_at_layer=1)
    assert torch.equal(model(resid, start_at_layer=1), model(tokens))
    with pytest.raises(ValueError, match="needs tokens="):
        model(resid, start_at_layer=1, return_type="loss")
    loss = model(resid, start_at_layer=1, return_type="loss", tokens=tokens)
    assert torch.equal(loss, model(tokens, return_type="loss"))


# --------------------------------------------------------------------------------------------------
# padding


def padded_batch(pad):
    """Rows of 6, 4 and 1 tokens, padded on the left to 6, and their mask."""
    rows = [torch.arange(3, 9), torch.arange(10, 14), torch.tensor([20])]
    tokens = torch.stack([F.pad(row, (6 - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (6 - len(row), 0)) for row in rows])
    return rows, tokens, mask


@pytest.mark.parametrize("option", SMOOTH)
@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool])
def test_left_padding_does_not_change_real_logits(small_model, option, mask_dtype):
    model = small_model(option)
    rows, tokens, mask = padded_batch(pad=0)
    logits = model(tokens, attention_mask=mask.to(mask_dtype))
    assert logits.isfinite().all()
    for row, padded in zip(rows, logits, strict=True):
        alone = model(row[None])[0]
        torch.testing.assert_close(padded[-len(row) :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", POSITIONS)
def test_right_padding_does_not_change_real_logits(small_model, option):
    model = small_model(option)
    tokens = torch.tensor([[4, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    logits = model(tokens, attention_mask=mask)[:, :3]
    torch.testing.assert_close(logits, model(tokens[:, :3]), atol=1e-5, rtol=1e-5)


def test_a_mask_of_ones_is_no_mask(small_model, tokens, option):
    model = small_model(option)
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)), model(tokens))


@pytest.mark.parametrize("option", POSITIONS)
@pytest.mark.parametrize("pad", ["<pad>", "<bos>", "<eos>"])
def test_left_padded_strings_find_their_own_mask(small_model, make_tokenizer, option, pad):
    model = small_model(option, tokenizer=make_tokenizer(pad))
    texts = ["w3 w4 w5 w6", "w7 w8", "w9"]
    logits = model(texts, padding_side="left")
    for text, padded in zip(texts, logits, strict=True):
        alone = model(text)[0]
        torch.testing.assert_close(padded[-len(alone) :], alone, atol=1e-5, rtol=1e-5)
    model.set_tokenizer(model.tokenizer, default_padding_side="left")
    assert torch.equal(model(texts), logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("start", [[1, 1], [0, 1], [0, 0]])
def test_token_ids_are_never_masked_by_what_they_are(small_model, make_tokenizer, side, start):
    """As TransformerLens 4 does it; 3.9 masks leading pad tokens if the tokenizer pads left."""
    plain = small_model("standard")
    model = small_model("standard", tokenizer=make_tokenizer("<bos>" if start[0] else "<pad>"))
    model.padding_side = side
    model.cfg.default_prepend_bos = False
    tokens = torch.tensor([[*start, 5], [*start, 6]])
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model.input_to_embed(tokens)[0], plain(tokens, stop_at_layer=0))
    loss = model(tokens, return_type="loss")
    assert torch.equal(loss, plain(tokens, return_type="loss"))


@pytest.mark.parametrize("pad", ["<pad>", "<bos>", None])
def test_token_ids_that_look_padded_and_have_no_mask_are_warned_of(
    small_model, make_tokenizer, recwarn, pad
):
    model = small_model(tokenizer=make_tokenizer(pad))
    tokens, mask = model.to_padded_tokens(["w3 w4", "w5"], padding_side="left")
    model(tokens)
    model.padding_side = "left"
    model(tokens, attention_mask=mask)
    model(tokens[:1])
    model(["w3 w4", "w5"])
    assert not recwarn
    for call in (
        lambda: model(tokens),
        lambda: model.generate(tokens, padding_side="right", max_new_tokens=1),
    ):
        with pytest.warns(UserWarning, match="pass the attention_mask that"):
            call()


def wrong_masks(batch, n):
    """Masks that do not belong to a batch of tokens."""
    ones = torch.ones(batch, n, dtype=torch.long)
    each_pair = ones[:, None] * ones[..., None]
    shapes = [ones[:1], ones[0], ones[:, 1:], ones.T, ones[:, None, None], each_pair]
    values = [ones * -1e9, 2 * ones, 0.5 * ones]
    return [*shapes, torch.cat([ones, ones], 1), *values]


@pytest.mark.parametrize("wrong", range(10))
def test_a_mask_that_is_not_one_entry_for_each_token_is_refused(small_model, tokens, wrong):
    model = small_model("standard")
    mask, logits = wrong_masks(*tokens.shape)[wrong], model(tokens)
    for call in (
        lambda: model(tokens, attention_mask=mask),
        lambda: model(tokens, return_type="loss", attention_mask=mask),
        lambda: model(logits[..., :16], start_at_layer=1, tokens=tokens, attention_mask=mask),
        lambda: model.loss_fn(logits, tokens, mask),
        lambda: model.loss_fn(logits, tokens, mask, per_token=True),
        lambda: model.input_to_embed(tokens, attention_mask=mask),
        lambda: model.get_residual(model.embed(tokens), 0, attention_mask=mask),
        lambda: model.generate(tokens, 1, stop_at_eos=False, attention_mask=mask),
    ):
        with pytest.raises(ValueError, match="attention_mask"):
            call()


def test_unknown_padding_side_names_the_sides(small_model, make_tokenizer):
    model = small_model(tokenizer=make_tokenizer())
    for call in (
        lambda: model("w3", padding_side="middle"),
        lambda: model.to_tokens("w3", padding_side="middle"),
        lambda: model.set_tokenizer(model.tokenizer, default_padding_side="middle"),
    ):
        with pytest.raises(ValueError, match=r"padding_side='middle' is unknown.*'left', 'right'"):
            call()


@pytest.mark.parametrize("option", ["standard", "together"])
def test_input_to_embed_is_the_stream_before_block_0(small_model, make_tokenizer, option):
    model = small_model(option, tokenizer=make_tokenizer())
    texts = ["w3 w4 w5", "w6"]
    resid, tokens, shortformer, mask = model.input_to_embed(texts, padding_side="left")
    assert shortformer is None
    assert torch.equal(resid, model(texts, padding_side="left", stop_at_layer=0))
    logits = model(resid, start_at_layer=0, tokens=tokens, attention_mask=mask)
    assert torch.equal(logits, model(texts, padding_side="left"))


@pytest.mark.parametrize("padding", [0, 2])
def test_input_to_embed_continues_after_a_cache(small_model, tokens, padding):
    model = small_model("standard")
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    model(tokens[:, :5], attention_mask=mask[:, :5], past_kv_cache=cache)
    resid, *_ = model.input_to_embed(tokens[:, 5:], past_kv_cache=cache)
    whole = model(tokens, attention_mask=mask, stop_at_layer=0)
    assert torch.equal(resid, whole[:, 5:])


def test_input_to_embed_needs_no_tokenizer(small_model, tokens):
    model = small_model("standard")
    with pytest.warns(UserWarning, match="'left' is not kept without a tokenizer"):
        model.padding_side = "left"
    assert torch.equal(model.input_to_embed(tokens)[0], model(tokens, stop_at_layer=0))


# --------------------------------------------------------------------------------------------------
# generation


@pytest.mark.parametrize("option", SMOOTH)
def test_a_cache_gives_the_logits_of_the_whole_sequence(small_model, tokens, option):
    model = small_model(option)
    whole = model(tokens)
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    pieces = [model(tokens[:, a:b], past_kv_cache=cache) for a, b in ((0, 3), (3, 4), (4, 8))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="13 tokens do not fit n_ctx=12"):
        model(tokens[:, :5], past_kv_cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("option", SMOOTH)
@pytest.mark.parametrize("padding", [0, 2])
def test_a_cache_continues_residual_streams_at_any_layer(small_model, tokens, option, padding):
    model, n_layers = small_model(option), 2
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    whole, acts = model.run_with_cache(tokens, attention_mask=mask)
    for layer in range(n_layers + 1):
        stream = acts["resid_post", 1] if layer == n_layers else acts["resid_pre", layer]
        cache = KeyValueCache.init_cache(model.cfg, "cpu", 2)
        pieces = [model(tokens[:, :3], attention_mask=mask[:, :3], past_kv_cache=cache)]
        for start, stop in ((3, 5), (5, 8)):
            here = slice(start, stop)
            pieces.append(
                model(stream[:, here], start_at_layer=layer, tokens=tokens[:, here],
                      past_kv_cache=cache)
            )  # fmt: skip
        torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("says_it_twice", [False, True])
def test_a_cache_of_blocks_that_run_one_after_the_other(small_model, tokens, says_it_twice):
    """Lower blocks first, in two parts, then upper ones: the padding is remembered."""
    model, mask = small_model("standard"), torch.ones_like(tokens)
    mask[0, :2] = 0
    whole = model(tokens, attention_mask=mask)
    loss = model(tokens, attention_mask=mask, return_type="loss")
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    lower = [
        model(tokens[:, a:b], attention_mask=mask[:, a:b], past_kv_cache=cache, stop_at_layer=1)
        for a, b in ((0, 3), (3, 8))
    ]
    with pytest.raises(ValueError, match=r"has seen \[8, 0\] tokens in blocks \[0, 1\]"):
        model(tokens[:, :1], past_kv_cache=cache)
    upper = {"start_at_layer": 1, "tokens": tokens, "past_kv_cache": cache}
    given = {"attention_mask": mask} if says_it_twice else {}
    found = model(torch.cat(lower, 1), **upper, **given, return_type="both")
    torch.testing.assert_close(found.logits[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(cache.previous_attention_mask, mask)


@torch.no_grad()
def test_a_mask_may_cover_what_a_cache_has_seen(small_model, tokens):
    model, mask = small_model("standard"), torch.ones_like(tokens)
    mask[0, :2] = 0
    cache = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    first = model(tokens[:, :5], attention_mask=mask[:, :5], past_kv_cache=cache)
    cache.freeze()
    for later in (mask, mask[:, 5:]):
        rest = model(tokens[:, 5:], attention_mask=later, past_kv_cache=cache)
        whole = model(tokens, attention_mask=mask)
        torch.testing.assert_close(torch.cat([first, rest], 1)[mask.bool()], whole[mask.bool()],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
        assert cache.previous_attention_mask.shape == (2, 5)


@pytest.mark.parametrize("option", SMOOTH)
def test_greedy_generation_with_and_without_cache_is_step_by_step_argmax(
    small_model, tokens, option
):
    model = small_model(option)
    prompt = tokens[:, :3]
    options = {"max_new_tokens": 7, "do_sample": False, "stop_at_eos": False}
    expected = prompt
    for _ in range(7):
        expected = torch.cat([expected, model(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    for use_cache in (False, True):
        out = model.generate(prompt, use_past_kv_cache=use_cache, **options)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("use_cache", [False, True])
def test_padded_prompts_continue_as_each_alone(small_model, make_tokenizer, use_cache):
    model = small_model("standard", tokenizer=make_tokenizer())
    texts = ["w3 w4 w5", "w9"]
    options = {
        "max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "return_type": "tokens",
        "use_past_kv_cache": use_cache,
    }  # fmt: skip
    together = model.generate(texts, **options)
    for text, row in zip(texts, together, strict=True):
        alone = model.generate(text, **options)[0]
        assert torch.equal(row[-len(alone) :], alone)


def test_generation_stops_at_eos_and_fills_up_with_it(small_model, tokens):
    model = small_model()
    prompt = tokens[:, :2]
    free = model.generate(prompt, max_new_tokens=9, do_sample=False, stop_at_eos=False)
    eos = int(free[0, 3])
    out = model.generate(prompt, max_new_tokens=9, do_sample=False, eos_token_id=eos)
    for row, plain in zip(out[:, 2:], free[:, 2:], strict=True):
        hits = (plain == eos).nonzero().flatten().tolist()
        end = hits[0] if hits else len(row)
        assert torch.equal(row[: end + 1], plain[: min(end + 1, len(row))])
        assert (row[end:] == eos).all()
    alone = model.generate(prompt[:1], max_new_tokens=9, do_sample=False, eos_token_id=eos)
    assert alone[0, -1] == eos
    assert (alone[0, 2:-1] != eos).all()


def test_eos_needs_to_be_known(small_model, tokens):
    with pytest.raises(ValueError, match="stop_at_eos needs eos_token_id="):
        small_model().generate(tokens, max_new_tokens=1)


def test_generation_beyond_the_context_is_refused(small_model, tokens):
    model = small_model()
    full = model.generate(tokens, max_new_tokens=4, stop_at_eos=False)
    assert full.shape == (2, 12)
    with pytest.raises(ValueError, match="max_new_tokens=5 do not fit n_ctx=12"):
        model.generate(tokens, max_new_tokens=5, stop_at_eos=False)


def test_generation_returns_what_it_was_given(small_model, make_tokenizer, tokens):
    model = small_model(tokenizer=make_tokenizer())
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False}
    text = model.generate("w3 w4", **options)
    ids = model.generate("w3 w4", return_type="tokens", **options)
    assert text.startswith("w3 w4")
    assert text == model.to_string([token for token in ids[0].tolist() if token not in (0, 1)])
    assert isinstance(model.generate(["w3", "w4 w5"], **options), list)
    assert isinstance(model.generate(tokens[:, :3], **options), torch.Tensor)
    assert isinstance(model.generate(tokens[:1, :3], return_type="str", **options), list)
    with pytest.raises(ValueError, match="choose from 'input', 'str', 'tokens'"):
        model.generate("w3", return_type="string")
    with pytest.raises(ValueError, match="has no tokenizer"):
        small_model().generate(tokens[:, :3], return_type="str", **options)


@pytest.mark.parametrize(("per_yield", "lengths"), [(1, [4, 1, 1, 1]), (3, [4, 3]), (25, [7])])
def test_generate_stream_yields_what_generate_returns_in_pieces(
    small_model, make_tokenizer, tokens, per_yield, lengths
):
    model = small_model(tokenizer=make_tokenizer())
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    pieces = list(model.generate_stream(tokens[:, :3], max_tokens_per_yield=per_yield, **options))
    assert [piece.shape[1] for piece in pieces] == lengths
    assert torch.equal(torch.cat(pieces, 1), model.generate(tokens[:, :3], **options))
    pieces = list(model.generate_stream("w3 w4", max_tokens_per_yield=per_yield, **options))
    assert "".join(pieces) == model.generate("w3 w4", **options)


def test_generation_stops_at_any_of_several_tokens(small_model, tokens):
    model = small_model()
    options = {"max_new_tokens": 9, "do_sample": False}
    free = model.generate(tokens[:1, :2], stop_at_eos=False, **options)
    ends = [int(free[0, 5]), int(free[0, 3])]
    out = model.generate(tokens[:1, :2], eos_token_id=ends, **options)
    first = min(i for i in range(2, 11) if int(free[0, i]) in ends)
    assert torch.equal(out, free[:, : first + 1])


def test_sampling_is_seeded_by_torch(small_model, tokens):
    model = small_model()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model.generate(tokens[:, :3], max_new_tokens=8, stop_at_eos=False))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.manual_seed(1)
    greedy = model.generate(tokens[:, :3], max_new_tokens=8, stop_at_eos=False, top_k=1)
    assert torch.equal(
        greedy, model.generate(tokens[:, :3], max_new_tokens=8, stop_at_eos=False, do_sample=False)
    )


def test_hooks_act_during_generation(small_model, tokens):
    model = small_model()
    force = ("ln_final.hook_normalized", lambda x, hook: x * 0.0)
    with model.hooks(fwd_hooks=[force]):
        out = model.generate(tokens[:, :3], max_new_tokens=3, do_sample=False, stop_at_eos=False)
    assert (out[:, 3:] == model.b_U.argmax()).all()
