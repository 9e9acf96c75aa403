import math
import types

import pytest
import torch
from torch import nn

from tl_sparse import SparseTransformer, SparseTransformerConfig, tasks
from tl_sparse.data import build_tokenizer
from tl_sparse.tasks import TaskTable, evaluate_task, table

SOME = ("var_if", "bracket_counting", "class_init")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = SparseTransformerConfig(
        n_layers=1, d_model=16, n_heads=2, d_head=8, d_mlp=16, n_ctx=48, d_vocab=len(tokenizer)
    )
    return SparseTransformer(config, tokenizer)


class Lengths(nn.Module):
    """Stands for a TransformerLens model; records how long its inputs are."""

    def __init__(self, tokenizer, n_ctx):
        super().__init__()
        self.tokenizer, self.cfg, self.seen = tokenizer, types.SimpleNamespace(n_ctx=n_ctx), []

    def forward(self, tokens, return_type):
        self.seen.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, len(self.tokenizer))


def test_a_table_holds_what_evaluate_task_gives_for_each_task(model, tokenizer):
    found = table(model, pairs=6, names=SOME, seed=2)
    assert set(found.results) == set(SOME)
    assert found.refused == {}
    for name in SOME:
        expected = evaluate_task(model, tasks.get(name, tokenizer, 48), 6, seed=2)
        assert torch.equal(found.results[name].losses, expected.losses)
        assert found.results[name].prompts == expected.prompts
    frame = found.to_dataframe()
    assert list(frame.columns) == ["task", "accuracy", "loss", "pairs", "refused"]
    assert frame["task"].tolist() == sorted(SOME)
    assert frame["pairs"].tolist() == [6, 6, 6]
    for row in frame.itertuples():
        assert row.loss == found.results[row.task].loss
        assert row.accuracy == found.results[row.task].accuracy


def test_transformer_lens_own_models_have_a_table(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 16, "n_ctx": 48}
    config = SparseTransformerConfig(**sizes, d_vocab=len(tokenizer))
    ours = SparseTransformer(config, tokenizer)
    theirs = ours.to_transformer_lens()
    assert not isinstance(theirs, SparseTransformer)
    expected = table(ours, pairs=4, names=SOME).to_dataframe()
    found = table(theirs, pairs=4, names=SOME).to_dataframe()
    assert found["loss"].to_numpy() == pytest.approx(expected["loss"].to_numpy(), abs=1e-4)
    assert found["refused"].tolist() == expected["refused"].tolist() == [""] * 3


def test_by_default_every_task_is_there(tokenizer):
    found = table(Lengths(tokenizer, 64), pairs=2)
    assert tuple(sorted(found.results)) == tasks.names()
    assert found.to_dataframe()["loss"].to_numpy() == pytest.approx(math.log(2))


@pytest.mark.parametrize("n_ctx", [32, 48])
def test_no_prompt_is_longer_than_the_context(tokenizer, n_ctx):
    stub = Lengths(tokenizer, n_ctx)
    table(stub, pairs=4)
    assert 20 < max(stub.seen) <= n_ctx


def test_examples_are_kept(tokenizer):
    found = table(Lengths(tokenizer, 64), pairs=3, names=SOME, split="train")
    examples = found.examples()
    assert len(examples) == 3 * 6
    assert set(examples["task"]) == set(SOME)
    assert set(examples["split"]) == {"train"}


def test_a_tokenizer_that_splits_an_answer_is_a_refusal_with_the_reason():
    plain = build_tokenizer(["x"], 300, required=())
    found = table(Lengths(plain, 512), pairs=2, names=("enumerate_range", "bracket_counting"))
    assert set(found.results) == {"bracket_counting"}
    assert "needs the answer ' enumerate' as one token" in found.refused["enumerate_range"]
    frame = found.to_dataframe().set_index("task")
    assert math.isnan(frame.loc["enumerate_range", "loss"])
    assert frame.loc["enumerate_range", "refused"] == found.refused["enumerate_range"]
    assert frame.loc["bracket_counting", "refused"] == ""
    assert "as one token" in found._repr_html_()
    assert "enumerate_range" in str(found)
    assert repr(found) == "TaskTable(1 tasks, 1 refused)"


def test_a_context_too_short_for_a_task_is_a_refusal(tokenizer):
    found = table(Lengths(tokenizer, 5), pairs=2, names=("bracket_brace",))
    assert found.results == {}
    assert "fits max_tokens=5" in found.refused["bracket_brace"]
    assert len(found.examples()) == 0


def test_a_tables_html_has_every_task_and_no_raw_markup(tokenizer):
    html = TaskTable({}, {"odd": "joins '<i>'"})._repr_html_()
    assert "odd" in html
    assert "<i>" not in html


def test_variants_and_own_tasks_are_rows_too(tokenizer):
    hard = tasks.get("bracket_counting", tokenizer, 64, "dilution", n=5)
    found = table(Lengths(tokenizer, 64), pairs=2, names=("var_if", hard))
    assert set(found.results) == {"var_if", "bracket_counting/dilution/n=5"}


def test_a_task_of_another_tokenizer_or_longer_prompts_is_an_error(tokenizer):
    stub = Lengths(tokenizer, 32)
    with pytest.raises(ValueError, match="'var_if' is bound to another tokenizer"):
        table(stub, names=[tasks.get("var_if", build_tokenizer(["x"], 512), 32)])
    with pytest.raises(ValueError, match="up to 64 tokens, but the model reads 32"):
        table(stub, names=[tasks.get("var_if", tokenizer, 64)])


def test_bad_arguments_are_errors_and_not_refusals(tokenizer):
    stub = Lengths(tokenizer, 32)
    with pytest.raises(ValueError, match=r"unknown task\(s\) quotes; choose from bracket_brace"):
        table(stub, names=("quotes", "var_if"))
    with pytest.raises(ValueError, match="two tasks have one name"):
        table(stub, names=("var_if", "var_if"))
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        table(stub, pairs=0)
    stub.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        table(stub)


def test_an_error_of_the_model_is_not_taken_for_a_refusal(tokenizer):
    class Broken(Lengths):
        def forward(self, tokens, return_type):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        table(Broken(tokenizer, 64), pairs=2, names=("var_if",))
