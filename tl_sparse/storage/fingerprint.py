"""Fingerprints: what a model is, as one hash."""

from __future__ import annotations

import hashlib

import torch


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over a model's tensors, by name: equal for equal weights, whatever the device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(str(tensor.dtype).encode())
        plain = tensor.detach().cpu().contiguous().flatten()  # a scalar has no bytes to view
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
