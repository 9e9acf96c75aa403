import pytest
import torch

from tl_sparse.nodes import bigram_row, channel_tokens, extreme_tokens
from tl_sparse.nodes.tokens import token_texts


@pytest.fixture
def model(small_model, make_tokenizer):
    model = small_model("together", tokenizer=make_tokenizer(), d_vocab=34)
    with torch.no_grad():
        for parameter in (model.embed.W_E, model.unembed.W_U, model.bigram.W_B):
            parameter.zero_()
        for token, weight in ((7, 0.5), (12, -2.0), (31, 1.0)):  # 31 has no token
            model.embed.W_E[token, 5] = weight
        model.unembed.W_U[5, 9], model.unembed.W_U[5, 4] = 0.25, -0.75
        model.bigram.W_B[7, 3], model.bigram.W_B[7, 33] = 1.5, -3.0
    return model


def test_planted_rows_come_back_in_order_and_ids_without_a_token_are_marked(model):
    frame = channel_tokens(model, 5)
    assert frame["role"].tolist() == ["writes"] * 3 + ["reads"] * 2
    assert frame["token"].tolist() == [12, 31, 7, 4, 9]
    assert frame["text"].tolist() == ["w12", None, "w7", "w4", "w9"]
    assert frame["has_token"].tolist() == [True, False, True, True, True]
    assert frame["weight"].tolist() == [-2.0, 1.0, 0.5, -0.75, 0.25]
    norm = model.ln_final.w[5].item()
    assert frame["effective"].tolist() == pytest.approx([-2.0, 1.0, 0.5, -0.75 * norm, 0.25 * norm])
    assert channel_tokens(model, 5, k=1)["token"].tolist() == [12, 4]
    assert channel_tokens(model, 6).empty


def test_any_node_at_the_channel_means_it(model):
    expected = channel_tokens(model, 5)
    for name in ("1.attn.act_in:5", "0.mlp.resid_delta:5", "final_resid:5", (1, "mlp_in", 5)):
        assert channel_tokens(model, name).equals(expected)


def test_what_is_no_channel_of_the_stream_is_refused(model):
    for name, words in {
        "0.mlp.post_act:5": "is no channel of the residual stream", "L0H1.v3": "is no channel",
        "0.attn.act_in:17": "channels 0 to 15", 16: "channels 0 to 15", -1: "channels 0 to 15",
        "0.attn.act_in:20": "channels 0 to 19",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            channel_tokens(model, name)
    with pytest.raises(ValueError, match="at least 1"):
        channel_tokens(model, 5, k=0)


def test_the_bigram_row_of_a_token(model, small_model):
    frame = bigram_row(model, 7)
    assert frame["token"].tolist() == [33, 3]
    assert frame["text"].tolist() == [None, "w3"]
    assert bigram_row(model, "w7").equals(frame)
    assert bigram_row(model, 7, k=1).equals(frame.head(1))
    with pytest.raises(ValueError, match="0 to 33"):
        bigram_row(model, 34)
    with pytest.raises(ValueError, match=r"'w7 w8' is 2 tokens"):
        bigram_row(model, "w7 w8")
    with pytest.raises(ValueError, match="no bigram table"):
        bigram_row(small_model("plain"), 7)


def test_a_model_without_a_tokenizer_has_ids_alone(small_model):
    frame = channel_tokens(small_model("plain", zeros=0.5), 5)
    assert frame["text"].isna().all()
    assert len(frame)
    with pytest.raises(ValueError, match="no tokenizer"):
        bigram_row(small_model("together"), "w7")


def test_a_tokenizer_that_raises_for_an_empty_id_is_caught():
    class Strict:
        def convert_ids_to_tokens(self, token):
            raise KeyError(token)

    assert token_texts(Strict(), torch.tensor([1, 2])) == [None, None]


def test_many_channels_at_once_have_their_largest_and_smallest_weights(model):
    frame = extreme_tokens(model, torch.tensor([5, 2, 5, model.config.d_model]), k=2)
    assert set(frame["channel"]) == {5}  # 2 has no weight, and the last is a position
    writes = frame[frame["role"] == "writes"]
    assert writes["token"].tolist() == [31, 7, 12]
    assert writes["weight"].tolist() == [1.0, 0.5, -2.0]
    assert writes["text"].isna().tolist() == [True, False, False]
    reads = frame[frame["role"] == "reads"]
    scale = model.ln_final.w[5].item()
    assert reads["token"].tolist() == [9, 4]
    assert reads["effective"].tolist() == pytest.approx([0.25 * scale, -0.75 * scale])
    with pytest.raises(ValueError, match="count on from 0"):
        extreme_tokens(model, torch.tensor([-1]))


def test_a_token_of_half_a_letter_is_its_bytes():
    from tl_sparse.nodes.tokens import bytes_text, token_text

    class Half:
        """A tokenizer whose one token is the first two of the three bytes of a euro sign."""

        def convert_ids_to_tokens(self, token):
            return "\u00e2\u0124"  # as GPT-2 writes the bytes e2 and 82

        def decode(self, ids):
            return b"\xe2\x82".decode(errors="replace")

    assert token_text(Half(), 0) == r"\xe2\x82"
    assert bytes_text("\u2581\u20ac", "\ufffd") == "\ufffd"  # of another kind of vocabulary
