"""Code written for HookedTransformer, on the TransformerLens that no longer has it."""

import sys

import pytest
import torch
import transformer_lens

from tests.conformance.models import build
from tl_sparse import compat
from tl_sparse.model.legacy_aliases import install_legacy_aliases

below_4 = pytest.mark.skipif(
    compat.HAS_HOOKED_TRANSFORMER, reason="TransformerLens has the names itself below 4"
)

# What SAELens, EAP-IG, auto-circuit, circuit-tracer and ACDC import.
IMPORTS = [
    "from transformer_lens import HookedTransformer, HookedTransformerConfig, utils",
    "from transformer_lens import HookedTransformer, HookedTransformerKeyValueCache",
    "from transformer_lens.HookedTransformer import HookedTransformer, HookedRootModule",
    "from transformer_lens.HookedTransformer import HookedRootModule, Loss, Output",
    "from transformer_lens.HookedTransformerConfig import HookedTransformerConfig",
    "from transformer_lens.components import Attention, MLP, TransformerBlock, Embed, Unembed",
    "from transformer_lens.components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP",
    "from transformer_lens.hook_points import HookedRootModule, HookPoint",
    "from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache",
    "from transformer_lens.utils import get_act_name, get_attention_mask, to_numpy",
    "import transformer_lens.utils as utils; utils.get_act_name('q', 0)",
    "import transformer_lens as tl; tl.utils.get_act_name; tl.components.MLP",
    "import transformer_lens as tl; tl.HookedTransformer.from_pretrained",
]


@pytest.fixture
def aliases():
    with install_legacy_aliases() as installed:
        yield installed


def state_of_the_package():
    inside = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "transformer_lens"}
    return {name: dict(vars(module)) for name, module in inside.items()}


def test_nothing_is_installed_until_it_is_asked_for():
    if compat.HAS_HOOKED_TRANSFORMER:
        assert transformer_lens.HookedTransformer is compat.ModelBase
    else:
        assert "HookedTransformer" not in vars(transformer_lens)
        with pytest.raises(ImportError, match=r"removed in TransformerLens 4\.0"):
            exec(IMPORTS[0], {})


def test_removing_restores_the_package_exactly():
    install_legacy_aliases().remove()  # what it imports of TransformerLens stays imported
    before = state_of_the_package()
    installed = install_legacy_aliases()
    if compat.HAS_HOOKED_TRANSFORMER:
        assert state_of_the_package() == before
    else:
        assert transformer_lens.HookedTransformer
    for _ in range(2):
        installed.remove()
        assert state_of_the_package() == before


@below_4
@pytest.mark.parametrize("statement", IMPORTS)
def test_what_legacy_tools_import_is_there(claim, aliases, statement):
    claim("install_legacy_aliases", "any", "unchanged")
    exec(statement, {})


@below_4
def test_an_error_inside_the_context_still_removes():
    with pytest.raises(KeyError), install_legacy_aliases():
        raise KeyError
    assert "HookedTransformer" not in vars(transformer_lens)


@below_4
def test_a_second_call_adds_nothing_and_removes_nothing(aliases):
    second = install_legacy_aliases()
    assert (second.modules, second.names) == ([], [])
    second.remove()
    exec(IMPORTS[0], {})


@below_4
@pytest.mark.parametrize("name", ["HookedTransformer", "utils"])
def test_a_name_that_is_taken_is_an_error_and_nothing_changes(monkeypatch, name):
    monkeypatch.setitem(vars(transformer_lens), name, "taken")
    before = state_of_the_package()
    with pytest.raises(RuntimeError, match=f"transformer_lens.{name} is 'taken' already"):
        install_legacy_aliases()
    assert state_of_the_package() == before


@below_4
def test_utils_has_every_name_of_utilities(aliases):
    from transformer_lens import utilities, utils

    public = {name for name in vars(utilities) if not name.startswith("_")}
    assert public <= set(vars(utils))
    assert utils.get_act_name("q", 0) == "blocks.0.attn.hook_q"


def test_models_and_configs_pass_isinstance(claim, aliases):
    claim("isinstance(model, HookedTransformer)", "any", "unchanged")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = build()
    assert isinstance(model, HookedTransformer)
    assert isinstance(model.cfg, HookedTransformerConfig)
    assert not isinstance(torch.nn.Linear(1, 1), HookedTransformer)
    assert not isinstance(model.config, HookedTransformerConfig)


def test_a_config_is_built_as_transformer_lens_own(aliases):
    from transformer_lens import HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "d_vocab": 30}
    given = {"act_fn": "gelu", "normalization_type": "LNPre", "use_attn_result": True}
    cfg = HookedTransformerConfig(**sizes, **given)
    assert isinstance(cfg, HookedTransformerConfig)
    for name, value in (sizes | given).items():
        assert getattr(cfg, name) == value
    # what follows from the sizes, and what tools look up
    assert (cfg.n_heads, cfg.d_mlp, cfg.d_vocab_out) == (4, 64, 30)
    assert cfg.n_key_value_heads is None
    assert not cfg.parallel_attn_mlp
    assert not cfg.use_split_qkv_input
    again = HookedTransformerConfig.from_dict(cfg.to_dict())
    assert again.to_dict() == cfg.to_dict()
    with pytest.raises(TypeError, match="d_head"):
        HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=8)


@below_4
def test_the_key_value_cache_continues_a_sequence(aliases, tokens):
    from transformer_lens.past_key_value_caching import HookedTransformerKeyValueCache

    model = build("standard")
    whole = model(tokens)
    cache = HookedTransformerKeyValueCache.init_cache(model.cfg, model.cfg.device, len(tokens))
    model(tokens[:, :5], past_kv_cache=cache)
    rest = model(tokens[:, 5:], past_kv_cache=cache)
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=1e-5)


@below_4
def test_components_are_those_of_the_model(aliases):
    from transformer_lens import components

    block = build("standard").blocks[0]
    assert isinstance(block, components.TransformerBlock)
    assert isinstance(block.attn, components.Attention)
    assert isinstance(block.attn, components.AbstractAttention)
    assert isinstance(block.mlp, components.mlps.can_be_used_as_mlp.CanBeUsedAsMLP)
    assert not hasattr(components, "LayerNorm")
