import copy
import pickle
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tl_sparse import tasks
from tl_sparse.data import build_tokenizer
from tl_sparse.tasks import SPLITS, Pair, Task, task

NAMES = tasks.names()


@task(answers=(":", "\n"), source="test")
def tiny(rng, split):
    """A space of three pairs."""
    number = rng.choice("123")
    return f"if {number}", f"xy {number}"


@task(answers=(":", "\n"), source="test")
def stories(rng, split):
    """Many shared lines before the probe."""
    lines = "".join(f"    line = {rng.randint(0, 9)}\n" for _ in range(rng.randint(0, 30)))
    return f"{lines}    if x", f"{lines}    y = x"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_batches_keep_the_contract(tokenizer, name, split):
    bound = tasks.get(name, tokenizer, max_tokens=64)
    batch = bound.batch(16, split=split, seed=0)
    assert len(batch) == 32 == len(batch.prompts) == len(batch.tokens)
    assert batch.tokens.shape[1] <= 64
    assert batch.tokens.dtype == batch.correct_token.dtype == torch.int64
    assert (batch.tokens[:, 0] == tokenizer.bos_token_id).all()
    for i, prompt in enumerate(batch.prompts):
        last = int(batch.last[i])
        assert batch.tokens[i, 1 : last + 1].tolist() == tokenizer.encode(prompt)
        assert (batch.tokens[i, last + 1 :] == tokenizer.pad_token_id).all()
        assert tokenizer.encode(batch.answers[i]) == [int(batch.correct_token[i])]
        assert int(batch.incorrect_token[i]) == int(batch.correct_token[i ^ 1])
        if bound.answers is not None:
            assert batch.answers[i] == bound.answers[i % 2]
            assert int(batch.correct_token[i]) == bound.answer_ids[i % 2]
    assert batch.last.max() == batch.tokens.shape[1] - 1


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_prompts(tokenizer, name):
    bound = tasks.get(name, tokenizer)
    first = bound.batch(8, split="train", seed=1)
    again = tasks.get(name, tokenizer).batch(8, split="train", seed=1)
    assert torch.equal(first.tokens, again.tokens)
    assert first.prompts == again.prompts
    assert first.prompts != bound.batch(8, split="train", seed=2).prompts


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_distinct(tokenizer, name):
    prompts = tasks.get(name, tokenizer).batch(64, split="held_out", seed=0).prompts
    assert len(set(zip(prompts[::2], prompts[1::2], strict=True))) == 64


def test_a_small_space_is_repeated_only_when_it_is_used_up(tokenizer):
    bound = tasks.get(tiny, tokenizer)
    assert len(set(bound.batch(3, split="train", seed=0).prompts)) == 6
    assert len(set(bound.batch(10, split="train", seed=0).prompts)) == 6
    assert len(bound.batch(10, split="train", seed=0)) == 20


def test_long_prompts_lose_the_same_whole_lines_in_both_members(tokenizer):
    short = tasks.get(stories, tokenizer, max_tokens=40).batch(40, split="train", seed=0)
    long = tasks.get(stories, tokenizer, max_tokens=1000).batch(40, split="train", seed=0)
    assert short.tokens.shape[1] <= 40
    cut = 0
    for a, b, whole in zip(short.prompts[::2], short.prompts[1::2], long.prompts[::2], strict=True):
        assert whole.endswith(a)
        assert a.rsplit("\n", 1)[0] == b.rsplit("\n", 1)[0]
        if a != whole:
            cut += 1
            assert a.startswith("\n    line = ")
    assert cut > 10


def test_pairs_may_have_their_own_answers_and_those_split_are_left_out(tokenizer):
    @task(source="test")
    def ends(rng, split):
        """The answer is the mark before."""
        a, b = rng.sample([":", "?", "qqqzz", "!"], 2)
        number = rng.randint(0, 9)
        return Pair((f"{number}{a}{a}\n", f"{number}{b}{b}\n"), (a, b))

    bound = tasks.get(ends, tokenizer)
    assert bound.answers is None is bound.answer_ids
    batch = bound.batch(20, split="train", seed=0)
    assert set(batch.answers) == {":", "?", "!"}
    assert all(p[1] == a for p, a in zip(batch.prompts, batch.answers, strict=True))
    assert batch.correct_token.tolist() == [tokenizer.encode(a)[0] for a in batch.answers]


