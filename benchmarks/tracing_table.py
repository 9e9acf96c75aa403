"""Do traced graphs hold under intervention? Hierarchical gating against its baselines, by task.

    OMP_NUM_THREADS=1 python benchmarks/tracing_table.py [--tasks ...] [--pairs 52] [--out FILE]
    OMP_NUM_THREADS=1 python benchmarks/tracing_table.py --model RUN/model \\
        --dictionaries RUN/dictionaries --tasks RUN/induction.jsonl   # after tracing_models.py

For each task and number of nodes N, every prompt gets a set of N nodes (a feature of a dictionary
at a position), chosen by

- gate, gate abs.: hierarchical gating with a budget of N (Ge et al. 2024), by signed or absolute
  score;
- attribution: the N of largest gradient times activation with everything frozen, without a gate;
- by the absolute value of what the difference is thought to change by if the feature goes to what
  it is replaced by: attribution abs. (everything frozen), EAP (nothing frozen,
  the sum of EAP's scores of a node's edges), IG, EAP-IG (10 steps each), or exact (a run each);
- activation: the N of largest activation times length of direction;
- random: as many active nodes of each dictionary as the gate's set has, drawn at random; random,
  either: as many as EAP-IG's set has, of what EAP-IG chooses from (for "pair" what is active in
  either prompt).

Two more show why a set fails: gate, both: the gate's N/2 nodes of the prompt and, where that has
the same length, the N/2 of the pair's other prompt, traced to its own answer; EAP-IG, own: the N
of largest EAP-IG score among features that are active in the prompt itself.

Then, in the model itself, with errors kept: what is outside the set (sufficiency f) or inside it
(necessity 1 - f of the rest) is set to its value on the pair's other prompt, where that has the
same length ("pair"; "active": of features that are active in the prompt alone, so that none comes
to it from the other prompt), or to 0; f = (m - m0) / (m1 - m0) with m the logit difference, m1
the model's and m0 that with every feature ablated; a row's f is the ratio of means over prompts,
its interval a bootstrap of them. Completeness (the gap) is that of Wang et al. 2022: a random half
K of the set C is removed too; |m(C - K) - m(M - K)| of the means over m1 - m0, mean of --draws
draws. R is the linear world's: the share of the root that the gate does not cut off. Prompts are
held out ones that had no part in training the dictionaries.

    # as in docs/tracing.md
    python benchmarks/tracing_table.py --table sufficiency FILE [FILE ...] [--columns gate EAP-IG]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_sparse import SparseTransformer
from tl_sparse.ablation.logit_diff import logits_at
from tl_sparse.tasks import TaskBatch, from_jsonl, get
from tl_sparse.tracing import (
    Gate,
    LogitDiff,
    Splice,
    baseline_scores,
    load_dictionaries,
    trace_each,
)
from tl_sparse.tracing.baselines import Method

TASKS = ("single_double_quote", "bracket_brace")
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
        self.partner = torch.arange(len(batch)) ^ 1
        self.paired = batch.last == batch.last[self.partner]
        self.other = {name: x[self.partner] * self.paired[:, None, None]
                      for name, x in self.active.items()}  # fmt: skip

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

    def top(self, scores: dict[str, Tensor], n: int, among: Sets) -> Sets:
        """The n nodes of each prompt with the largest scores."""
        flat = torch.cat([
            scores[name].where(among[name], -torch.inf).flatten(1) for name in self.active
        ], dim=1)  # fmt: skip
        best = flat.topk(n, dim=1)
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen.scatter_(1, best.indices, best.values > -torch.inf)
        parts = chosen.split([x[0].numel() for x in self.active.values()], dim=1)
        return {name: part.view_as(self.active[name])
                for name, part in zip(self.active, parts, strict=True)}  # fmt: skip

    def halved(self, sets: Sets, generator: torch.Generator) -> Sets:
        """A random half of each set."""
        return {k: x & (torch.rand(x.shape, generator=generator) < 0.5) for k, x in sets.items()}

    def with_other(self, sets: Sets) -> Sets:
        """Each prompt's set and that of its other prompt, where that has the same length."""
        return {name: x | x[self.partner] & self.paired[:, None, None] for name, x in sets.items()}

    def random_like(self, sets: Sets, among: Sets, generator: torch.Generator) -> Sets:
        """As many nodes of each dictionary in each prompt, at random among some."""
        found = {}
        for name, chosen in sets.items():
            noise = torch.rand(chosen.shape, generator=generator)
            noise = noise.where(among[name], -1.0).flatten(1)
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


METHODS: dict[str, Method] = {
    "attribution abs.": "attribution", "EAP": "gradient", "IG": "ig", "EAP-IG": "eap_ig",
    "exact": "exact",
}  # fmt: skip
"""Baselines by the names of their methods; exact patching comes after EAP-IG."""


