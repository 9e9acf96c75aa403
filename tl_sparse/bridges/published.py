"""The paper's steering curves, to stand beside one's own.

Source: Gao et al. 2025 (arXiv 2511.13653), Figure 9, read off the vector figure to about half a
percent. Both are of 4-layer models: a dense one, and sparse ones bridged to it.
"""

from __future__ import annotations

import pandas as pd

FIGURE_9: dict[str, tuple[str, dict[float, float]]] = {
    "single_double_quote": (
        "3.attn.act_in, the quote's type; the prompt opens with a double quote",
        {
            0.01: 0.0036, 0.02: 0.0081, 0.05: 0.085, 0.063: 0.20, 0.079: 0.45, 0.10: 0.77,
            0.126: 0.94, 0.16: 0.99, 0.25: 1.0, 1.0: 1.0,
        },
    ),
    "while_return_true": (
        "3.mlp.act_in, negative on lines that start with if, while or except; the prompt ends in "
        "`return True`",
        {
            0.01: 4.3e-5, 0.10: 9.8e-5, 0.20: 3.0e-4, 0.25: 5.8e-4, 0.40: 3.7e-3, 0.50: 1.1e-2,
            0.63: 3.5e-2, 0.79: 9.0e-2, 1.0: 0.161,
        },
    ),
}  # fmt: skip
"""Task → the steered channel in words, and strength → P(other answer)."""


def published_curves() -> pd.DataFrame:
    """A row per task and strength: task, node, strength, p_other."""
    rows = [
        (task, node, strength, p)
        for task, (node, curve) in FIGURE_9.items()
        for strength, p in curve.items()
    ]
    return pd.DataFrame(rows, columns=["task", "node", "strength", "p_other"])