def test_a_task_all_of_whose_own_answers_are_split_is_refused(tokenizer):
    @task(source="test")
    def ends(rng, split):
        """The answer is no word."""
        return Pair((f"{rng.random()}", "x"), ("qqqzz", "zzqqq"))

    with pytest.raises(ValueError, match="'ends' needs the answer 'qqqzz' as one token"):
        tasks.get(ends, tokenizer)


def test_a_task_without_answers_must_draw_pairs(tokenizer):
    @task(source="test")
    def none(rng, split):
        """No answer at all."""
        return "a", "b"

    with pytest.raises(ValueError, match="'none' has no answers: its function returns a Pair"):
        tasks.get(none, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_context_still_has_prompts(tokenizer, name):
    batch = tasks.get(name, tokenizer, max_tokens=32).batch(8, split="train", seed=0)
    assert batch.tokens.shape[1] <= 32


def test_a_context_too_short_for_any_prompt_is_one_clear_error(tokenizer):
    with pytest.raises(ValueError, match="no prompt of task 'bracket_brace' fits max_tokens=5"):
        tasks.get("bracket_brace", tokenizer, max_tokens=5).batch(2, split="train", seed=0)


def test_pairs_slices_by_pair_and_keeps_the_padding(tokenizer):
    batch = tasks.get("bracket_counting", tokenizer).batch(8, split="train", seed=0)
    part = batch.pairs(2, 5)
    assert part.prompts == batch.prompts[4:10]
    assert torch.equal(part.tokens, batch.tokens[4:10])
    assert torch.equal(part.last, batch.last[4:10])
    assert torch.equal(part.correct_token, batch.correct_token[4:10])
    assert part.answers == batch.answers[4:10]
    assert torch.equal(part.incorrect_token, batch.incorrect_token[4:10])
    assert len(batch.pairs(6, 100)) == 4


def test_select_takes_pairs_in_any_order(tokenizer):
    batch = tasks.get("bracket_counting", tokenizer).batch(8, split="train", seed=0)
    part = batch.select([5, 1])
    assert part.prompts == batch.prompts[10:12] + batch.prompts[2:4]
    assert torch.equal(part.tokens, batch.tokens[[10, 11, 2, 3]])
    assert torch.equal(part.correct_token, batch.correct_token[[10, 11, 2, 3]])


def test_to_moves_every_tensor(tokenizer):
    batch = tasks.get("bracket_counting", tokenizer).batch(2, split="train", seed=0).to("meta")
    for tensor in (batch.tokens, batch.last, batch.correct_token, batch.incorrect_token):
        assert tensor.device.type == "meta"


def test_sixty_four_pairs_are_quick(tokenizer):
    bound = tasks.get("bracket_counting", tokenizer)
    bound.batch(64, split="train", seed=0)
    begin = time.process_time()
    for seed in range(5):
        bound.batch(64, split="train", seed=seed)
    assert (time.process_time() - begin) / 5 < 0.1


@pytest.mark.parametrize("n_pairs", [0, -1])
def test_a_batch_needs_a_pair(tokenizer, n_pairs):
    with pytest.raises(ValueError, match="n_pairs must be at least 1"):
        tasks.get("for_while", tokenizer).batch(n_pairs, split="train", seed=0)


def test_an_unknown_task_names_the_choices(tokenizer):
    with pytest.raises(ValueError, match=r"unknown task 'quotes': choose from .*for_while"):
        tasks.get("quotes", tokenizer)


def test_a_tokenizer_that_splits_an_answer_is_refused_with_the_pieces():
    tokenizer = build_tokenizer(["x"], 300, required=())
    with pytest.raises(ValueError, match=r"' enumerate' as one token; .*\[' ', 'e', 'n'") as error:
        tasks.get("enumerate_range", tokenizer)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_beginning_token_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="beginning-of-text"):
        tasks.get("for_while", bare)


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(tokenizer):
    @task(answers=("hile", "\n"), source="test")
    def joined(rng, split):
        """The answer A ends a word that is one token."""
        return f"{rng.random()}\nw", f"{rng.random()}\nx"

    with pytest.raises(ValueError, match="joins the answer 'hile' to the end of"):
        Task.bind(joined, build_tokenizer(["while hile hile hile"], 400, ("while", "hile"))).batch(
            2, split="train", seed=0
        )


