"""Do traced graphs hold under intervention? Hierarchical gating against its baselines, by task.

    OMP_NUM_THREADS=1 python benchmarks/tracing_table.py [--tasks ...] [--pairs 52] [--out FILE]

For each task and number of nodes N, every prompt gets a set of N nodes (a feature of a dictionary
at a position), chosen by

- hierarchical: gating with a budget of N (Ge et al. 2024), by signed or absolute score;
- attribution: the N of largest gradient times activation, without a gate (signed or absolute);
- change: gradient times the change of the activation from the pair's other prompt (as attribution
  patching, on the same nodes);
- activation: the N of largest activation times length of direction; random: as many nodes of each
  dictionary as the hierarchical set has, drawn at random.

Then, in the model itself, with errors kept: what is outside the set (sufficiency f) or inside it
(necessity 1 - f of the rest) is set to its value on the pair's other prompt, where that has the
same length ("pair"; "active": of features that are active in the prompt alone, so that none comes
to it from the other prompt), or to 0; f = (m - m0) / (m1 - m0) with m the logit difference, m1
the model's and m0 that with every feature ablated; a row's f is the ratio of means over prompts,
its interval a bootstrap of them. R is the linear world's: the share of the root that the gate
does not cut off; "R features" that of the embedding's features alone, as in the paper. Prompts
are held out ones that had no part in training the dictionaries.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse import SparseTransformer
from tl_sparse.ablation.logit_diff import logits_at
from tl_sparse.tasks import get
from tl_sparse.tracing import Gate, Splice, load_dictionaries, trace_each

TASKS = ("single_double_quote", "bracket_brace", "lambda_func")
SIZES = (20, 80, 320)
Sets = dict[str, Tensor]  # site -> bool [prompt, pos, feature]


class Features:
    """Activations of all dictionaries on some prompts, and runs with some of them set."""

    def __init__(self, model, dictionaries, batch) -> None:
        self.model, self.dictionaries, self.batch = model, dictionaries, batch
        self.real = torch.arange(batch.tokens.shape[1]) <= batch.last[:, None]
        names = sorted({h for d in dictionaries for h in (d.hook_in, d.hook_out)})
        with torch.no_grad():
            _, cache = model.run_with_cache(batch.tokens, names_filter=lambda n: n in names)
        self.active = {d.name: d.encode(cache[d.hook_in]) * self.real[..., None]
                       for d in dictionaries}  # fmt: skip
        self.other = self.of_partners()

    def of_partners(self) -> dict[str, Tensor]:
        """Activations on each pair's other prompt; 0 where it has another length."""
        partner = torch.arange(len(self.batch)) ^ 1
        same = (self.batch.last == self.batch.last[partner])[:, None, None]
        return {name: x[partner] * same for name, x in self.active.items()}

    @torch.no_grad()
    def diffs(self, ablated: Sets, values: dict[str, Tensor]) -> Tensor:
        """Logit difference of each prompt with these nodes set to these values; features further up
        are what they become."""
        seen: dict[str, Tensor] = {}
        hooks: list[tuple[str, Any]] = []

        def keep(x, hook):
            seen[hook.name] = x

        def put(each):
            def hook_(x, hook):
                features = each.encode(seen[each.hook_in] if each.transcoder else x)
                change = (values[each.name] - features) * ablated[each.name]
                return x + change @ each.W_dec

            return hook_

        for each in self.dictionaries:
            if each.transcoder:
                hooks.append((each.hook_in, keep))
            hooks.append((each.hook_out, put(each)))
        logits = logits_at(self.model, self.batch.tokens, self.batch.last, hooks)
        rows = torch.arange(len(logits))
        return logits[rows, self.batch.correct_token] - logits[rows, self.batch.incorrect_token]

    def sets(self, tables: list[pd.DataFrame]) -> Sets:
        """Node sets from graphs' feature tables, one for each prompt."""
        found = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in self.active.items()}
        for prompt, table in enumerate(tables):
            for site, part in table.groupby("site"):
                at = (torch.tensor(part[c].to_numpy(copy=True)) for c in ("pos", "index"))
                found[str(site)][prompt].__setitem__(tuple(at), True)
        return found

    def top(self, scores: dict[str, Tensor], n: int) -> Sets:
        """The n active nodes of each prompt with the largest scores."""
        flat = torch.cat([
            scores[name].where(self.active[name] > 0, -torch.inf).flatten(1) for name in scores
        ], dim=1)  # fmt: skip
        best = flat.topk(n, dim=1)
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen.scatter_(1, best.indices, best.values > -torch.inf)
        parts = chosen.split([x[0].numel() for x in scores.values()], dim=1)
        return {name: part.view_as(scores[name])
                for name, part in zip(scores, parts, strict=True)}  # fmt: skip

    def random_like(self, sets: Sets, generator: torch.Generator) -> Sets:
        """As many active nodes of each dictionary in each prompt, at random."""
        found = {}
        for name, chosen in sets.items():
            noise = torch.rand(chosen.shape, generator=generator)
            noise = noise.where(self.active[name] > 0, -1.0).flatten(1)
            order = noise.argsort(1, descending=True)
            wanted = chosen.flatten(1).sum(1, keepdim=True)
            keep = torch.arange(order.shape[1])[None] < wanted
            found[name] = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, order, keep)
            found[name] = found[name].view_as(chosen)
        return found


