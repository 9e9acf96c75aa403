"""How large is a packed checkpoint, and how long does it take to load?

Size: model.safetensors, header included, against the sum over its tensors of
log2 C(n, k) + k * value bits, for n entries of which k are nonzero (a dense tensor counts with all
its entries), in float32, float16 and bfloat16, at several densities of the weight matrices.

CPU time, in one process and in interleaved rounds: reading the packed weights, and loading the
full model, against ``safetensors.torch.load_file`` of the same tensors stored plainly. Prints a
table and writes checkpoints.json.

    python benchmarks/checkpoints.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tl_sparse as tls
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.packing import set_bits
from tl_sparse.storage.tensor_files import read_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def sparse_model(d_model: int, d_vocab: int, density: float) -> tls.SparseTransformer:
    """A model as training leaves it: matrices at the density, norms and biases dense, no table."""
    config = tls.SparseTransformerConfig(
        n_layers=2, d_model=d_model, n_ctx=64, d_vocab=d_vocab, use_attention_sinks=True,
        positional_embedding_type="sinusoidal_concat", d_pos=16,
    )  # fmt: skip
    model = tls.SparseTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name or name.endswith("sinks"):
                parameter.normal_(std=0.02, generator=generator)
    if density < 1:
        tls.WeightProjector.top_k(model, density=density, floor=1).project()
    return model


def bound_bytes(model: tls.SparseTransformer, dtype: torch.dtype) -> float:
    """What the file is measured by."""
    bits = 8 * dtype.itemsize
    state = model.state_dict().values()
    return sum(set_bits(t.numel(), int(t.count_nonzero()), bits) for t in state) / 8


def timed(call: Callable[[], object]) -> float:
    """CPU seconds: the files are in the page cache, and other programs' turns are not ours."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(
    d_model: int, d_vocab: int, density: float, dtype: str, rounds: int
) -> dict[str, float]:
    """Size against the bound; median over rounds of times relative to the plain file's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = sparse_model(d_model, d_vocab, density)
        model.save_pretrained(folder / "model", dtype=DTYPES[dtype])
        packed, plain = folder / "model" / "model.safetensors", folder / "plain.safetensors"
        save_file(read_weights(packed), plain)
        times: dict[str, list[float]] = {"plain": [], "packed": [], "model": []}
        for i in range(rounds + 2):
            taken = {
                # a copy, as load_file only maps the file: reading is put off, not done
                "plain": timed(lambda: [t.clone() for t in load_file(plain).values()]),
                "packed": timed(lambda: read_weights(packed)),
                "model": timed(lambda: SparseTransformer.from_pretrained(folder / "model")),
            }
            if i >= 2:  # the first rounds warm up
                for name, seconds in taken.items():
                    times[name].append(seconds)
        bound = bound_bytes(model, DTYPES[dtype])
        return {
            "bytes": packed.stat().st_size,
            "bound": bound,
            "size_over_bound": packed.stat().st_size / bound,
            "plain_bytes": plain.stat().st_size,
            "plain_ms": 1e3 * statistics.median(times["plain"]),
            "packed_ms": 1e3 * statistics.median(times["packed"]),
            "model_ms": 1e3 * statistics.median(times["model"]),
            "packed_over_plain": statistics.median(
                a / b for a, b in zip(times["packed"], times["plain"], strict=True)
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--densities", type=float, nargs="+", default=[1 / 64, 1 / 16, 1 / 4, 1.0])
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--out", default="checkpoints.json")
    arguments = parser.parse_args()
    rows = []
    print(
        f"{'d_model':>8}{'density':>9}{'dtype':>10}{'bytes':>10}{'of bound':>10}{'of plain':>10}"
        f"{'plain':>10}{'packed':>10}{'ratio':>8}{'model':>10}"
    )
    for width in arguments.widths:
        for density in arguments.densities:
            for dtype in DTYPES:
                row = measure(width, arguments.vocab, density, dtype, arguments.rounds)
                rows.append({"d_model": width, "density": density, "dtype": dtype, **row})
                print(
                    f"{width:>8}{density:>9.4f}{dtype:>10}{row['bytes']:>10}"
                    f"{row['size_over_bound']:>9.3f}x"
                    f"{row['bytes'] / row['plain_bytes']:>9.3f}x{row['plain_ms']:>7.2f} ms"
                    f"{row['packed_ms']:>7.2f} ms{row['packed_over_plain']:>7.1f}x"
                    f"{row['model_ms']:>7.1f} ms"
                )
    record = {
        "rows": rows,
        "vocab": arguments.vocab,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    Path(arguments.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
