"""The paper's tasks on random models of its models' architectures, in the Hub's format."""

import json
import os

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_sparse import SparseTransformer, SparseTransformerConfig
from tl_sparse.cli import main
from tl_sparse.heads import families, words
from tl_sparse.studies import heads_paper
from tl_sparse.studies.heads_paper import TASKS, HeadsPaperConfig, report_of, run_heads_paper


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE, as GPT-2 has, to which the families' words are one token each."""
    texts = [f"the {word} of {word}" for word in words.NAMES for _ in range(8)]
    for family in families.FAMILIES.values():
        for kind, candidates in family.one_token.items():
            if kind == "years":
                continue
            texts += [f"a{word} b{word}" for word in candidates for _ in range(8)]
    # GPT-2 writes a year as its century, with a blank, and two digits
    texts += [f"{a:02}" for a in range(100) for _ in range(30)]
    texts += [f"in {a}" for a in range(11, 21) for _ in range(30)]
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(
        texts, vocab_size=4000, min_frequency=2, show_progress=False,
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, bos_token=end, eos_token=end, unk_token=end
    )


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    """A folder with GPT-2 small's layers and heads, narrow and random."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=24, n_layer=12, n_head=12
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def attn_only(tokenizer, tmp_path_factory):
    """A folder with attn-only-4l's layers and heads, in TransformerLens' own format."""
    folder = tmp_path_factory.mktemp("attn-only")
    config = SparseTransformerConfig(
        n_layers=4, n_heads=8, d_head=4, d_model=32, attn_only=True, n_ctx=96,
        d_vocab=len(tokenizer), normalization_type="LN", positional_embedding_type="standard",
        initializer_range=0.1,
    )  # fmt: skip
    model = SparseTransformer(config)
    torch.save(model.state_dict(), folder / "model_final.pth")
    values = {name: getattr(config, name) for name in heads_paper.LEGACY}
    values |= {"normalization": "LN", "d_mlp": None, "act_fn": "gelu"}
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)
    return folder


def test_all_three_tasks_end_in_a_report_and_a_second_run_measures_nothing_again(
    gpt2, attn_only, tmp_path, capsys, monkeypatch
):
    options = ["heads-paper", "--out", str(tmp_path), "--gpt2", str(gpt2), "--attn-only",
               str(attn_only), "--trials", "1", "--prompts", "5", "--epochs", "2",
               "--n-codes", "8"]  # fmt: skip
    # gradient methods on the small model alone: on GPT-2's twelve layers they take seconds
    gradients = ["--tasks", "docstring", "--pairs", "1"]
    main([*options, *gradients])
    assert "EAP-IG" in (tmp_path / "report.md").read_text()
    options += ["--tasks", "ioi", "greater_than", "--pairs", "0"]
    main(options)
    report = (tmp_path / "report.md").read_text()
    for task in ("ioi", "greater_than"):
        assert f"## {task}" in report
    assert "0.868 ± 0.008" in report
    rows = heads_paper.read_results(tmp_path / "results.jsonl")
    assert {row["task"] for row in rows} == set(TASKS)
    assert all(0 <= row["auc"] <= 1 for row in rows)
    monkeypatch.setattr(heads_paper, "model_of", None)
    main(options)
    assert "Report:" in capsys.readouterr().out
    assert len(heads_paper.read_results(tmp_path / "results.jsonl")) == len(rows)
    with pytest.raises(ValueError, match="other settings"):
        run_heads_paper(HeadsPaperConfig(str(tmp_path), ("ioi",), prompts=6, pairs=1))


def test_the_truths_of_paper_and_literature_differ_in_one_head():
    for name, count in (("ioi", 26), ("greater_than", 9), ("docstring", 6)):
        paper, literature = (set(TASKS[name].truth[s]) for s in ("paper", "literature"))
        assert len(paper) == len(literature) == count
        assert len(paper - literature) == (name != "greater_than")
        layers, heads = (4, 8) if TASKS[name].small else (12, 12)
        assert all(layer < layers and head < heads for layer, head in paper | literature)


def test_a_report_has_mean_and_spread_over_trials():
    same = {
        "task": "ioi",
        "settings": {"model": "gpt2", "prompts": 9},
        "method": "paper",
        "score": "unique",
        "seconds": 1.0,
        "average_precision": 0.5,
        "best_f1": 0.5,
    }
    rows = [
        same | {"trial": trial, "truth": truth, "auc": auc}
        for trial, auc in ((0, 0.5), (1, 0.7))
        for truth in ("paper", "literature")
    ]  # fmt: skip
    line = next(row for row in report_of(rows).splitlines() if row.startswith("| paper (unique)"))
    assert "0.600 ± 0.100 | 0.868 ± 0.008 | 0.600 ± 0.100" in line


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="choose from ioi, greater_than, docstring"):
        HeadsPaperConfig("x", ("sorting",))
    with pytest.raises(ValueError, match="there are 5 positive prompts"):
        HeadsPaperConfig("x", prompts=5)
    (tmp_path / "config.json").write_text(json.dumps({"d_vocab": 5}))
    with pytest.raises(ValueError, match=r"no \.pth file"):
        heads_paper.model_of(os.fspath(tmp_path))