def ratio(numerator: Tensor, denominator: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of means over prompts, and its bootstrap interval (95 %)."""
    rng = np.random.default_rng(seed)
    a, b = numerator.double().numpy(), denominator.double().numpy()
    draws = rng.integers(0, len(a), (1000, len(a)))
    low, high = np.percentile(a[draws].mean(1) / b[draws].mean(1), [2.5, 97.5])
    return float(a.mean() / b.mean()), float(low), float(high)


def gradients(model, splice, batch, features: Features):
    """Plain gradient times activation of every node, its gradient, and recovery's root values."""
    graphs = trace_each(splice, batch, gate=Gate.off(), edges="none")
    score = {name: torch.zeros_like(x) for name, x in features.active.items()}
    gradient = {name: torch.zeros_like(x) for name, x in features.active.items()}
    for prompt, graph in enumerate(graphs):
        for site, part in graph.features.groupby("site"):
            at = tuple(torch.tensor(part[c].to_numpy(copy=True)) for c in ("pos", "index"))
            for into, column in ((score, "attribution"), (gradient, "gradient")):
                values = torch.tensor(part[column].to_numpy(copy=True))
                into[str(site)][prompt][at] = values.to(into[str(site)].dtype)
    return score, gradient


def table_of(model, dictionaries, task: str, pairs: int, sizes, ablations) -> list[dict[str, Any]]:
    """All rows of a task."""
    batch = get(task, model.tokenizer, model.config.n_ctx).batch(pairs, split="held_out", seed=0)
    splice = Splice(model, dictionaries)
    features = Features(model, dictionaries, batch)
    nothing = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in features.active.items()}
    all_of = {name: ~x & features.real[..., None] for name, x in nothing.items()}
    full = features.diffs(nothing, features.active)
    accuracy = float((full > 0).float().mean())
    score, gradient = gradients(model, splice, batch, features)
    norms = {d.name: d.W_dec.norm(dim=1) for d in dictionaries}
    generator = torch.Generator().manual_seed(0)
    zero = {name: torch.zeros_like(x) for name, x in features.active.items()}
    change = {k: gradient[k] * (features.active[k] - features.other[k]) for k in score}
    written = {k: x * norms[k] for k, x in features.active.items()}
    there = {k: x > 0 for k, x in features.active.items()}
    worlds = {"pair": (all_of, features.other), "active": (there, features.other),
              "zero": (all_of, zero)}  # fmt: skip
    rows = []
    for n in sizes:
        gated = {}
        for sign in ("absolute", "positive"):
            graphs = trace_each(splice, batch, gate=Gate(n, "budget", sign), edges="none")
            gated[sign] = features.sets([g.features for g in graphs])
        roots = torch.tensor([g.value for g in graphs])
        cut = torch.tensor([g.mass.get("cut", 0.0) for g in graphs])
        leaves = torch.tensor([g.mass.get("feature", 0.0) for g in graphs])
        chosen = {
            "hierarchical": gated["positive"], "hierarchical |.|": gated["absolute"],
            "attribution": features.top(score, n),
            "change": features.top({k: x.abs() for k, x in change.items()}, n),
            "activation": features.top(written, n),
            "random": features.random_like(gated["positive"], generator),
        }  # fmt: skip
        for kind in ablations:
            universe, values = worlds[kind]
            empty = features.diffs(universe, values)
            whole = full - empty
            for method, inside in chosen.items():
                outside = {k: universe[k] & ~inside[k] for k in inside}
                f = ratio(features.diffs(outside, values) - empty, whole)
                c = ratio(features.diffs(inside, values) - empty, whole)
                gates = method == "hierarchical"
                rows.append({
                    "task": task, "ablation": kind, "N": n, "method": method,
                    "nodes": float(sum(x.flatten(1).sum(1).float().mean()
                                       for x in inside.values())),
                    "sufficiency": f[0], "low": f[1], "high": f[2],
                    "necessity": 1 - c[0], "n_low": 1 - c[2], "n_high": 1 - c[1],
                    "R": ratio(roots - cut, roots)[0] if gates else float("nan"),
                    "R features": ratio(leaves, roots)[0] if gates else float("nan"),
                    "accuracy": accuracy, "prompts": len(batch),
                    "m1": float(full.mean()), "m0": float(empty.mean()),
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="python-dense")
    parser.add_argument("--dictionaries", default=None)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--pairs", type=int, default=52)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--ablations", nargs="+", default=["pair", "active", "zero"])
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SparseTransformer.from_pretrained(options.model)
    dictionaries = load_dictionaries(options.dictionaries or options.model, model)
    rows: list[dict[str, Any]] = []
    for task in tqdm(options.tasks):
        rows += table_of(model, dictionaries, task, options.pairs, options.sizes, options.ablations)
        table = pd.DataFrame(rows)
        if options.out is not None:
            Path(options.out).write_text(json.dumps(rows, indent=1))
    print(table.drop(columns=["m0", "m1"]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
