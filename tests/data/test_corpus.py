import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tl_sparse.data import (
    CorpusConfig,
    TokenizedCorpus,
    build_corpus,
    default_cache_dir,
    idiom_documents,
)
from tl_sparse.data import corpus as build_module
from tl_sparse.data.tokens import encode_documents


def documents(corpus: TokenizedCorpus, stream: np.ndarray) -> list[str]:
    ids = stream[:].astype(np.int64)
    starts = np.flatnonzero(ids == corpus.tokenizer.bos_token_id)
    return [corpus.tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts)[1:]]


def real_texts(folder: Path) -> dict[str, str]:
    return {path.read_text(encoding="utf-8"): path.name for path in folder.glob("*.py")}


def test_streams_start_with_the_separator_and_decode_to_the_documents(corpus, folder):
    texts = real_texts(folder)
    for stream in (corpus.train, corpus.validation):
        assert stream.dtype == np.uint16
        assert stream[0] == corpus.tokenizer.bos_token_id
        assert stream[-1] != corpus.tokenizer.bos_token_id
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert set(validation) <= set(texts)
    assert {text for text in train if text in texts} | set(validation) == set(texts)


def test_no_text_is_in_both_parts(corpus, folder):
    validation = set(documents(corpus, corpus.validation))
    assert validation
    assert not validation & set(documents(corpus, corpus.train))


def test_validation_is_real_text_only_and_idioms_have_their_share(corpus, folder):
    texts = real_texts(folder)
    generated = [text for text in documents(corpus, corpus.train) if text not in texts]
    tokens = sum(len(corpus.tokenizer.encode(text)) + 1 for text in generated)
    assert tokens == corpus.stats.tokens_idiom
    assert tokens / len(corpus.train) == pytest.approx(0.4, abs=0.01)


def test_idioms_are_spread_over_the_whole_training_stream(corpus, folder):
    texts = real_texts(folder)
    kinds = [text in texts for text in documents(corpus, corpus.train)]
    half = len(kinds) // 2
    assert abs(np.mean(kinds[:half]) - np.mean(kinds[half:])) < 0.15
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 15


def test_stats_count_what_is_there(corpus, folder):
    stats = corpus.stats
    assert stats.files_train + stats.files_validation == 40
    assert stats.tokens_train == len(corpus.train)
    assert stats.tokens_validation == len(corpus.validation)
    assert stats.bytes == sum(len(text.encode()) for text in real_texts(folder))
    assert (stats.files_skipped, stats.duplicates_dropped, stats.files_over_limit) == (0, 0, 0)


def test_another_seed_gives_another_corpus(config, corpus, tmp_path):
    other = build_corpus(replace(config, seed=1), tmp_path, progress=False)
    assert other.fingerprint != corpus.fingerprint
    assert not np.array_equal(other.validation, corpus.validation)


def test_a_corpus_of_the_first_mix_keeps_the_name_it_had_before_there_were_two(config):
    documents, _ = build_module._read(config, progress=False)
    settings = asdict(config)
    assert settings.pop("idioms") == "first"
    versions = {name: version(name) for name in ("tl-sparse", "tokenizers")}
    sample = "".join(idiom_documents(config.seed, 20_000))
    digest = hashlib.sha256(json.dumps([settings, versions, sample]).encode())
    for document in documents:
        digest.update(hashlib.sha256(document.text.encode()).digest())
    assert build_module._fingerprint(config, documents, None) == digest.hexdigest()


def test_a_corpus_made_before_there_were_two_mixes_still_opens(corpus, tmp_path):
    copy = shutil.copytree(corpus.directory, tmp_path / "corpus")
    values = json.loads((copy / "corpus.json").read_text())
    assert values["config"].pop("idioms") == "first"
    (copy / "corpus.json").write_text(json.dumps(values))
    assert TokenizedCorpus.load(copy).config == corpus.config


def test_an_unknown_mix_names_the_choices():
    config = CorpusConfig()
    object.__setattr__(config, "idioms", "third")  # past the check of types that tests run with
    with pytest.raises(ValueError, match="idioms='third' is unknown: choose from first, second"):
        config.__post_init__()


def test_the_second_mix_makes_another_corpus_of_its_own_idioms(config, corpus, tmp_path, folder):
    second = build_corpus(replace(config, idioms="second"), tmp_path, progress=False)
    assert second.fingerprint != corpus.fingerprint
    assert second.config.idioms == "second"
    texts = real_texts(folder)
    generated = [text for text in documents(second, second.train) if text not in texts]
    expected = list(idiom_documents(config.seed, sum(map(len, generated)), "second"))
    assert sorted(generated) == sorted(expected[: len(generated)])
    assert set(documents(second, second.validation)) == set(documents(corpus, corpus.validation))