def scores_of(
    splice: Splice,
    batch: TaskBatch,
    features: Features,
    paired: bool,
    exact: int | None,
    skip: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    """Scores of every node by each baseline: of going to the pair's other prompt, or to 0."""
    methods = {name: method for name, method in METHODS.items() if name not in skip}
    found = {m: {k: torch.zeros_like(x) for k, x in features.active.items()} for m in methods}
    same = features.paired if paired else torch.zeros_like(features.paired)
    for with_other, rows in ((True, same.nonzero()[:, 0]), (False, (~same).nonzero()[:, 0])):
        if not len(rows):
            continue
        some = batch.select((rows[::2] // 2).tolist())
        tokens = [t[: n + 1].tolist() for t, n in zip(some.tokens, some.last, strict=True)]
        root = LogitDiff(some.correct_token.tolist(), some.incorrect_token.tolist())
        other = [tokens[i ^ 1] for i in range(len(tokens))] if with_other else None
        table = pd.DataFrame()
        for name, method in methods.items():
            only = None
            if name == "exact" and exact is not None:  # `table` is EAP-IG's
                size = table["score"].abs().groupby(table["prompt"]).rank(ascending=False)
                only = table[size <= exact]
            table = baseline_scores(splice, tokens, root, method, world="original", other=other,
                                    only=only, batch_size=256)  # fmt: skip
            for site, part in table.groupby("site"):
                prompt, pos, index = (torch.tensor(part[c].to_numpy(copy=True))
                                      for c in ("prompt", "pos", "index"))  # fmt: skip
                values = torch.tensor(part["score"].to_numpy(copy=True))
                into = found[name][str(site)]
                into[rows[prompt], pos, index] = values.to(into.dtype)
    return found


def attributions(splice: Splice, batch: TaskBatch, features: Features) -> dict[str, Tensor]:
    """Plain gradient times activation of every node, with its sign."""
    graphs = trace_each(splice, batch, gate=Gate.off(), edges="none")
    score = {name: torch.zeros_like(x) for name, x in features.active.items()}
    for prompt, graph in enumerate(graphs):
        for site, part in graph.features.groupby("site"):
            at = tuple(torch.tensor(part[c].to_numpy(copy=True)) for c in ("pos", "index"))
            values = torch.tensor(part["attribution"].to_numpy(copy=True))
            score[str(site)][prompt][at] = values.to(score[str(site)].dtype)
    return score


def of_task(name: str, model: SparseTransformer) -> Any:
    """A task by name, or from a file of pairs."""
    return from_jsonl(name, model) if name.endswith(".jsonl") else get(name, model)


def table_of(model, dictionaries, options, task: str) -> list[dict[str, Any]]:
    """All rows of a task."""
    batch = of_task(task, model).batch(options.pairs, split="held_out", seed=0)
    task = Path(task).stem
    splice = Splice(model, dictionaries)
    features = Features(model, dictionaries, batch)
    nothing = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in features.active.items()}
    all_of = {name: ~x & features.real[..., None] for name, x in nothing.items()}
    full = features.diffs(nothing, features.active)
    signed = attributions(splice, batch, features)
    norms = {d.name: d.W_dec.norm(dim=1) for d in dictionaries}
    zero = {name: torch.zeros_like(x) for name, x in features.active.items()}
    written = {k: x * norms[k] for k, x in features.active.items()}
    there = {k: x > 0 for k, x in features.active.items()}
    either = {k: there[k] | (features.other[k] > 0) for k in there}
    worlds = {"pair": (all_of, either, features.other), "active": (there, there, features.other),
              "zero": (all_of, there, zero)}  # fmt: skip
    scores = {}
    for to_other in {kind != "zero" for kind in options.ablations}:
        scores[to_other] = scores_of(splice, batch, features, to_other, options.exact, options.skip)
    gated, both, recovered = {}, {}, {}
    for n in options.sizes:
        for sign in ("absolute", "positive"):
            graphs = trace_each(splice, batch, gate=Gate(n, "budget", sign), edges="none")
            gated[n, sign] = features.sets([g.features for g in graphs])
        half = trace_each(splice, batch, gate=Gate(n // 2, "budget"), edges="none")
        both[n] = features.with_other(features.sets([g.features for g in half]))
        roots = torch.tensor([g.value for g in graphs])
        cut = torch.tensor([g.mass.get("cut", 0.0) for g in graphs])
        recovered[n] = ratio(roots - cut, roots)[0]
    rows = []
    for kind in options.ablations:
        universe, among, values = worlds[kind]
        empty = features.diffs(universe, values)
        for n in options.sizes:
            generator = torch.Generator().manual_seed(0)
            chosen = {
                "gate": gated[n, "positive"], "gate abs.": gated[n, "absolute"],
                "gate, both": both[n], "attribution": features.top(signed, n, there),
            }  # fmt: skip
            for method, found in scores[kind != "zero"].items():
                size = {k: x.abs() for k, x in found.items()}
                chosen[method] = features.top(size, n, among)
                if method == "EAP-IG":
                    chosen["EAP-IG, own"] = features.top(size, n, there)
            chosen["activation"] = features.top(written, n, there)
            chosen["random"] = features.random_like(gated[n, "positive"], there, generator)
            if "EAP-IG" in chosen:
                chosen["random, either"] = features.random_like(chosen["EAP-IG"], among, generator)
            for method, inside in chosen.items():
                row = measured(features, universe, inside, values, full, empty, options.draws)
                rows.append({
                    "task": task, "ablation": kind, "N": n, "method": method, **row,
                    "R": recovered[n] if method == "gate" else float("nan"),
                    "accuracy": float((full > 0).float().mean()), "prompts": len(batch),
                    "m1": float(full.mean()), "m0": float(empty.mean()),
                })  # fmt: skip
    return rows


def measured(
    features: Features,
    universe: Sets,
    inside: Sets,
    values,
    full: Tensor,
    empty: Tensor,
    draws: int,
) -> dict[str, float]:
    """Sufficiency, necessity and the completeness gap of node sets, with intervals."""
    whole = full - empty
    outside = {k: universe[k] & ~inside[k] for k in inside}
    f = ratio(features.diffs(outside, values) - empty, whole)
    c = ratio(features.diffs(inside, values) - empty, whole)
    generator, gaps = torch.Generator().manual_seed(1), []
    for _ in range(draws):
        half = features.halved(inside, generator)
        without = {k: outside[k] | half[k] for k in half}
        gaps.append(ratio(features.diffs(without, values) - features.diffs(half, values), whole))
    gap = np.abs(np.array([g[0] for g in gaps])).mean() if gaps else float("nan")
    return {
        "nodes": float(sum(x.flatten(1).sum(1).float().mean() for x in inside.values())),
        "sufficiency": f[0], "sufficiency low": f[1], "sufficiency high": f[2],
        "necessity": 1 - c[0], "necessity low": 1 - c[2], "necessity high": 1 - c[1],
        "completeness": float(gap),
    }  # fmt: skip


WITHOUT_INTERVAL = ("activation", "random", "random, either", "attribution abs.", "IG")


def markdown(rows: list[dict[str, Any]], measure: str, columns: Sequence[str] = ()) -> str:
    """One measure of all rows as a table of Markdown, methods (all, or some) as columns."""
    frame = pd.DataFrame(rows)
    methods = [m for m in dict.fromkeys(frame["method"]) if m in columns or not columns]
    lines = ["| " + " | ".join(["task", "outside is", "N", "R", *methods]) + " |"]
    lines.append("|---" * (4 + len(methods)) + "|")
    for (task, kind, n), part in frame.groupby(["task", "ablation", "N"], sort=False):
        by = part.set_index("method")
        cells = []
        for method in methods:
            cell = f"{by.loc[method, measure]:.2f}"
            if f"{measure} low" in by and method not in WITHOUT_INTERVAL:
                low, high = (by.loc[method, f"{measure} {end}"] for end in ("low", "high"))
                cell += f" [{low:.2f}, {high:.2f}]"
            cells.append(cell)
        recovered = f"{by.loc['gate', 'R']:.2f}"
        lines.append("| " + " | ".join([task, kind, str(n), recovered, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="python-dense")
    parser.add_argument("--dictionaries", default=None)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="names, or files of pairs")
    parser.add_argument("--pairs", type=int, default=52)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--ablations", nargs="+", default=["pair", "active", "zero"])
    parser.add_argument("--draws", type=int, default=3, help="random halves, for completeness")
    parser.add_argument("--exact", type=int, default=None, help="patch only this many nodes of "
                        "a prompt, those of largest EAP-IG score")  # fmt: skip
    parser.add_argument("--skip", nargs="*", default=[], choices=METHODS, help="baselines")
    parser.add_argument("--out", default=None)
    parser.add_argument("--table", nargs="+", default=None, help="a measure, and files of --out")
    parser.add_argument("--columns", nargs="+", default=[], help="with --table: these methods")
    options = parser.parse_args()
    if options.table is not None:
        measure, *files = options.table
        rows = [row for f in files for row in json.loads(Path(f).read_text())]
        print(markdown(rows, measure, options.columns))
        return
    torch.set_num_threads(1)
    model = SparseTransformer.from_pretrained(options.model)
    dictionaries = load_dictionaries(options.dictionaries or options.model, model)
    rows = []
    for task in tqdm(options.tasks):
        rows += table_of(model, dictionaries, options, task)
        if options.out is not None:
            Path(options.out).write_text(json.dumps(rows, indent=1))
    for measure in ("sufficiency", "necessity", "completeness"):
        print(measure, markdown(rows, measure), sep="\n")


if __name__ == "__main__":
    main()
