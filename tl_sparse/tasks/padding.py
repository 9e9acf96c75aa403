"""Where prompts of unequal lengths are padding: they begin together and are padded on the right."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def real_positions(n_pos: int, last: Int[Tensor, " prompt"]) -> Bool[Tensor, "prompt pos"]:
    """Which of ``n_pos`` positions are tokens of a prompt, on the device of ``last``.

    Args:
        n_pos: How many positions there are.
        last: Index of each prompt's last token.
    """
    return torch.arange(n_pos, device=last.device) <= last[:, None]
