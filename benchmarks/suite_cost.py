"""What does the faithfulness suite cost, in all and against the number of prompts?

Times every check of ``evaluate`` with its defaults on one circuit of the bundled sparse model, then
the checks that run on prompts (all that do not search for circuits) at several numbers of
pairs. Below 1 an exponent says: less than linear in prompts.

    python benchmarks/suite_cost.py
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import tl_sparse as tls
from tl_sparse.data import CorpusConfig, validation_text
from tl_sparse.faithfulness import EvaluationConfig

CIRCUIT = Path(__file__).parents[1] / "notebooks" / "quote_circuit"


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--out", default="suite_cost.json")
    args = parser.parse_args()
    model = tls.SparseTransformer.from_pretrained("python-sparse")
    length = model.config.n_ctx
    text = validation_text(CorpusConfig(), model.tokenizer, 256, length)
    circuit = tls.Circuit.load(CIRCUIT, model)
    task = tls.tasks.get(circuit.task, model.tokenizer, length)
    config = EvaluationConfig()

    def seconds(config: EvaluationConfig) -> dict[str, float]:
        report = tls.evaluate(model, circuit, task, config, tokens=text, progress=False)
        return {result.check: result.seconds for result in report.results} | {"all": report.seconds}

    whole = seconds(config)
    rows = {n: seconds(replace(config, searches=False, pairs=n)) for n in args.pairs}
    table = pd.DataFrame(rows).T.rename_axis("pairs")
    first, last = args.pairs[0], args.pairs[-1]
    exponents = {
        check: math.log(table[check][last] / table[check][first]) / math.log(last / first)
        for check in table
    }
    print(pd.DataFrame({"defaults": whole}).T.to_string(float_format="{:.1f}".format))
    print(table.to_string(float_format="{:.1f}".format))
    print(pd.DataFrame({"exponent": exponents}).T.to_string(float_format="{:.2f}".format))
    record = {
        "defaults": whole, "pairs": rows, "exponents": exponents, "torch": torch.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    Path(args.out).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
