import types

import pytest
import torch
from torch import nn

from tl_sparse import SparseTransformer, tasks
from tl_sparse.ablation import activation_means
from tl_sparse.analyses import dilution, distracted, distractor
from tl_sparse.analyses.attacks import harmless_prompt, plain_prompt, rewritten
from tl_sparse.circuits import PruningConfig
from tl_sparse.circuits.pruning_run import build_circuit, set_up

N_CTX = 64


@pytest.fixture(scope="module")
def model():
    return SparseTransformer.from_pretrained("python-dense")


@pytest.fixture(scope="module")
def circuit(model):
    """Every node of layer 0 and the first half of those of layer 1."""
    task = tasks.get("while_return_true", model.tokenizer, N_CTX)
    tokens = task.batch(16, split="train", seed=0).tokens
    means = activation_means(model, tokens)
    config = PruningConfig(headroom=0.0, steps=8, selection_pairs=8, report_pairs=8)
    kept = torch.arange(means.index.n_nodes) < 3 * means.index.n_nodes // 4
    problem = set_up(model, task, config, means=means)
    return build_circuit(problem, kept, kept.float(), n_active=int(kept.sum()))


class Counting(nn.Module):
    """Stands for a TransformerLens model that decides bracket_counting by counting tokens.

    ``logit(]) - logit(newline)`` is ``rate`` times (how many `[` there are beyond one and a half,
    less ``dilute`` times the number of commas).
    """

    def __init__(self, tokenizer, rate=10.0, dilute=0.0, n_ctx=256):
        super().__init__()
        self.tokenizer, self.rate, self.dilute = tokenizer, rate, dilute
        self.cfg = types.SimpleNamespace(n_ctx=n_ctx)
        self.nothing = nn.Parameter(torch.zeros(()))
        ids = {text: tokenizer.encode(text)[-1] for text in ("[", ",", " [", "]", "\n")}
        self.brackets = torch.tensor([ids["["], ids[" ["]])
        self.comma, self.close, self.newline = ids[","], ids["]"], ids["\n"]

    def run_with_hooks(self, tokens, return_type, fwd_hooks):
        brackets = torch.isin(tokens, self.brackets).float().cumsum(1)
        commas = (tokens == self.comma).float().cumsum(1)
        logits = torch.zeros(*tokens.shape, len(self.tokenizer))
        logits[..., self.close] = self.rate * (brackets - 1.5 - self.dilute * commas)
        return logits


