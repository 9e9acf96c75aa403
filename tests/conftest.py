"""What every test shares: one thread, fixed seeds, a private cache folder and no network.

Nothing here may import tl_sparse at the top level: pytest loads this file before it installs the
hook that checks the package's tensor shapes.
"""

import ipaddress
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable
from typing import Any

# Before any import of the Hugging Face libraries: they read these once, when imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import hypothesis
import numpy as np
import pytest
import torch

SEED = 0

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)


class NetworkBlockedError(RuntimeError):
    """A test reached for the network.

    Not an OSError: libraries catch those and retry, and the test would pass by accident.
    """


def _is_loopback(host: str | bytes | None) -> bool:
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else host
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return name in ("", "localhost")


def _refuse_remote(host: str | bytes | None) -> None:
    if not _is_loopback(host):
        raise NetworkBlockedError(f"tests run without a network, but something reached for {host}")


def _guarded_connect(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_remote(address[0])
        return connect(self, address)

    return guarded


def _guarded_getaddrinfo(getaddrinfo: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: str | bytes | None, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote(host)
        return getaddrinfo(host, *args, **kwargs)

    return guarded


def pytest_configure(config: pytest.Config) -> None:
    """Set up before collection, so that code which runs on import is held to the same rules."""
    torch.set_num_threads(1)
    hypothesis.settings.load_profile("repeatable")

    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name in ("connect", "connect_ex"):
        patch.setattr(socket.socket, name, _guarded_connect(getattr(socket.socket, name)))
    patch.setattr(socket, "getaddrinfo", _guarded_getaddrinfo(socket.getaddrinfo))

    cache = tempfile.mkdtemp(prefix="tl-sparse-tests-")
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    patch.setenv("TL_SPARSE_CACHE", cache)


@pytest.fixture(autouse=True)
def seeds() -> int:
    """Start every test from the same random state; returns the seed for tests that need one."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED
