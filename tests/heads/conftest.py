"""What the tests of heads share: a tokenizer that has the families' words, models, datasets."""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def words_tokenizer() -> Any:
    """Every word (with the blank before it), every two digits, and every other sign is a token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    from tl_sparse.heads import words

    texts = [
        *words.IOI,
        *words.PRONOUN,
        *words.PLACES,
        *words.THINGS,
        *words.EVENTS,
        *words.ROLES,
        *words.NAMES,
        *words.NEUTRAL,
        *words.NOUNS,
        *words.FUNCTIONS,
        "The lasted from the year to the year",
        ' he she def (self,):\n    """\n    :param build_index get_state',
    ]
    cut = Split(Regex(r" ?[A-Za-z]+| ?\d\d|\s|[^\w\s]|_"), "isolated")
    pieces = {piece for text in texts for piece, _ in cut.pre_tokenize_str(text)}
    pieces |= {f" {word}" for text in texts for word in text.split() if word.isalpha()}
    pieces |= {f"{blank}{i:02}" for i in range(100) for blank in ("", " ")} | set(" \n_")
    core = Tokenizer(WordLevel(
        {word: i for i, word in enumerate(["<bos>", "<unk>", *sorted(pieces)])}, "<unk>"
    ))  # fmt: skip
    core.pre_tokenizer, core.decoder = cut, Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def speaker(small_model, words_tokenizer) -> Any:
    """A small model that reads the families' words."""
    return small_model(
        tokenizer=words_tokenizer, d_vocab=len(words_tokenizer), n_ctx=64
    )  # fmt: skip


@pytest.fixture
def coded():
    """``coded(values, n_positive, layers=None)``: Codes of [prompt, component] integers."""
    from tl_sparse.heads import Codes, Component

    def build(values: Any, n_positive: int, layers: Any = None, n_codes: int = 50) -> Any:
        values = torch.as_tensor(values)
        values = values[..., None] if values.ndim == 2 else values
        layers = layers or [0] * values.shape[1]
        components = tuple(Component(layer, "head", i) for i, layer in enumerate(layers))
        positive = torch.arange(len(values)) < n_positive
        return Codes(values, n_codes, components, positive, "made", "by hand", 0.0)

    return build