PROMPTS = {
    "# tail [ node\nx = [[1, 2]": ("x = [[1, 2]", "# tail node\nx = [[1, 2]"),
    "a = b\n# tail { node\nx = {1: 2": ("a = b\nx = {1: 2", "a = b\n# tail node\nx = {1: 2"),
    "# it's\n# tail ' node\nprint('a": ("# it's\nprint('a", "# it's\n# tail node\nprint('a"),
    'x = set()\ny = ""\nif a:\n    x': (
        "x = set()\nif a:\n    x",
        "x = set()\ny = 0\nif a:\n    x",
    ),
    'x = ""\ny = set()\nx': ('x = ""\nx', 'x = ""\ny = 0\nx'),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_line_that_distracts_is_taken_out_or_made_harmless(prompt):
    plain, harmless = PROMPTS[prompt]
    assert plain_prompt(prompt) == plain
    assert harmless_prompt(prompt) == harmless


def test_a_prompt_without_such_a_line_is_refused():
    with pytest.raises(ValueError, match="no line that distracts"):
        plain_prompt("x = [1]\n# a list [ here and there\n")


@pytest.mark.parametrize("name", [n for n in tasks.names() if "distractor" in tasks.variants(n)])
def test_every_built_in_distractor_can_be_undone(model, name):
    posed = tasks.get(name, model.tokenizer, N_CTX, variant="distractor")
    batch = posed.batch(12, split="held_out", seed=0)
    plain = rewritten(batch, model.tokenizer, N_CTX, plain_prompt)
    for before, after, row, last in zip(
        batch.prompts, plain.prompts, plain.tokens, plain.last, strict=True
    ):
        assert len(before.split("\n")) == len(after.split("\n")) + 1
        assert set(after.split("\n")) <= set(before.split("\n"))
        assert row[0] == model.tokenizer.bos_token_id
        assert model.tokenizer.decode(row[1 : last + 1]) == after
    assert plain.answers == batch.answers


def test_counting_brackets_is_fooled_in_flat_lists_only(model):
    found = distractor(Counting(model.tokenizer), "bracket_counting", pairs=40)
    frame = found.to_dataframe().set_index(["condition", "member"])
    # a held-out target may be name[name]: that bracket misleads the count without a distractor
    right = frame["accuracy"]["plain"]
    assert right["A"] == 1.0
    assert 0.3 < right["B"] < 1.0
    assert frame["success"]["distractor"]["A"] == 0.0
    assert frame["success"]["distractor"]["B"] == 1.0
    assert frame["accuracy"]["distractor"]["B"] == 0.0
    assert found.success_rate() == pytest.approx(right["B"] / (1 + right["B"]))
    for member in "AB":
        assert frame["success"]["harmless"][member] == 0.0
        assert frame["accuracy"]["harmless"][member] == right[member]


def test_an_attack_on_prompts_of_ones_own(model):
    task = tasks.get("bracket_counting", model.tokenizer, N_CTX)
    batch = task.batch(4, split="train", seed=0)
    swapped = task.batch(4, split="train", seed=1)
    found = distracted(model, "mine", batch, swapped)
    assert found.to_dataframe()["condition"].unique().tolist() == ["plain", "distractor"]
    result = tasks.evaluate_task(model, task, 4, split="train", seed=1)
    here = found.examples[found.examples["condition"] == "distractor"]
    assert here["loss"].tolist() == pytest.approx(result.losses.tolist(), abs=1e-5)
    assert here["prompt"].tolist() == list(swapped.prompts)
    other = tasks.get("var_if", model.tokenizer, N_CTX).batch(4, split="train", seed=0)
    with pytest.raises(ValueError, match="do not correspond"):
        distracted(model, "mine", batch, other)


def test_distractor_runs_in_the_circuit_too(model, circuit):
    found = distractor(model, "single_double_quote", circuit=circuit, pairs=8)
    frame = found.to_dataframe()
    assert len(frame) == 2 * 3 * 3
    batch = tasks.get("single_double_quote", model.tokenizer, N_CTX, variant="distractor").batch(
        8, split="held_out", seed=0
    )
    with torch.no_grad():
        logits = model.run_with_hooks(batch.tokens, fwd_hooks=circuit.hooks())
    expected = tasks.task_losses(tasks.select_last(logits, batch), batch)
    here = found.examples.query("run == 'circuit' and condition == 'distractor'")
    assert here["loss"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert 0 <= found.success_rate("circuit", "A") <= 1
    assert len(found.to_plotly().data) == 4
    assert "Distractor" in found._repr_html_()
    with pytest.raises(ValueError, match="choose from model, circuit"):
        found.success_rate("both")


def test_p_correct_falls_as_the_count_is_diluted(model):
    counting = Counting(model.tokenizer, rate=1.0, dilute=0.1)
    found = dilution(counting, "bracket_counting", (3, 13, 23), pairs=16)
    frame = found.to_dataframe().query("member == 'A'").set_index("n")
    for n in (3, 13, 23):
        one = found.examples.query(f"n == {n} and member == 'A'").iloc[0]
        brackets, commas = one["prompt"].count("["), one["prompt"].count(",")
        logit_diff = torch.tensor(brackets - 1.5 - 0.1 * commas)
        assert one["p_correct"] == pytest.approx(logit_diff.sigmoid().item(), abs=1e-4)
    assert frame["p_correct"].is_monotonic_decreasing
    assert frame["prompts"].tolist() == [16] * 3


def test_dilution_is_the_variants_result_and_reads_the_node(model, circuit):
    found = dilution(
        model, "bracket_counting", (3, 8), node=(1, "attn_out", 5), circuit=circuit, pairs=6
    )
    task = tasks.get("bracket_counting", model.tokenizer, N_CTX, variant="dilution", n=8)
    batch = task.batch(6, split="held_out", seed=0)
    for run, hooks in (("model", []), ("circuit", circuit.hooks())):
        with model.hooks(fwd_hooks=hooks), torch.no_grad():
            logits, cache = model.run_with_cache(batch.tokens)
        expected = tasks.task_losses(tasks.select_last(logits, batch), batch)
        here = found.examples.query(f"n == 8 and run == '{run}'")
        assert here["loss"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert here["p_correct"].tolist() == pytest.approx((-expected).exp().tolist(), abs=1e-4)
        node = cache["blocks.1.hook_attn_out"][torch.arange(12), batch.last, 5]
        assert here["activation"].tolist() == pytest.approx(node.tolist(), abs=1e-4)
    assert len(found.to_plotly().data) == 2 * 2 * 2
    assert "Dilution" in found._repr_html_()


def test_sizes_that_do_not_fit_are_listed(model):
    found = dilution(model, "bracket_counting", (3, 67), pairs=2)
    assert found.to_dataframe()["n"].unique().tolist() == [3]
    assert list(found.refused) == [67]
    assert "max_tokens" in found.refused[67]
    assert found.examples["activation"].isna().all()
    with pytest.raises(ValueError, match="none of the sizes 67 fits"):
        dilution(model, "bracket_counting", (67,))


@pytest.mark.parametrize("attack", [dilution, distractor])
def test_impossible_attacks_are_refused(model, circuit, attack):
    with pytest.raises(ValueError, match="unknown task 'brackets'"):
        attack(model, "brackets")
    with pytest.raises(ValueError, match="has no variant"):
        attack(model, "if_equals")
    bare = SparseTransformer(model.config)
    with pytest.raises(ValueError, match="no tokenizer"):
        attack(bare, "bracket_counting")
    other = SparseTransformer(model.config, model.tokenizer)
    with pytest.raises(ValueError, match="belongs to another"):
        attack(other, "bracket_counting", circuit=circuit)


def test_an_unknown_node_is_refused(model):
    with pytest.raises(ValueError, match="layers 0 to 1"):
        dilution(model, "bracket_counting", (3,), node=(2, "attn_out", 0))
    with pytest.raises(ValueError, match="layer 1 has no 'attn'"):
        dilution(model, "bracket_counting", (3,), node=(1, "attn", 0))