def test_the_second_call_reads_the_cache(config, corpus):
    before = (corpus.directory / "train.bin").stat().st_mtime_ns
    again = build_corpus(config, corpus.directory.parent, progress=False)
    assert again.directory == corpus.directory
    assert (again.directory / "train.bin").stat().st_mtime_ns == before


def test_changed_text_is_not_served_from_the_cache(tmp_path, folder, config):
    copies = shutil.copytree(folder, tmp_path / "copies")
    config = replace(config, sources=(str(copies),), idiom_share=0.0)
    first = build_corpus(config, tmp_path, progress=False)
    (copies / "module_00.py").write_text("changed = True\n")
    assert build_corpus(config, tmp_path, progress=False).fingerprint != first.fingerprint


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json", "corpus.json"])
def test_a_file_cut_short_is_refused(corpus, tmp_path, name):
    copy = shutil.copytree(corpus.directory, tmp_path / "corpus")
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=name):
        TokenizedCorpus.load(copy)


def test_a_changed_byte_is_noticed(corpus, tmp_path):
    copy = shutil.copytree(corpus.directory, tmp_path / "corpus")
    whole = (copy / "train.bin").read_bytes()
    (copy / "train.bin").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"train\.bin is missing, cut short or altered"):
        TokenizedCorpus.load(copy)


def test_a_missing_file_is_noticed(corpus, tmp_path):
    copy = shutil.copytree(corpus.directory, tmp_path / "corpus")
    (copy / "validation.bin").unlink()
    with pytest.raises(ValueError, match=r"validation\.bin is missing"):
        TokenizedCorpus.load(copy)


def test_an_index_with_foreign_fields_is_refused(corpus, tmp_path):
    copy = shutil.copytree(corpus.directory, tmp_path / "corpus")
    index = json.loads((copy / "corpus.json").read_text())
    index["config"]["surprise"] = 1
    (copy / "corpus.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"unknown CorpusConfig key.* surprise"):
        TokenizedCorpus.load(copy)


def test_a_damaged_cache_is_built_again(config, corpus, tmp_path):
    copy = shutil.copytree(corpus.directory, tmp_path / corpus.directory.name)
    (copy / "train.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"train\.bin is missing.*built anew"):
        again = build_corpus(config, tmp_path, progress=False)
    assert again.directory == copy
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]
    for name in ("train.bin", "validation.bin", "tokenizer.json"):
        assert (copy / name).read_bytes() == (corpus.directory / name).read_bytes()


def test_processes_that_need_one_corpus_build_it_once(config, corpus, tmp_path, monkeypatch):
    original = build_module.write_corpus

    def write(directory, **parts):
        with (tmp_path / "built.txt").open("a") as handle:
            handle.write("once\n")
        time.sleep(0.2)  # the others look, and wait
        original(directory, **parts)

    def build():
        built = build_corpus(config, tmp_path / "cache", progress=False)
        assert np.array_equal(built.train, corpus.train)

    monkeypatch.setattr(build_module, "write_corpus", write)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=build) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "built.txt").read_text() == "once\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [corpus.directory.name]


