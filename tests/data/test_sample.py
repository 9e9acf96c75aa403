import numpy as np
import pytest

from tl_sparse.data import CorpusConfig, build_corpus, sample, validation_text
from tl_sparse.data.sources import is_validation


@pytest.fixture(scope="module")
def config(sixty_sources):
    return CorpusConfig(sources=(str(sixty_sources),), idiom_share=0.3)


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return build_corpus(config, tmp_path_factory.mktemp("cache"), progress=False)


def held_out_stream(config, tokenizer):
    """The held-out files in order of their names, each after BOS, encoded here and now."""
    (folder,) = config.sources
    stream = []
    for path in sorted(sample_path(folder)):
        text = path.read_text()
        if is_validation(text, config.seed, config.validation_share):
            stream += [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    return stream


def sample_path(folder):
    from pathlib import Path

    return Path(folder).iterdir()


def test_sequences_are_windows_of_the_held_out_files(config, corpus):
    tokenizer = corpus.tokenizer
    found = validation_text(config, tokenizer, 7, 16)
    assert found.shape == (7, 16)
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    stream = held_out_stream(config, tokenizer)
    starts = np.unique(np.linspace(0, len(stream) - 16, 7).astype(int))
    for row, start in zip(found.tolist(), starts, strict=True):
        assert row[1:] == stream[start + 1 : start + 16]


def test_the_text_is_what_a_corpus_validates_on(config, corpus):
    # no file is a copy of another: the corpus holds out the same tokens, in another order
    ours = held_out_stream(config, corpus.tokenizer)
    assert sorted(ours) == sorted(corpus.validation.tolist())


def test_no_more_is_read_than_needed(config, corpus, monkeypatch):
    read = []
    real = sample.read_source

    def counting(*args, **kwargs):
        for document in real(*args, **kwargs):
            read.append(document)
            yield document

    monkeypatch.setattr(sample, "read_source", counting)
    monkeypatch.setattr("tl_sparse.data.tokens._BATCH", 1)
    first = next(i for i, d in enumerate(real(config.sources[0]))
                 if is_validation(d.text, config.seed, config.validation_share))  # fmt: skip
    validation_text(config, corpus.tokenizer, 1, 4)
    assert len(read) == first + 1


def test_other_tokenizers_cut_the_same_text(config, corpus):
    import tl_sparse as tls

    tokenizer = tls.SparseTransformer.from_pretrained("python-dense").tokenizer
    found = validation_text(config, tokenizer, 3, 16)
    assert found.shape == (3, 16)
    assert int(found.max()) < len(tokenizer)


def test_too_little_text_and_bad_numbers_are_refused(config, corpus):
    with pytest.raises(ValueError, match="fewer than one sequence of 9999999"):
        validation_text(config, corpus.tokenizer, 1, 9_999_999)
    for sequences, context in ((0, 8), (3, 1)):
        with pytest.raises(ValueError, match=f"sequences={sequences}"):
            validation_text(config, corpus.tokenizer, sequences, context)
