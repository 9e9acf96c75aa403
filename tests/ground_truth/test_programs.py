"""Compiled programs: what the models compute is what the interpreter says, in plain Python."""

from fractions import Fraction

import pandas as pd
import pytest
import torch

from tl_sparse import ground_truth
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.ablation.masked_forward import masked_logit_diffs
from tl_sparse.circuits import circuit_edges
from tl_sparse.ground_truth.compiled_programs import COLON, PROGRAMS
from tl_sparse.ground_truth.programs import (
    Copy,
    Map,
    Positions,
    Select,
    Tokens,
    channel,
    compile_program,
    interpret,
    time_of,
    variables,
)

NAMES = tuple(PROGRAMS)


@pytest.fixture(scope="module")
def models():
    return {name: ground_truth.compiled(name) for name in NAMES}


def texts(batch):
    """Every prompt's tokens as the programs see them."""
    rows = []
    for prompt in batch.prompts:
        rows.append(["<bos>", *(f" {word}" for word in prompt.split())])
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_the_interpreter_solves_the_task(models, name):
    batch = models[name].task.batch(64, split="held_out", seed=0)
    program = PROGRAMS[name].variable()
    for tokens, answer, other in zip(texts(batch), batch.answers, others(batch), strict=True):
        result = interpret(program, tokens)[-1]
        assert result.get(answer, 0) > result.get(other, 0)


def others(batch):
    """The wrong answer of every prompt: the right one of its partner."""
    pairs = zip(batch.answers[::2], batch.answers[1::2], strict=True)
    return [x for a, b in pairs for x in (b, a)]


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_holds_what_the_interpreter_says_at_every_token(models, name):
    """Every result channel of the last head, at every position of 16 prompts."""
    model, program = models[name], PROGRAMS[name].variable()
    batch = model.task.batch(8, split="held_out", seed=0)
    places = dict(zip(model.nodes["role"], model.nodes["channel"], strict=True))
    last = max(model.heads)[0]
    _, cache = model.model.run_with_cache(batch.tokens)
    written = cache[f"blocks.{last}.hook_attn_out"]
    for row, tokens in enumerate(texts(batch)):
        for position, shares in enumerate(interpret(program, tokens)):
            for value in program.values:
                found = written[row, position, places[f"writes {channel(program, value)}"]]
                assert float(found) == pytest.approx(float(shares.get(value, 0)), abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_its_parts_alone_solve_the_task_and_the_rest_does_not(models, name):
    model = models[name]
    batch = model.task.batch(32, split="held_out", seed=1)
    keep = torch.stack([torch.ones_like(model.kept), model.kept, ~model.kept])
    for values in (model.means.values, torch.zeros_like(model.means.values)):
        whole, circuit, rest = masked_logit_diffs(model.model, batch, model.index, keep, values)
        assert whole.min() > 2
        torch.testing.assert_close(circuit, whole, atol=0.3, rtol=0)
        assert rest.mean().abs() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_each_true_head_and_mlp_is_needed_and_no_other(models, name):
    """Exact ablation of whole parts finds the truth, as a test of circuit discovery should."""
    model = models[name]
    index = model.index
    batch = model.task.batch(32, split="train", seed=0)
    parts = {}
    for layer in range(model.model.config.n_layers):
        start = index.slices[f"blocks.{layer}.attn.hook_v"].start
        for head in range(3):
            parts[layer, head] = range(start + 12 * head, start + 12 * head + 12)
        neurons = index.slices[f"blocks.{layer}.mlp.hook_post"]
        parts[layer, "mlp"] = range(neurons.start, neurons.stop)
    keep = torch.ones(len(parts), index.n_nodes, dtype=torch.bool)
    for row, nodes in zip(keep, parts.values(), strict=True):
        row[list(nodes)] = False
    logit_diffs = masked_logit_diffs(model.model, batch, index, keep, model.means.values).mean(1)
    whole = task_logit_diffs(model.model, batch).mean()
    needed = {
        part for part, logit_diff in zip(parts, logit_diffs, strict=True) if logit_diff < whole / 2
    }
    assert needed == {*model.heads, *((layer, "mlp") for layer in model.mlps)}


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_between_its_nodes_are_the_edges_that_were_written(models, name):
    model = models[name]
    order = list(model.edges.columns[:-1])
    found = circuit_edges(model.model, model.index, model.kept).sort_values(order)
    written = model.edges.sort_values(order)
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), written.reset_index(drop=True), check_exact=True
    )


