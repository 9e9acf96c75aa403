"""Are features better than linear probes? What they read, and what changing them does.

    OMP_NUM_THREADS=1 python benchmarks/tracing_probes.py brackets
    OMP_NUM_THREADS=1 python benchmarks/tracing_probes.py edits [--model RUN/model \
        --dictionaries RUN/dictionaries --task RUN/agreement.jsonl]

brackets: at every token of validation text, is the text inside a bracket (depth 1 or more), and is
it in two or more, given that it is in one? For every dictionary the held out AUROC of the one
feature (and of the one channel of what the dictionary explains) that was best on the other half of
the text, and of a logistic regression on all features, and on all channels.

edits: which member of its pair is a prompt, at its last token? Held out AUROC as above. Then, at
the last token, either the direction between the members' mean activations is erased (set to the
mean), or the 1, 4 and 16 features that differ most are set to their means; what is lost of the
logit difference. Directions, means and features are of the task's training prompts.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tracing_table import of_task

from tl_sparse import SparseTransformer
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.tracing import Splice, SplicedModel, load_dictionaries

OPEN, CLOSE = "([{", ")]}"


def depths(tokens: Tensor, tokenizer) -> Tensor:
    """How many brackets are open behind each token, counted from the start of its sequence."""
    steps = torch.zeros(len(tokenizer), dtype=torch.long)
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        steps[i] = sum(text.count(c) for c in OPEN) - sum(text.count(c) for c in CLOSE)
    depth, found = torch.zeros(len(tokens), dtype=torch.long), []
    for step in steps[tokens].T:
        depth = (depth + step).clamp(min=0)  # what was open before the sequence is not known
        found.append(depth)
    return torch.stack(found, 1)


def auroc(x: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Of each column."""
    ranks, n = rankdata(x, axis=0), label.sum()
    return (ranks[label].sum(0) - n * (n + 1) / 2) / (n * (len(label) - n))


def best(
    train: np.ndarray, own: np.ndarray, test: np.ndarray, label: np.ndarray
) -> tuple[int, float]:
    """The column that is best on one half, and its AUROC on the other."""
    values = auroc(train, own)
    column = int(np.abs(values - 0.5).argmax())
    found = float(auroc(test[:, column : column + 1], label)[0])
    return column, found if values[column] > 0.5 else 1 - found


def probe(train: np.ndarray, own: np.ndarray, test: np.ndarray, label: np.ndarray) -> float:
    """AUROC of a logistic regression on the other half."""
    scale = train.std(0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge to the last digit
        fitted = LogisticRegression(C=0.1, max_iter=200).fit(train / scale, own)
    return float(roc_auc_score(label, fitted.decision_function(test / scale)))


def row(name: str, x: Tensor, features: Tensor, label: Tensor, train: Tensor) -> dict:
    """All four figures of one label at one dictionary."""
    found: dict = {"what": name, "share": float(label.float().mean())}
    a, b = label[train].numpy(), label[~train].numpy()
    for kind, values in (("feature", features), ("channel", x)):
        here, there = values[train].numpy(), values[~train].numpy()
        found[f"best {kind}"], found[f"AUROC, {kind}"] = best(here, a, there, b)
        found[f"probe, {kind}s"] = probe(here, a, there, b)
    return found


@torch.no_grad()
def brackets(model, dictionaries, n: int) -> list[dict]:
    tokens = validation_text(CorpusConfig(), model.tokenizer, n, context=model.config.n_ctx)
    depth = depths(tokens, model.tokenizer).flatten()
    train = (torch.arange(len(tokens)) % 2 == 0).repeat_interleave(tokens.shape[1])
    _, cache = model.run_with_cache(tokens)
    rows = []
    for d in dictionaries:
        x = cache[d.hook_out].flatten(0, 1)
        features = d.encode(cache[d.hook_in].flatten(0, 1), x)
        inside = depth > 0
        rows.append(row(f"{d.name}: in a bracket", x, features, inside, train))
        rows.append(row(f"{d.name}: in two, of these", x[inside], features[inside],
                        depth[inside] > 1, train[inside]))  # fmt: skip
    return rows


@torch.no_grad()
def edits(model, dictionaries, task, pairs: int) -> list[dict]:
    batches = [task.batch(pairs, split=split, seed=0) for split in ("train", "held_out")]
    world, rows = SplicedModel(Splice(model, dictionaries), "original"), []
    held = batches[1]
    full = float(task_logit_diffs(model, held).mean())
    at = torch.arange(len(held))
    for d in dictionaries:
        seen = []
        for batch in batches:
            _, cache = model.run_with_cache(batch.tokens)
            last = torch.arange(len(batch)), batch.last
            x = cache[d.hook_out][last]
            seen.append((x, d.encode(cache[d.hook_in][last], x), last[0] % 2 == 0))
        (x, features, label), (x_held, features_held, label_held) = seen
        train = torch.arange(2 * len(x)) < len(x)
        found = row(d.name, torch.cat([x, x_held]), torch.cat([features, features_held]),
                    torch.cat([label, label_held]), train)  # fmt: skip
        direction = x[label].mean(0) - x[~label].mean(0)
        direction /= direction.norm().clamp(min=1e-9)

        x_mean, features_mean = x.mean(0), features.mean(0)

        def erase(y, hook, u=direction, mean=x_mean):
            y = y.clone()
            y[at, held.last] -= ((y[at, held.last] - mean) @ u)[:, None] * u
            return y

        found["direction erased"] = 1 - lost(model, held, d.hook_out, erase) / full
        order = (features[label].mean(0) - features[~label].mean(0)).abs().argsort(descending=True)
        for n in (1, 4, 16):

            def put(y, hook, chosen=order[:n], mean=features_mean):
                y = y.clone()
                y[at[:, None], held.last[:, None], chosen] = mean[chosen]
                return y

            found[f"{n} features"] = 1 - lost(world, held, world.names[d.name], put) / full
        rows.append(found)
    return rows


def lost(model, batch, hook: str, function) -> float:
    """The mean logit difference with a hook."""
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=[(hook, function)])
    rows = torch.arange(len(batch))
    logits = logits[rows, batch.last]
    return float((logits[rows, batch.correct_token] - logits[rows, batch.incorrect_token]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["brackets", "edits"])
    parser.add_argument("--model", default="python-dense")
    parser.add_argument("--dictionaries", default=None)
    parser.add_argument("--task", default="single_double_quote")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SparseTransformer.from_pretrained(options.model)
    dictionaries = load_dictionaries(options.dictionaries or options.model, model)
    if options.what == "brackets":
        rows = brackets(model, dictionaries, options.sequences)
    else:
        rows = edits(model, dictionaries, of_task(options.task, model), options.pairs)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
