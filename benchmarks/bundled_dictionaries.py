"""The dictionaries that ship with python-dense: trained, measured and packed.

    python benchmarks/bundled_dictionaries.py RUN_FOLDER [--out FOLDER] [--steps N] [--measure]

Run again, an interrupted training goes on exactly. With --measure nothing is trained: the
dictionaries in RUN_FOLDER, or those that ship if it is a bundled model's name, are measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from tl_sparse import SparseTransformer
from tl_sparse.data import CorpusConfig, build_corpus
from tl_sparse.tracing import (
    Dictionary,
    DictionaryTrainingConfig,
    Place,
    dictionary_run,
    load_dictionaries,
    places,
    save_dictionaries,
    train_dictionaries,
)

MODEL = "python-dense"
FEATURES = {"embed": (512, 6), "attn": (384, 8), "mlp": (1024, 10)}
"""Features at each kind of place, and how many of them are active per token on average."""


def chosen(model: SparseTransformer) -> tuple[Place, ...]:
    """The usual places, with features as above."""
    found = []
    for place in places(model):
        kind = next(k for k in FEATURES if k in place.hook_out)
        features, k = FEATURES[kind]
        found.append(replace(place, n_features=features, k=k))
    return tuple(found)


def hooks(dictionaries: tuple[Dictionary, ...] | list[Dictionary]):
    """Hooks that put reconstructions in the place of activations, without what they miss."""
    seen, found = {}, []

    def keep(x, hook):
        seen[hook.name] = x

    def put(each):
        def hook_(x, hook):
            return each.decode(each.encode(seen[each.hook_in] if each.transcoder else x))

        return hook_

    for each in dictionaries:
        if each.transcoder:
            found.append((each.hook_in, keep))
        found.append((each.hook_out, put(each)))
    return found


@torch.no_grad()
def measured(model, dictionaries, tokens) -> pd.DataFrame:
    """Error over variance, active features, and the model's loss with each (and all) spliced in."""

    def loss(fwd_hooks):
        return float(model.run_with_hooks(tokens, return_type="loss", fwd_hooks=fwd_hooks))

    whole = loss([])
    _, cache = model.run_with_cache(tokens)
    rows = []
    for each in dictionaries:
        x, y = cache[each.hook_in], cache[each.hook_out]
        features = each.encode(x)
        missed = (y - each.decode(features)).square().sum()
        spliced = loss(hooks([each]))
        mean = y.mean((0, 1))
        without = loss([(each.hook_out, lambda x, hook, mean=mean: mean.expand_as(x))])
        active = features > 0
        rows.append({
            "dictionary": each.name, "features": each.d_sae,
            "ever active": int(active.any(0).any(0).sum()),
            "active per token": float(active.sum(-1).float().mean()),
            "fvu": float(missed / (y - mean).square().sum()), "loss": spliced,
            "loss recovered": (without - spliced) / (without - whole),
        })  # fmt: skip
    rows.append({"dictionary": "all", "loss": loss(hooks(dictionaries))})
    rows.append({"dictionary": "none", "loss": whole})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--out", default=None)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--cache", default=None)
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SparseTransformer.from_pretrained(MODEL)
    corpus = build_corpus(CorpusConfig(idiom_share=0.5), options.cache, progress=False)
    if options.measure:
        dictionaries = load_dictionaries(options.run, model)
    else:
        run = dictionary_run(options.steps, batch_size=32, lr=3e-3)
        dictionaries = train_dictionaries(
            model, corpus, chosen(model), DictionaryTrainingConfig(), run, options.run
        ).dictionaries
    if options.out is not None:
        save_dictionaries(dictionaries, options.out, model, torch.bfloat16)
        size = sum(path.stat().st_size for path in Path(options.out).iterdir())
        print(f"{size / 1e6:.2f} MB in {options.out}")
        dictionaries = load_dictionaries(options.out, model)
    tokens = corpus.validation_sequences(256, model.config.n_ctx)
    print(measured(model, dictionaries, tokens).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