def test_max_tokens_must_leave_room(tokenizer):
    with pytest.raises(ValueError, match="max_tokens must be at least 2"):
        tasks.get("for_while", tokenizer, max_tokens=1)


def test_a_task_needs_a_docstring_and_two_answers():
    def silent(rng, split):
        return "a", "b"

    with pytest.raises(ValueError, match="'silent' needs a docstring"):
        task(answers=("a", "b"), source="test")(silent)
    silent.__doc__ = "Something decides."
    with pytest.raises(ValueError, match="twice the answer 'a'"):
        task(answers=("a", "a"), source="test")(silent)


def plain_pairs(rng, split):
    """A function that is decorated by a call, under another name."""
    number = rng.choice("123")
    return f"if {number}", f"xy {number}"


called = task(answers=(":", "\n"), source="test")(plain_pairs)


@pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
def test_every_task_goes_to_another_process_and_draws_the_same_prompts_there(tokenizer, again):
    found = [tasks.get(spec, tokenizer) for spec in (*NAMES, tiny, called)]
    found += [
        tasks.get(name, tokenizer, 1000, variant)
        for name in NAMES
        for variant in tasks.variants(name)
    ]
    for here, there in zip(found, again(found), strict=True):
        batches = [one.batch(3, split="held_out", seed=1) for one in (here, there)]
        assert batches[0].prompts == batches[1].prompts
        assert torch.equal(batches[0].tokens, batches[1].tokens)


def test_a_task_of_a_local_function_cannot_be_sent_and_says_so(tokenizer):
    @task(answers=(":", "\n"), source="test")
    def local(rng, split):
        """Nothing leads to this function from outside."""
        return tiny.make(rng, split)

    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(tasks.get(local, tokenizer))


def test_a_task_says_in_a_line_what_its_prompts_are(tokenizer):
    task = tasks.get("single_double_quote", tokenizer)
    assert repr(task) == f"Task('single_double_quote': {task.facts})"
    assert task.facts.startswith("answers ")
    assert task.facts.endswith("prompts of at most 64 tokens")
    html = task._repr_html_()
    assert html.count("<tr") == 1 + 6
    assert "single_double_quote" in html


def test_a_batch_is_a_line_and_a_table(tokenizer):
    batch = tasks.get("single_double_quote", tokenizer).batch(20, split="train", seed=0)
    width = batch.tokens.shape[1]
    assert repr(batch) == f"TaskBatch(20 pairs of prompts, at most {width} tokens each)"
    frame = batch.to_dataframe()
    assert list(frame["pair"][:4]) == [0, 0, 1, 1]
    assert list(frame["member"][:4]) == ["A", "B", "A", "B"]
    assert frame["tokens"].max() == width
    assert batch._repr_html_().count("<tr") == 1 + 16


def test_a_task_is_taken_from_a_model_with_its_context(tokenizer):
    model = SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=48))
    assert tasks.get("single_double_quote", model).max_tokens == 48
    assert tasks.get("single_double_quote", model, 32).max_tokens == 32
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        tasks.get("single_double_quote", SimpleNamespace(tokenizer=None, cfg=model.cfg))
    with pytest.raises(TypeError, match="give a model or a tokenizer, not a str"):
        tasks.get("single_double_quote", "python-sparse")
