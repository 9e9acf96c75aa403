import time

import numpy as np
import pytest

from tl_sparse.data.duplicates import first_of_each
from tl_sparse.data.idioms import idiom_documents


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix} = {i}" for i in range(count)]


def test_exact_copies_keep_the_first():
    assert first_of_each(["a\nb", "c", "a\nb", "c"], 0.8).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("changed", "kept"), [(10, False), (30, True)])
def test_near_copies_go_from_the_threshold_on(changed, kept):
    lines = numbered("line", 100)
    # k of 100 lines replaced: similarity (100 - k) / (100 + k), which is 0.82 and 0.54
    near = [*numbered("other", changed), *lines[changed:]]
    assert first_of_each(["\n".join(lines), "\n".join(near)], 0.8).tolist() == [True, kept]


def test_threshold_one_drops_only_equal_sets_of_lines():
    texts = ["a\nb\nc", "a\n  b\n\nc", "a\nb\nc\nd"]
    assert first_of_each(texts, 1.0).tolist() == [True, False, True]


def test_a_large_family_of_near_copies_leaves_one():
    lines = numbered("line", 200)
    family = ["\n".join([*lines, f"version = {i}"]) for i in range(100)]
    assert first_of_each(family, 0.8).sum() == 1


def test_texts_without_lines_do_not_disturb_the_others():
    texts = ["", "x = 1", " \n \n", "y = 2"]
    keep = first_of_each(texts, 0.8)
    assert keep[[1, 3]].all()
    assert first_of_each([], 0.8).size == 0


def test_no_kept_pair_is_similar_by_exhaustive_comparison():
    draw = np.random.default_rng(0)
    base = [line for text in idiom_documents(0, 20_000) for line in text.split("\n") if line]
    texts = []
    for _ in range(30):
        first = int(draw.integers(0, len(base) - 60))
        chosen = base[first : first + 60]
        texts.append("\n".join(chosen))
        drop = set(draw.integers(0, 60, size=int(draw.integers(0, 12))).tolist())
        texts.append("\n".join(line for i, line in enumerate(chosen) if i not in drop))
    keep = first_of_each(texts, 0.8)
    sets = [{line.strip() for line in text.split("\n")} for text in texts]
    kept = [s for s, k in zip(sets, keep, strict=True) if k]
    for i, a in enumerate(kept):
        for b in kept[:i]:
            assert len(a & b) / len(a | b) < 0.8
    assert 0 < (~keep).sum() < len(texts)


def test_two_thousand_documents_take_seconds():
    lines = [line for text in idiom_documents(0, 200_000) for line in text.split("\n")]
    texts = ["\n".join(lines[i : i + 250]) + f"\nunique = {i}" for i in range(2000)]
    begin = time.process_time()
    first_of_each(texts, 0.8)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_impossible_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="near_duplicate_threshold"):
        first_of_each(["a"], threshold)
