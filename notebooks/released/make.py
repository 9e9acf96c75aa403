"""Makes the small release that notebook 05 reads: files laid out and named as OpenAI's are.

    python notebooks/released/make.py            # writes beside this file; some minutes on one core

A sparse model of 2 layers is trained on generated Python (`csp_small`), the circuit of a task is
pruned, and both are written with the tokenizer, the means and the training curve in the formats
that docs/released_models.md describes. Nothing in it is OpenAI's.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

import tl_sparse as tls
from tl_sparse.checkpoints.openai_artifacts import locations
from tl_sparse.checkpoints.openai_tokenizer import BYTES, build, tokenizer_to_openai
from tl_sparse.circuits import ablation_importance
from tl_sparse.data.config import CorpusConfig
from tl_sparse.data.idioms import idiom_documents
from tl_sparse.data.tokenizer import wrap_tokenizer
from tl_sparse.data.tokens import CorpusStats, TokenizedCorpus, encode_documents, write_corpus
from tl_sparse.sparsity.projection import SparsityConfig
from tl_sparse.tasks import Split as Part
from tl_sparse.tasks import task

NAME, SWEEP, K = "csp_small", "prune_v4", "k_optim"
D_VOCAB = 512
SITES = (
    "attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out",
    "final_resid",
)  # fmt: skip
SEED = 0


@task(answers=(":", "\n"), source="notebooks/released/make.py")
def while_return_true(rng: random.Random, split: Part) -> tuple[str, str]:
    """After ` True`: open a block, or end the line. A is `while`, B `return`."""
    names = ["name", "size", "key", "item", "path", "line", "text", "count", "node", "mode"]
    some = names[:6] if split == "train" else names[6:]
    one, two, three = (rng.choice(some) for _ in range(3))
    start = f"def get_{one}(self, {two}):\n    self.{three} = {two}"
    return f"{start}\n    while True", f"{start}\n    return True"


def tokenizer_of(texts: list[str]):
    """A tokenizer that vocab.bpe can express; quotes and brackets stay tokens of their own."""
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = Sequence(
        [Split(Regex(r" ?\p{L}+|\s+(?!\S)|\s+|."), "isolated"), ByteLevel(False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=D_VOCAB - 1, initial_alphabet=list(BYTES), show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    tokens = [*BYTES, *dict.fromkeys("".join(pair) for pair in merges)]
    return wrap_tokenizer(build(tokens, D_VOCAB - 1))


def corpus_of(folder: Path, n_chars: int) -> TokenizedCorpus:
    """Generated Python, tokenised: a training part and, of another seed, a validation part."""
    texts = list(idiom_documents(SEED, n_chars))
    tokenizer = tokenizer_of(texts[:2000])
    train, validation = (
        np.concatenate(list(encode_documents(tokenizer, part)))
        for part in (texts, idiom_documents(SEED + 1, n_chars // 20))
    )
    stats = CorpusStats(len(texts), 0, 0, 0, 0, n_chars, len(train), len(validation), len(train))
    write_corpus(
        folder, train=train, validation=validation, tokenizer=tokenizer, config=CorpusConfig(),
        fingerprint="generated Python of notebooks/released/make.py", version=tls.__version__,
        stats=stats, dropped=(),
    )  # fmt: skip
    return TokenizedCorpus.load(folder)


def trained(corpus: TokenizedCorpus, folder: Path, steps: int) -> tls.SparseTransformer:
    """A weight-sparse model with the parts of csp_yolo2: sinks, bigram table, positions beside."""
    config = tls.SparseTransformerConfig(
        n_layers=2, d_model=64, n_ctx=64, d_vocab=D_VOCAB, d_head=8, use_attention_sinks=True,
        bigram_table="learned", positional_embedding_type="concat", d_pos=8,
        activation_density=tls.ActivationDensity.paper(0.25), seed=SEED,
    )  # fmt: skip
    sparsity = SparsityConfig(density=1 / 8, floor=4, embedding_floor=4, lr_factor="unnormalised")
    training = tls.TrainingConfig.recipe("cpu", steps=steps, seed=SEED, sparsity=sparsity)
    tls.Trainer(tls.SparseTransformer(config, corpus.tokenizer), corpus, training, folder).train()
    return tls.SparseTransformer.from_pretrained(folder / "model")


def payload_of(model: tls.SparseTransformer, circuit: tls.Circuit, task: tls.tasks.Task) -> dict:
    """viz_data.pt of a circuit; losses are doubled, as in the released files."""
    index, hooks = circuit.index, locations(circuit.index)
    kept = {
        place: circuit.kept[index.slices[hook]].nonzero().flatten() for place, hook in hooks.items()
    }
    batch = task.batch(8, split="train", seed=SEED)
    order = [*range(0, 16, 2), *range(1, 16, 2)]  # a pair's prompts stand half the rows apart
    tokens = torch.zeros_like(batch.tokens)  # padded with token 0
    for row, prompt in enumerate(order):
        n = int(batch.last[prompt]) + 1
        tokens[row, :n] = batch.tokens[prompt, :n]
    with model.hooks(fwd_hooks=circuit.hooks()):
        _, cache = model.run_with_cache(batch.tokens[order])
    scores = ablation_importance(
        model, batch, index, circuit.means.values, keep=circuit.kept, task=circuit.task
    )
    flat = torch.full((index.n_nodes,), float(circuit.loss))
    table = scores.to_dataframe()
    found = torch.tensor(table["score"].to_numpy(), dtype=torch.float32)
    flat[torch.tensor(table.index.to_numpy())] = circuit.loss + found.clamp(min=-1e9)
    edges = []
    for (layer, source, target), rows in circuit.edges.groupby(
        ["layer", "source_site", "target_site"]
    ):
        here = [tls.sites.site(name).openai.format(layer=layer) for name in (source, target)]
        weight = torch.zeros(len(kept[here[0]]), len(kept[here[1]]))
        at = [{int(c): i for i, c in enumerate(kept[place])} for place in here]
        for row in rows.itertuples():
            weight[at[0][row.source], at[1][row.target]] = row.weight
        edges.append([weight, kept[here[0]].tolist(), kept[here[1]].tolist(), tuple(here)])
    return {
        "circuit_data": kept,
        "samples": {},
        "importances": {
            "loss": 2 * circuit.model_loss,
            "interv_loss": 2 * circuit.loss,
            "ch_interv_losses": {
                place: 2 * flat[index.slices[hooks[place]]][channels]
                for place, channels in kept.items()
            },
            "pair_data": [],
            "pair_data_connections": edges,
            "task_samples": (
                tokens,
                {
                    place: {
                        int(c): cache[hooks[place]].flatten(2)[..., int(c)].half() for c in channels
                    }
                    for place, channels in kept.items()
                    if len(channels)
                },
            ),
            "beeg_model_config": {},
        },
        "all_loss": [[0, 2 * circuit.selection_loss]],
        "num_total_nodes": index.n_nodes,
        "prune_config": {"target_loss": circuit.target_loss, "seed": circuit.seed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--chars", type=int, default=6_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        corpus = corpus_of(Path(work) / "corpus", args.chars)
        model = trained(corpus, Path(work) / "run", args.steps)
        curve = [
            {"step": row["step"], "test_xent": row["validation_loss"], "L0": row.get("l0")}
            for row in map(json.loads, (Path(work) / "run/metrics.jsonl").read_text().splitlines())
            if row.get("validation_loss") is not None
        ]
    model.to_openai(args.out / "models" / NAME, with_tokenizer=False)
    (args.out / "tinypython").mkdir(exist_ok=True)
    tokenizer_to_openai(corpus.tokenizer, args.out / "tinypython")
    means = tls.activation_means(model, corpus.validation_sequences(512, context=64), sites=SITES)
    viz = args.out / "viz" / NAME
    asked = tls.tasks.get(while_return_true, model.tokenizer)
    place = viz / f"{asked.name}_beeg" / SWEEP / K
    place.mkdir(parents=True, exist_ok=True)
    flat = {
        place: means.values[means.index.slices[hook]].clone()
        for place, hook in locations(means.index).items()
    }
    torch.save(flat, viz / "mean_baseline_pretrain.pt")
    circuit = tls.prune(
        model,
        asked,
        tls.PruningConfig(target_loss=0.15, steps=300, l0_penalty=3e-5, seed=SEED),
        means=means,
    )
    torch.save(payload_of(model, circuit, asked), place / "viz_data.pt")
    curves = args.out / "train_curves" / NAME
    curves.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in curve)
    (curves / "progress.json").write_text(lines, encoding="utf-8")
    print(circuit)


if __name__ == "__main__":
    main()