def named(model):
    """The edges between parts, heads named by layer alone."""
    frame = ground_truth.component_edges(model)
    short = {f"a{layer}.{head}": f"a{layer}" for layer, head in model.heads}
    rows = set()
    for sender, receiver in frame.itertuples(index=False):
        for long, name in short.items():
            sender, receiver = sender.replace(long, name), receiver.replace(long, name)
        rows.add((sender, receiver))
    return rows


def test_edges_between_parts_are_those_of_the_programs(models):
    """Written down from the programs; of proportion those are Tracr's, too (Conmy et al. 2023)."""
    assert named(models["reversing"]) == {
        ("embed", "a0.k"), ("position", "a0.q"), ("position", "a0.v"), ("a0", "m0"),
        ("position", "m0"), ("m0", "a1.q"), ("position", "a1.k"), ("embed", "a1.v"),
        ("a1", "logits"),
    }  # fmt: skip
    assert named(models["proportion"]) == {
        ("embed", "m0"), ("position", "a1.q"), ("position", "a1.k"), ("m0", "a1.v"),
        ("a1", "logits"),
    }  # fmt: skip
    assert named(models["induction"]) == {
        ("position", "a0.q"), ("position", "a0.k"), ("embed", "a0.v"), ("a0", "a1.k"),
        ("embed", "a1.q"), ("embed", "a1.v"), ("a1", "logits"),
    }  # fmt: skip
    assert named(ground_truth.quote_closing(27)) == {
        ("embed", "m0"), ("m0", "a1.k"), ("m0", "a1.v"), ("a1", "logits"),
    }  # fmt: skip


def test_the_interpreter_by_hand():
    tokens, positions = Tokens(("a", "b", ":")), Positions(8)
    text = ["<bos>", "a", "b", ":", "a"]
    assert [list(x) for x in interpret(tokens, text)] == [[], ["a"], ["b"], [":"], ["a"]]
    before = Select(positions, positions, lambda key, query: key == query - 1)
    assert [list(x) for x in interpret(Copy("c", before, tokens), text)] == [
        [], [], ["a"], ["b"], [":"]
    ]  # fmt: skip
    every = Select(positions, positions, lambda key, query: True)
    assert interpret(Copy("c", every, tokens), text)[2] == {
        "a": Fraction(1, 3), "b": Fraction(1, 3)
    }  # fmt: skip
    swap = Map("m", (tokens,), {"a": "b", "b": "a"}.get)
    assert [list(x) for x in interpret(swap, text)] == [[], ["b"], ["a"], [], ["b"]]
    sum_ = Map("s", (positions, positions), lambda x, y: x + y)
    assert [list(x) for x in interpret(sum_, text)] == [[0], [2], [4], [6], [8]]
    with pytest.raises(ValueError, match="a single value is needed"):
        interpret(Map("m", (Copy("c", every, tokens),), lambda x: x), text)


def test_parts_stand_in_the_first_layer_that_has_what_they_read():
    reversing = PROGRAMS["reversing"].variable()
    found = {variable.name: time_of(variable) for variable in variables(reversing)}
    assert found == {"token": -1, "position": -1, "colon at": 0, "wanted position": 1, "letter": 2}
    tokens = Tokens(("a", COLON))
    once = Map("once", (tokens,), lambda x: x)
    twice = Map("twice", (once,), lambda x: x)
    assert (time_of(once), time_of(twice)) == (1, 3)
    assert compile_program(twice, {"a": "a"}, 1.0).n_layers == 2


def test_programs_that_cannot_be_compiled_are_refused():
    tokens = Tokens(("a", "b"))
    same = Map("token", (tokens,), lambda x: x)
    with pytest.raises(ValueError, match="two variables are called token"):
        compile_program(same, {"a": "a"}, 1.0)
    with pytest.raises(ValueError, match="its result is an input"):
        compile_program(tokens, {"a": "a"}, 1.0)
    with pytest.raises(ValueError, match="no answer is one of the program's results"):
        compile_program(Map("m", (tokens,), lambda x: x), {"c": "c"}, 1.0)
    with pytest.raises(ValueError, match=r"'sorting'.*reversing, proportion, induction"):
        ground_truth.compiled("sorting")