def test_drafts_of_killed_processes_go_and_a_finished_cache_needs_no_lock(
    config, corpus, tmp_path, monkeypatch
):
    shutil.copytree(corpus.directory, tmp_path / f".{corpus.directory.name}.0123abcd.draft")
    build_corpus(config, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [corpus.directory.name]

    def refuse(*_):
        raise ValueError("read-only")

    monkeypatch.setattr(build_module, "wait_for_lock", refuse)
    build_corpus(config, tmp_path, progress=False)


def test_someones_file_in_a_damaged_corpus_is_not_deleted(config, corpus, tmp_path):
    copy = shutil.copytree(corpus.directory, tmp_path / corpus.directory.name)
    (copy / "train.bin").write_bytes(b"")
    (copy / "notes.md").write_text("mine")
    with pytest.warns(match="built anew"), pytest.raises(ValueError, match=r"also holds notes\.md"):
        build_corpus(config, tmp_path, progress=False)
    assert (copy / "notes.md").read_text() == "mine"


def test_a_corpus_has_the_modes_that_the_umask_asks_for(config, corpus):
    before = os.umask(0)
    os.umask(before)
    assert corpus.directory.stat().st_mode & 0o777 == 0o777 & ~before
    for path in corpus.directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~before


def test_loading_a_folder_that_is_no_corpus_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no corpus: it has no corpus\.json"):
        TokenizedCorpus.load(tmp_path)


def test_loading_returns_the_configuration_and_counts(config, corpus):
    loaded = TokenizedCorpus.load(corpus.directory)
    assert loaded.config == config
    assert loaded.stats == corpus.stats


def test_a_failed_build_leaves_nothing(config, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("tl_sparse.data.tokens._describe", fail)
    with pytest.raises(OSError, match="disk full"):
        build_corpus(config, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_copies_are_dropped_before_the_split(tmp_path, folder, config):
    sources = tmp_path / "sources"
    sources.mkdir()
    for path in folder.glob("*.py"):
        text = path.read_text()
        (sources / path.name).write_text(text)
        (sources / f"copy_{path.name}").write_text(text)
        (sources / f"near_{path.name}").write_text(f"{text}extra = 1\n")
    built = build_corpus(
        replace(config, sources=(str(sources),), idiom_share=0.0), tmp_path, progress=False
    )
    assert built.stats.duplicates_dropped == 80
    assert len(built.dropped) == 80
    # sorted order puts copy_* first, so they stay
    assert all("copy_" not in name for name in built.dropped)


def test_unusable_files_are_skipped_and_counted(tmp_path, folder, config):
    sources = shutil.copytree(folder, tmp_path / "sources")
    (sources / "empty.py").write_text(" \n")
    (sources / "latin.py").write_bytes(b"# \xe9\xe8\n")
    (sources / "greek.py").write_text("αβγδ = 1\n" * 10, encoding="utf-8")
    (sources / "huge.py").write_text("x = 1\n" * 100_000)
    built = build_corpus(
        replace(config, sources=(str(sources),), idiom_share=0.0), tmp_path, progress=False
    )
    assert built.stats.files_skipped == 4
    assert built.stats.files_train + built.stats.files_validation == 40


def test_a_byte_limit_leaves_files_out(config, corpus, tmp_path):
    limit = corpus.stats.bytes // 2
    built = build_corpus(
        replace(config, max_bytes=limit, idiom_share=0.0), tmp_path, progress=False
    )
    assert 0.8 * limit < built.stats.bytes <= limit
    assert built.stats.files_over_limit > 0


def test_no_idioms_when_their_share_is_zero(config, folder, tmp_path):
    built = build_corpus(replace(config, idiom_share=0.0), tmp_path, progress=False)
    assert built.stats.tokens_idiom == 0
    assert set(documents(built, built.train)) <= set(real_texts(folder))


def test_text_that_spells_the_separator_stays_text(corpus):
    text = "x = '<|endoftext|>'\n"
    (stream,) = encode_documents(corpus.tokenizer, [text])
    bos = corpus.tokenizer.bos_token_id
    assert stream[0] == bos
    assert bos not in stream[1:]
    assert len(corpus.tokenizer.encode("<|endoftext|>")) == 1  # the tokenizer is left as it was


def test_a_corpus_is_read_with_a_model_s_tokenizer(config, corpus, folder, tmp_path):
    own = build_corpus(config, tmp_path, progress=False, tokenizer=corpus.tokenizer)
    assert own.fingerprint != corpus.fingerprint  # the tokenizer is part of what it is
    for name in ("train", "validation"):
        assert np.array_equal(getattr(own, name), getattr(corpus, name))
    other = build_corpus(replace(config, vocab_size=300, required_words=()), progress=False)
    theirs = build_corpus(config, tmp_path, progress=False, tokenizer=other.tokenizer)
    assert theirs.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert int(theirs.train.max()) < len(other.tokenizer) < len(corpus.tokenizer)


def test_a_tokenizer_that_token_files_cannot_hold_is_refused(config, tmp_path, make_tokenizer):
    with pytest.raises(ValueError, match=r"the last of which is <\|endoftext\|>"):
        build_corpus(config, tmp_path, progress=False, tokenizer=make_tokenizer())


def test_an_empty_corpus_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="the corpus is empty"):
        build_corpus(CorpusConfig(sources=(str(tmp_path),)), tmp_path, progress=False)


def test_too_few_documents_for_a_split_is_one_clear_error(tmp_path):
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="1 documents are too few"):
        build_corpus(CorpusConfig(sources=(str(tmp_path),)), tmp_path / "c", progress=False)


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("TL_SPARSE_CACHE", "/somewhere/else")
    assert default_cache_dir() == Path("/somewhere/else")
    monkeypatch.delenv("TL_SPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/tl_sparse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "tl_sparse"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"sources": ("nowhere",)}, "unknown source"),
        ({"suffixes": ()}, "suffixes is empty"),
        ({"vocab_size": 299}, "vocab_size"),
        ({"vocab_size": 65536}, "vocab_size"),
        ({"idiom_share": 1.0}, "idiom_share"),
        ({"idiom_share": -0.1}, "idiom_share"),
        ({"validation_share": 0.0}, "validation_share"),
        ({"validation_share": 1.0}, "validation_share"),
        ({"near_duplicate_threshold": 0.0}, "near_duplicate_threshold"),
        ({"min_ascii": 1.1}, "min_ascii"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_documents": 0}, "max_documents"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**change)
