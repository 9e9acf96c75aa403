"""Names of hook points: aliases, the switches that some depend on, and the nearest known ones."""

import difflib
from collections.abc import Iterable

ALIASES = {f"attn.hook_{name}": f"hook_{name}" for name in ("q_input", "k_input", "v_input")}
ALIASES["attn.hook_attn_in"] = "hook_attn_in"
"""TransformerLens 4.x tools address these under attn; HookedTransformer had them on the block."""

SWITCHES = {
    "hook_tokens": "use_hook_tokens",
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}
"""Last part of a hook point's name → the ``cfg`` switch without which it never fires."""


def switch_of(name: str) -> str | None:
    """The ``cfg`` switch that a hook point depends on, if any."""
    return SWITCHES.get(name.rpartition(".")[2])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names nearest to ``name``, as the rest of an error message; empty if none is."""
    near = difflib.get_close_matches(name, list(known), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""
