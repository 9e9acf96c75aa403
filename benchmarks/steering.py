"""Does one node of the sparse model turn the dense model's answer? On several tasks, with controls.

Prunes the sparse model for each task, steers the dense model by every kept node that reads the
residual stream at strength 1 on train prompts, and takes the node that does most to held-out
prompts, where it prints P(other answer), among all tokens and of the two, against strength, its
controls beside it, and the same for all kept nodes at once. So no node is chosen on the prompts
that it is reported on.

    python benchmarks/steering.py                                 # the bundled bridged pair
    python benchmarks/steering.py --sparse python-sparse --fit    # ridge bridges, trained apart
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch

import tl_sparse as tls
from tl_sparse.bridges import fit_bridges, steering_curves
from tl_sparse.data import CorpusConfig, validation_text

TASKS = ("single_double_quote", "while_return_true", "for_while", "if_equals", "with_as")
STRENGTHS = (0.01, 0.1, 0.3, 0.5, 1.0, 2.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dense", default="python-dense")
    parser.add_argument("--sparse", default="python-bridged")
    parser.add_argument("--bridges", default="python-bridges", help="trained bridges")
    parser.add_argument("--fit", action="store_true", help="fit bridges instead, in closed form")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200, help="of pruning")
    parser.add_argument("--csv")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sparse = tls.SparseTransformer.from_pretrained(asked.sparse)
    dense = tls.SparseTransformer.from_pretrained(asked.dense)
    text = validation_text(CorpusConfig(), sparse.tokenizer, sequences=320, context=64)
    if asked.fit:
        bridges = fit_bridges(dense, sparse, text, progress=False).bridges
    else:
        bridges = tls.Bridges.from_pretrained(asked.bridges)
    pair = tls.BridgedPair(dense, sparse, bridges)
    means = tls.activation_means(sparse, text)
    frames = []
    for name in asked.tasks:
        task = tls.tasks.get(name, sparse.tokenizer)
        config = tls.PruningConfig(target_loss=0.15, steps=asked.steps, must_solve=False)
        try:
            circuit = tls.prune(sparse, task, config, means=means, progress=False)
        except tls.circuits.PruningFailed as failed:
            print(f"{name}: {failed}")
            continue
        rows = circuit.nodes.query("site in ('attn_in', 'mlp_in')")
        reads = list(rows.loc[rows["channel"] < sparse.cfg.d_model, "name"])
        options = {"reference": text[:48], "exclude": reads, "task": name}
        train = task.batch(asked.pairs, split="train", seed=1)
        try:
            tried = steering_curves(pair, train, reads, strengths=(1.0,), draws=0, **options)
        except ValueError as unequal:  # of prompts of other lengths only the ends correspond
            print(f"{name}: steered at the last token alone ({str(unequal)[:60]} ...)")
            options["positions"] = "last"
            tried = steering_curves(pair, train, reads, strengths=(1.0,), draws=0, **options)
        frame = tried.to_dataframe().query("kind == 'node'")
        best = str(frame.nlargest(1, "p_other_of_two")["nodes"].iloc[0])
        held_out = task.batch(asked.pairs, split="held_out", seed=1)
        found = [steering_curves(pair, held_out, best, strengths=STRENGTHS, **options)]
        if len(reads) > 1:
            found.append(steering_curves(pair, held_out, reads, strengths=STRENGTHS, draws=1,
                                         **options))  # fmt: skip
        print(f"{name}: {circuit.n_nodes} nodes, {len(reads)} read; {found[0].line}", flush=True)
        for curves, of in zip(found, (best, "together"), strict=False):
            table = curves.to_dataframe()
            table = table[table["of"] == of]
            frames.append(table.assign(task=name, unsteered=float(curves.base_other.mean())))
    whole = pd.concat(frames)
    for column in ("p_other_of_two", "p_other"):
        print(f"\n{column}")
        print(whole.pivot_table(index=["task", "of", "kind"], columns="strength", values=column,
                                sort=False).round(3).to_string())  # fmt: skip
    if asked.csv:
        whole.to_csv(asked.csv, index=False)


if __name__ == "__main__":
    main()
