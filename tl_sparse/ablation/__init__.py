"""Ablation: means over a distribution, hooks that set nodes to values, runs under them."""
