from dataclasses import replace

import torch

from tl_sparse.circuits import circuit_of_heads
from tl_sparse.faithfulness.checks.necessity import NULLS
from tl_sparse.faithfulness.controls import few, hook_of_component, random_components, short_of


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_sets_have_as_many_units_at_every_hook(whole, chain, random_tokens, tested):
    model, task, _ = chain
    heads = tested(model, task, circuit_of_heads(model, task.name, [(0, 1)], random_tokens))
    for test in (whole, heads):
        group = hook_of_component(test)
        for kind in ("anywhere", *NULLS):
            alike = torch.rand(test.n_components, generator=generator())
            for mask in random_components(test, kind, 5, alike):
                assert (
                    torch.bincount(group[mask]).tolist()
                    == torch.bincount(group[test.kept_components]).tolist()
                )
                if kind != "anywhere":
                    assert not bool((mask & test.kept_components).any())
    assert short_of(heads) == 0
    both = circuit_of_heads(model, task.name, [(0, 0), (0, 1)], random_tokens)
    assert short_of(tested(model, task, both)) == 2


def test_few_prompts_are_the_first(whole):
    small = few(replace(whole, config=replace(whole.config, few_pairs=3)))
    assert small.batch.prompts == whole.batch.prompts[:6]
    assert len(few(whole).batch) == 16


def test_no_random_set_is_the_circuit_itself_where_there_are_others(chain, random_tokens, tested):
    """Of two heads a layer, every second draw would be."""
    model, task, _ = chain
    heads = tested(model, task, circuit_of_heads(model, task.name, [(0, 1)], random_tokens))
    drawn = random_components(heads, "anywhere", 10)
    assert drawn.tolist() == [[True, False, False, False]] * 10
    every = [(0, 0), (0, 1), (1, 0), (1, 1)]
    all_heads = tested(model, task, circuit_of_heads(model, task.name, every, random_tokens))
    assert bool(random_components(all_heads, "anywhere", 3).all())
