"""What every test shares: one thread, fixed seeds, a private cache folder and no network.

Nothing here may import tl_sparse at the top level: pytest loads this file before it installs the
hook that checks the package's tensor shapes.
"""

import importlib.util
import ipaddress
import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before any import of the Hugging Face libraries: they read these once, when imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

from tests.shapes import CALLS, first_calls_checked

SEED = 0
pytest_plugins = ("tests.known_circuits", "tests.openai_container")

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-shapes", action="store_true", help="annotated shapes are not checked")


def _check_shapes() -> None:
    """From here on every imported module of the package that annotates shapes has them checked.

    Only these, and each function at its first calls in a test: checks at every call of every
    function took longer than what was tested.
    """
    if "tl_sparse" in sys.modules:
        raise pytest.UsageError("tl_sparse was imported before its shapes could be checked")
    package = Path(importlib.util.find_spec("tl_sparse").origin).parent
    modules = [
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
    jaxtyping.install_import_hook(modules, "beartype.beartype")
    # The hook decorates with this attribute of the module.
    jaxtyping.jaxtyped = first_calls_checked(jaxtyping.jaxtyped)


def pytest_configure(config: pytest.Config) -> None:
    """Set up before collection, so that code which runs on import is held to the same rules."""
    if not config.getoption("no_shapes"):
        _check_shapes()
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
    CALLS.clear()
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


# --------------------------------------------------------------------------------------------------
# small models, one architecture option at a time

TOPK = dict.fromkeys(
    ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out"), 0.5
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "abstopk": {"activation_density": TOPK},
    "abstopk_resid": {"activation_density": TOPK | {"resid_post_attn": 0.5, "resid_post_mlp": 0.5}},
    "sinks": {"use_attention_sinks": True},
    "bigram_frozen": {"bigram_table": "frozen"},
    "bigram_learned": {"bigram_table": "learned"},
    "standard": {"positional_embedding_type": "standard"},
    "concat": {"positional_embedding_type": "concat", "d_pos": 4},
    "sinusoidal": {"positional_embedding_type": "sinusoidal_concat", "d_pos": 4},
    "tied": {"tie_word_embeddings": True},
    "layer_norm": {"normalization_type": "LN"},
    "layer_norm_no_bias": {"normalization_type": "LN", "use_ln_bias": False},
    "residual_relu": {"residual_act": "relu"},
    "wide_heads": {"n_heads": 3, "d_head": 8},
    "relu": {"act_fn": "relu"},
    "no_bias": {"use_bias": False},
    "attn_only": {"attn_only": True, "d_mlp": None},
    "no_norm": {"normalization_type": "none"},
    "together": {
        "activation_density": TOPK,
        "use_attention_sinks": True,
        "bigram_table": "learned",
        "positional_embedding_type": "concat",
        "d_pos": 4,
        "n_heads": 3,
        "d_head": 8,
    },
}


def _small_model(
    option: str = "plain", *, zeros: float = 0.0, tokenizer: Any = None, **changes: Any
):
    """A two-layer model with every parameter drawn at random, a share of them exactly zero."""
    from tests.conformance.models import SMALL, random_model
    from tl_sparse.config import SparseTransformerConfig

    config = SparseTransformerConfig.from_dict(SMALL | OPTIONS[option] | changes)
    return random_model(config, tokenizer, zeros)


@pytest.fixture
def small_model() -> Callable[..., Any]:
    """``small_model(option, zeros=0.0, tokenizer=None, **config)`` builds a model; see OPTIONS."""
    return _small_model


@pytest.fixture(params=list(OPTIONS))
def option(request: pytest.FixtureRequest) -> str:
    """Every architecture option in turn."""
    return request.param


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [2, 8] for the small models."""
    return torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """``make_tokenizer(pad="<pad>", adds_bos=False)``: a tokenizer over the words w3 .. w29."""
    from tests.conformance.models import make_tokenizer

    return make_tokenizer


@pytest.fixture(scope="session")
def sixty_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sixty small Python files, no two of them near-duplicates."""
    folder = tmp_path_factory.mktemp("source")
    draw = random.Random(0)
    for i in range(60):
        body = "".join(
            f"        for item{draw.randrange(50)} in range({draw.randrange(999)}):\n"
            f"            print(item, [value, {{'k': {draw.randrange(999)}}}])\n"
            for _ in range(6)
        )
        head = f"class Thing{i}:\n    def method{draw.randrange(99)}(self, value{i}):\n"
        (folder / f"m{i}.py").write_text(head + body)
    return folder
