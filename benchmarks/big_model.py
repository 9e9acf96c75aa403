"""What do 419 million parameters cost on a small machine: loading, memory, a forward pass?

Writes a random model with csp_yolo2's sizes and options in OpenAI's format to a temporary folder
(1.7 GB), then loads it in fresh processes, with dense and with sparse weights, and reports seconds
to load, the process' peak memory before and after, and seconds of a forward pass (median of three).
The logits are compared, and what AbsTopK keeps at every site. Prints a table and writes
big_model.json.

    python benchmarks/big_model.py
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SITES = ("attn.hook_act_in", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_attn_out",
         "mlp.hook_act_in", "mlp.hook_post", "hook_mlp_out")  # fmt: skip


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
        state[entry.name] = tensor * (0.02 if entry.name.endswith("bias") else 1.0)
    (folder / OPENAI_CONFIG).write_text(json.dumps(openai_from_config(config)), encoding="utf-8")
    torch.save(state, folder / OPENAI_WEIGHTS)


def peak() -> int:
    """Bytes of memory that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, sparse: bool, tokens: int, out: Path) -> dict[str, Any]:
    """Load and run; what was seen goes to ``out``."""
    import tl_sparse as tls

    gc.collect()
    before = now()
    start = time.perf_counter()
    model = tls.SparseTransformer.from_openai(folder, sparse_weights=sparse)
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
        names = {f"blocks.{i}.{site}" for i in range(model.config.n_layers) for site in SITES}
        _, cache = model.run_with_cache(ids, names_filter=lambda name: name in names)
    kept = {name: cache[name] != 0 for name in sorted(names)}
    torch.save({"logits": logits, "kept": kept}, out)
    return {
        "load_s": load, "forward_s": statistics.median(times), "before": before, "held": held,
        "load_peak": load_peak, "peak": peak(),
    }  # fmt: skip


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
                       str(folder), kind, str(Path(work) / f"{kind}.pt")]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        seen = {kind: torch.load(Path(work) / f"{kind}.pt") for kind in found}
        error = float((seen["dense"]["logits"] - seen["sparse"]["logits"]).abs().max())
        both = [(seen["dense"]["kept"][name], seen["sparse"]["kept"][name])
                for name in seen["dense"]["kept"]]  # fmt: skip
        lost = sum(int((a & ~b).sum()) for a, b in both)
        choices = sum(int(a.sum()) for a, _ in both)
    record = vars(asked) | {"file_bytes": size, "kinds": found, "logit_error": error,
                            "changed_choices": lost, "choices": choices,
                            "threads": torch.get_num_threads()}  # fmt: skip
    print(f"{size / 1e9:.2f} GB on disk, {asked.density:.1%} of the blocks' weights not zero, "
          f"{asked.tokens} tokens, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'weights':<9}{'load s':>8}{'peak / file':>13}{'weights / file':>16}{'forward s':>11}")
    for kind, row in found.items():
        grown = (row["held"] - row["before"]) / size
        print(f"{kind:<9}{row['load_s']:>8.1f}{row['load_peak'] / size:>13.2f}"
              f"{grown:>16.3f}{row['forward_s']:>11.3f}")  # fmt: skip
    print(f"largest difference of logits {error:.1e}; AbsTopK changed {lost} of {choices} choices")
    Path(asked.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
