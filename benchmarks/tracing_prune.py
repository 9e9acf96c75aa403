"""Who should prune a traced graph? Annotators against thresholds, attribution and chance.

    OMP_NUM_THREADS=1 python benchmarks/tracing_prune.py [--from 80] [--to 20]

Every held out prompt's graph, of --from nodes, is cut down to --to of them:

- threshold: a new trace with a budget of so many nodes;
- attribution: those of largest absolute attribution; random: any of them;
- rule: `RuleAnnotator`, which cuts graphs of more than 60 nodes by layer, as annotators are asked;
- cards: an annotator that sees what a language model sees of a node and not its size: it keeps
  nodes whose directions raise an answer, then those that the tokens of their examples fit.

No language model can be had offline; `cards` stands in for one, and says nothing about how good one
would be. Sufficiency and necessity as in `tracing_table.py`: features are set to their values on
the pair's other prompt, among those that are active ("active").
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from tracing_table import Features, measured, of_task

from tl_sparse import SparseTransformer
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.tracing import (
    Gate,
    RuleAnnotator,
    Splice,
    annotate,
    feature_cards,
    load_dictionaries,
    trace_each,
)
from tl_sparse.tracing.annotation.answers import Label, NodesAnswer, WholeAnswer


@dataclass(frozen=True)
class CardsAnnotator:
    """Keeps nodes by their cards alone."""

    answers: tuple[str, ...]
    name: str = "cards"

    def nodes(self, request: dict[str, Any]) -> NodesAnswer:
        def fits(row: dict[str, Any]) -> tuple[bool, int]:
            peaks = Counter(line.rsplit("\t", 1)[0] for example in row["top_examples"]
                            for line in example if float(line.rsplit("\t", 1)[1]) > 0)  # fmt: skip
            raises = any(answer in row["raises_logits_of"] for answer in self.answers)
            return raises, peaks[row["token"]]

        ranked = sorted(request["nodes"], key=fits, reverse=True)
        keep = [row["id"] for row in ranked[: request["keep_about"]]]
        drop = {row["id"]: "does not fit" for row in ranked[request["keep_about"] :]}
        return NodesAnswer(tuple(keep), drop, {name: Label("fits", 1.0) for name in keep})

    def whole(self, request: dict[str, Any]) -> WholeAnswer:
        return WholeAnswer({}, "", ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="python-dense")
    parser.add_argument("--task", default="single_double_quote")
    parser.add_argument("--pairs", type=int, default=52)
    parser.add_argument("--from", type=int, default=80, dest="large")
    parser.add_argument("--to", type=int, default=20, dest="small")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SparseTransformer.from_pretrained(options.model)
    dictionaries = load_dictionaries(options.model, model)
    batch = of_task(options.task, model).batch(options.pairs, split="held_out", seed=0)
    splice, features = Splice(model, dictionaries), Features(model, dictionaries, batch)
    graphs, fewer = (
        trace_each(splice, batch, gate=Gate(n, "budget"), edges="none")
        for n in (options.large, options.small)
    )
    large = [g.features for g in graphs]
    keys = {(str(s), int(i)) for t in large for s, i in t[["site", "index"]].to_numpy()}
    text = validation_text(CorpusConfig(), model.tokenizer, 128, context=model.config.n_ctx)
    cards = feature_cards(model, dictionaries, sorted(keys), text)
    answers = tuple(sorted(set(batch.answers)))
    chosen: dict[str, list[pd.DataFrame]] = {"all": large, "threshold": [g.features for g in fewer]}
    n = options.small
    chosen["attribution"] = [t.loc[t["attribution"].abs().nlargest(n).index] for t in large]
    chosen["random"] = [t.sample(min(n, len(t)), random_state=i) for i, t in enumerate(large)]
    for name, annotator in (("rule", RuleAnnotator()), ("cards", CardsAnnotator(answers))):
        kept = [annotate(g, cards, annotator, n_nodes=n).keep for g in tqdm(graphs, desc=name)]
        chosen[name] = [t[t["id"].isin(ids)] for t, ids in zip(large, kept, strict=True)]
    there = {k: x > 0 for k, x in features.active.items()}
    nothing = {k: torch.zeros_like(x) for k, x in there.items()}
    full = features.diffs(nothing, features.active)
    empty = features.diffs(there, features.other)
    rows = []
    for name, tables in chosen.items():
        found = measured(features, there, features.sets(tables), features.other, full, empty, 3)
        rows.append({"pruned by": name, **found})
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
