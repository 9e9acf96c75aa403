"""One task, seven circuits: pruned nodes of the sparse model and of the bridged one, those nodes
over bridges (fitted, trained) in the dense model, pruned nodes of the dense model, and traced and
pruned features of the dense model.

    OMP_NUM_THREADS=1 python benchmarks/tracing_compare.py [--task TASK] [--cache DIR] [--judge]

Every circuit is a set of nodes or features that is the same at all positions; what is outside it
is set to its mean over validation text. f = (m - m0) / (m1 - m0) with m the logit difference on
held-out prompts, m1 the model's and m0 that with the circuit's whole universe removed; a
bootstrap of prompts gives the interval. Traced features are the N of largest mean absolute
attribution over training prompts (hierarchical gating with a budget, summed over positions).
Pruned features are those whose gates `prune` leaves open, with features as its nodes. With --judge
the faithfulness suite (without its searches) judges the smallest traced circuit and the pruned one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F

from tl_sparse import SparseTransformer
from tl_sparse.ablation import activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.bridges import BridgedPair, Bridges, dense_circuit, fit_bridges
from tl_sparse.circuits import PruningConfig, prune
from tl_sparse.data import CorpusConfig, build_corpus
from tl_sparse.faithfulness import EvaluationConfig, evaluate
from tl_sparse.tasks import get
from tl_sparse.tracing import (
    Gate,
    Splice,
    SplicedModel,
    feature_circuit,
    load_dictionaries,
    trace_each,
)

SIZES = (25, 50, 100, 200, 400)


def measured(name, model, circuit, batch) -> dict:
    """Loss, accuracy and share of the logit difference of a circuit on held-out prompts."""
    with torch.no_grad():
        full = task_logit_diffs(model, batch)
        with circuit.applied(model):
            alone = task_logit_diffs(model, batch)
        with replace(circuit, kept=torch.zeros_like(circuit.kept)).applied(model):
            empty = task_logit_diffs(model, batch)
    shares = ((alone - empty) / (full - empty).mean()).double()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(shares), (1000, len(shares)), generator=generator)
    low, high = shares[rows].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return {"circuit": name, "nodes": circuit.n_nodes, "of": len(circuit.kept),
            "loss": float(F.softplus(-alone).mean()), "accuracy": float((alone > 0).float().mean()),
            "model's loss": float(F.softplus(-full).mean()),
            "f": float(shares.mean()), "low": low, "high": high}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="single_double_quote")
    parser.add_argument("--target", type=float, default=0.15)
    parser.add_argument("--cache", default=None)
    parser.add_argument("--dense", default="python-dense", help="a bundled model, or a folder")
    parser.add_argument("--sparse", default="python-sparse", help="trained apart from it")
    parser.add_argument("--bridged", default="python-bridged", help="trained along with bridges")
    parser.add_argument("--bridges", default="python-bridges")
    parser.add_argument("--dictionaries", default=None, help="by default the dense model's own")
    parser.add_argument("--judge", action="store_true", help="run the faithfulness suite too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense, sparse, bridged = map(
        SparseTransformer.from_pretrained, (options.dense, options.sparse, options.bridged)
    )
    corpus = build_corpus(CorpusConfig(idiom_share=0.5), options.cache, progress=False)
    tokens = corpus.validation_sequences(128, dense.config.n_ctx)
    task = get(options.task, dense.tokenizer, dense.config.n_ctx)
    batch = task.batch(64, split="held_out", seed=1)
    config = PruningConfig(target_loss=options.target)
    rows = []
    for name, model, bridges in (
        ("sparse", sparse, fit_bridges(dense, sparse, tokens, progress=False).bridges),
        ("bridged", bridged, Bridges.from_pretrained(options.bridges)),
    ):
        found = prune(model, task, config, means=activation_means(model, tokens), progress=False)
        rows.append(measured(f"{name} model, pruned nodes", model, found, batch))
        carried = dense_circuit(BridgedPair(dense, model, bridges), found, tokens)
        rows.append(measured("the same over bridges, in the dense model", carried.model,
                             carried.circuit, batch))  # fmt: skip
    own = prune(dense, task, config, means=activation_means(dense, tokens), progress=False)
    rows.append(measured("dense model, pruned nodes", dense, own, batch))

    dictionaries = load_dictionaries(options.dictionaries or options.dense, dense)
    splice = Splice(dense, dictionaries)
    train = task.batch(26, split="train", seed=0)
    graphs = trace_each(splice, train, gate=Gate(80, "budget", "absolute"), edges="none")
    table = pd.concat([g.features.assign(size=g.features["attribution"].abs()) for g in graphs])
    ranked = table.groupby(["site", "index"])["size"].sum().sort_values(ascending=False)
    world = SplicedModel(splice, "original")
    judged = {}
    for n in SIZES:
        chosen = [(str(s), int(i)) for s, i in ranked.index[:n]]
        if len(chosen) == n:
            circuit = feature_circuit(world, chosen, task.name, tokens)
            judged.setdefault("traced", circuit)
            rows.append(measured(f"dense model, {n} traced features", world, circuit, batch))
    means = activation_means(world, tokens, index=world.index())
    judged["pruned"] = prune(world, task, config, means=means, progress=False)
    rows.append(measured("dense model, pruned features", world, judged["pruned"], batch))
    print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    for name, circuit in judged.items() if options.judge else ():
        asked = EvaluationConfig(searches=False, pairs=32)
        print(name, evaluate(world, circuit, task, asked, tokens=tokens), flush=True)


if __name__ == "__main__":
    main()
