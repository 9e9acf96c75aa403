"""A second way to every number: one prompt at a time, by plain hooks and loops."""

import math


def slow_logit_diffs(model, batch, index, keep, value_of):
    """Logit differences, one prompt at a time; ``value_of(hook, prompt, positions)`` is [pos,
    channel]."""
    import torch

    found = []
    for i in range(len(batch)):
        tokens = batch.tokens[i : i + 1, : int(batch.last[i]) + 1]

        def ablate(x, hook=None, *, name, number=i):
            flat = x.detach().clone().flatten(2)
            removed = ~keep[index.slices[name]]
            flat[0][:, removed] = value_of(name, number, x.shape[1])[:, removed]
            return flat.view(x.shape)

        hooks = [(name, lambda x, hook=None, n=name: ablate(x, name=n)) for name in index.slices]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        last = logits[0, -1]
        found.append(float(last[batch.correct_token[i]] - last[batch.incorrect_token[i]]))
    return found


def mean(values):
    return math.fsum(values) / len(values)


def loss(logit_diffs):
    return mean([math.log1p(math.exp(-m)) for m in logit_diffs])


def fixed(index, values):
    """Values for :func:`slow_logit_diffs` that are the same for all prompts and positions."""
    return lambda name, number, positions: values[index.slices[name]].expand(positions, -1)


def together(*names):
    """A function that runs several checks and gives all they find as one result."""
    from tl_sparse.faithfulness import CheckResult
    from tl_sparse.faithfulness.evaluate import measured
    from tl_sparse.faithfulness.registry import check_of

    def run(test):
        found = [measured(check_of(name), test) for name in names]
        return CheckResult(
            tuple(m for one in found for m in one.measures),
            {name: table for one in found for name, table in one.tables.items()},
            tuple(note for one in found for note in one.notes),
        )

    return run
