"""What does fitting bridges cost in time and memory, for a dense model of GPT-2 small's shape?

The dense model is transformers' own GPT-2 with random weights (12 layers, d_model 768, 50,257
tokens) in a TransformerBridge, the sparse one a SparseTransformer of 12 layers and as many channels
with AbsTopK; 25 sites. With ``--native`` the dense model is read into a SparseTransformer first,
which can be left after the last block. Processor seconds of the streams (both models' passes), of
the sums of products (float64), and of the solutions (eigenvalues, ten penalties, both directions);
memory is the peak above what the process held before. Prints a table and writes fit_bridges.json.

    OMP_NUM_THREADS=1 python benchmarks/fit_bridges.py --sequences 8
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tl_sparse as tls
from tl_sparse.bridges import fit_bridges
from tl_sparse.bridges.moments import Moments
from tl_sparse.bridges.pair import BridgedPair

N_CTX = 256


def gpt2_small() -> Any:
    """A TransformerBridge around GPT-2 small with random weights."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = GPT2LMHeadModel(GPT2Config())
    return build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=model.config)


def timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose processor time is added up."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - start

    return run


def status(field: str) -> int:
    """A field of this process' status, kB (Linux)."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--out", default="fit_bridges.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dense = gpt2_small()
    if arguments.native:
        dense = tls.SparseTransformer.from_transformer_lens(dense)
    sizes: dict[str, Any] = {"n_layers": 12, "d_model": 768, "n_ctx": 1024, "d_vocab": 50257}
    density = tls.ActivationDensity.paper(0.25)
    sparse = tls.SparseTransformer(tls.SparseTransformerConfig(activation_density=density, **sizes))
    tokens = torch.randint(50257, (arguments.sequences, N_CTX))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the old peak
    before, start, spent = status("VmRSS"), time.process_time(), dict[str, float]()
    with (
        mock.patch.object(BridgedPair, "residuals", timed(spent, "streams", BridgedPair.residuals)),
        mock.patch.object(Moments, "add", timed(spent, "sums", Moments.add)),
    ):
        fitted = fit_bridges(dense, sparse, tokens, batch_size=arguments.batch_size, progress=False)
    total = time.process_time() - start
    spent["solutions and the rest"] = total - sum(spent.values())
    peak = (status("VmHWM") - before) / 1024
    print(f"{type(dense).__name__}, {fitted!r}: {total:.0f} s, {peak:,.0f} MB above the models")
    for name, seconds in spent.items():
        print(f"  {name:25s}{seconds:8.1f} s{1000 * seconds / tokens.numel():10.2f} ms a token")
    record = {
        "dense": type(dense).__name__, "tokens": tokens.numel(), "seconds": spent, "total": total,
        "peak_mb": peak, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    Path(arguments.out).write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
