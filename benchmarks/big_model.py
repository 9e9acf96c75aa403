"""What do 419 million parameters cost on a small machine: loading, memory, a forward pass?

Writes a random model with csp_yolo2's sizes and options in OpenAI's format to a temporary folder
(1.7 GB), then loads it in fresh processes, with dense and with sparse weights, and reports seconds
to load, the process' peak memory before and after, and seconds of a forward pass (median of three).
Logits are compared, and what AbsTopK keeps; and once more with the dense model's choices held in
the sparse one, as a choice that a last bit turns moves the logits of random weights far. Prints a
table and writes big_model.json.

    python benchmarks/big_model.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def write_model(folder: Path, layers: int, width: int, density: float) -> None:
    """A random model of csp_yolo2's shape, in its files."""
    from tl_sparse import ActivationDensity, SparseTransformerConfig
    from tl_sparse.checkpoints.openai_config import OPENAI_CONFIG, openai_from_config
    from tl_sparse.checkpoints.openai_weights import OPENAI_WEIGHTS, layout

    config = SparseTransformerConfig(
        n_layers=layers, d_model=width, d_head=16, n_ctx=1024, d_vocab=2048, d_pos=32,
        positional_embedding_type="concat", use_attention_sinks=True, bigram_table="learned",
        activation_density=ActivationDensity.paper(0.25),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for entry in layout(config):
        tensor = torch.randn(entry.shape, generator=generator)
        if entry.name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
            tensor = 1 + 0.1 * tensor
        elif len(entry.shape) == 2 and ".h." in entry.name:
            kept = torch.rand(entry.shape, generator=generator) < density
            tensor = tensor * kept * (0.5 / (density * entry.shape[1]) ** 0.5)
        small = entry.name.endswith(("bias", "lm_head.weight"))
        state[entry.name] = tensor * (0.02 if small else 1.0)
    (folder / OPENAI_CONFIG).write_text(json.dumps(openai_from_config(config)), encoding="utf-8")
    torch.save(state, folder / OPENAI_WEIGHTS)


def peak() -> int:
    """Bytes of memory that this process had at most; getrusage would count its parent's, too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def now() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, sparse: bool, tokens: int, out: Path) -> dict[str, Any]:
    """Load and run; what the dense model gives goes to ``out``, and the sparse one is compared."""
    import tl_sparse as tls
    from tl_sparse.model.abstopk import AbsTopK
    from tl_sparse.nodes.direct_path import frozen_selection, recording_selection

    gc.collect()
    before = now()
    start = time.perf_counter()
    model = tls.SparseTransformer.from_openai(folder, tokenizer=False, sparse_weights=sparse)
    load = time.perf_counter() - start
    load_peak = peak()
    gc.collect()
    held = now()
    ids = torch.randint(2047, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            logits = model(ids)
            times.append(time.perf_counter() - start)
        found = {"load_s": load, "forward_s": statistics.median(times), "before": before,
                 "held": held, "load_peak": load_peak, "peak": peak()}  # fmt: skip
        topks = {n: m for n, m in model.named_modules() if isinstance(m, AbsTopK) and m.active}
        kept: dict[str, Tensor] = {}
        with recording_selection(topks, kept):
            model(ids)
        if not sparse:
            torch.save({"logits": logits, "kept": kept}, out)
            return found
        dense = torch.load(out)
        with frozen_selection(topks, dense["kept"]):
            same_choices = model(ids)
    return found | {
        "logit_std": float(dense["logits"].std()),
        "error": float((logits - dense["logits"]).abs().max()),
        "error_same_choices": float((same_choices - dense["logits"]).abs().max()),
        "changed": sum(int((kept[n] & ~x).sum()) for n, x in dense["kept"].items()),
        "choices": sum(int(x.sum()) for x in dense["kept"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", default="big_model.json")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "KIND", "SEEN"),
                        help="used by this script itself")  # fmt: skip
    asked = parser.parse_args()
    if asked.measure:
        folder, kind, seen = asked.measure
        print(json.dumps(measure(Path(folder), kind == "sparse", asked.tokens, Path(seen))))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        folder.mkdir()
        write_model(folder, asked.layers, asked.width, asked.density)
        size = (folder / "final_model.pt").stat().st_size
        found: dict[str, Any] = {}
        for kind in ("dense", "sparse"):
            command = [sys.executable, __file__, "--tokens", str(asked.tokens), "--measure",
                       str(folder), kind, str(Path(work) / "dense.pt")]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
    record = vars(asked) | {"file_bytes": size, "kinds": found,
                            "threads": torch.get_num_threads()}  # fmt: skip
    print(f"{size / 1e9:.2f} GB on disk, {asked.density:.1%} of the blocks' weights not zero, "
          f"{asked.tokens} tokens, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'weights':<9}{'load s':>8}{'peak':>7}{'of it loading':>15}{'then held':>11}"
          f"{'forward s':>11}  (memory as a share of the file)")  # fmt: skip
    for kind, row in found.items():
        most, held = (row[x] - row["before"] for x in ("load_peak", "held"))
        print(f"{kind:<9}{row['load_s']:>8.1f}{row['load_peak'] / size:>7.2f}{most / size:>15.2f}"
              f"{held / size:>11.3f}{row['forward_s']:>11.3f}")  # fmt: skip
    row = found["sparse"]
    print(f"AbsTopK changed {row['changed']} of {row['choices']} choices; largest difference of "
          f"logits {row['error']:.1e}, with the same choices {row['error_same_choices']:.1e} "
          f"(standard deviation of logits {row['logit_std']:.2f})")  # fmt: skip
    Path(asked.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
