import copy

import pytest
import torch
from torch import nn

from tl_sparse import compat
from tl_sparse.compat import HookPoint, RuntimeConfig, editable, has_hooks


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert compat.transformer_lens_version() == version("transformer-lens")
    major = int(compat.transformer_lens_version().split(".")[0])
    assert (major < 4) == compat.HAS_HOOKED_TRANSFORMER


def test_bases_are_transformer_lens_own():
    assert issubclass(compat.ModelBase, compat.HookedRootModule)
    assert compat.ModelBase.__module__.startswith("transformer_lens")
    assert compat.ConfigBase.__module__.startswith("transformer_lens")


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_hook_point_counts_as_hooked_while_it_has_a_hook(direction):
    point = HookPoint()
    assert not has_hooks(point)
    point.add_hook(lambda x, hook: None, dir=direction)
    assert has_hooks(point)
    point.remove_hooks("both")
    assert not has_hooks(point)


def test_pytorch_hooks_and_replaced_points_count_too():
    point = HookPoint()
    handle = point.register_forward_pre_hook(lambda module, args: None)
    assert has_hooks(point)
    handle.remove()
    assert not has_hooks(point)
    assert has_hooks(nn.Identity())


def test_editable_copies_only_for_a_hook_under_gradients():
    point, x = HookPoint(), torch.randn(3, requires_grad=True)
    assert editable(x, point) is x
    point.add_hook(lambda x, hook: None)
    assert editable(x, point) is not x
    assert torch.equal(editable(x, point), x)
    with torch.no_grad():
        assert editable(x, point) is x


def test_runtime_config_is_transformer_lens_config_with_our_values():
    cfg = RuntimeConfig(n_layers=3, anything="else")
    assert isinstance(cfg, compat.ConfigBase)
    assert (cfg.n_layers, cfg.anything) == (3, "else")
    assert RuntimeConfig.from_dict(cfg.to_dict()) == cfg
    assert RuntimeConfig.unwrap(cfg) is cfg
    assert RuntimeConfig.unwrap(cfg.to_dict()) == cfg
    assert copy.deepcopy(cfg) == cfg
    assert cfg != RuntimeConfig(n_layers=4, anything="else")
    assert "n_layers=3" in repr(cfg)


def test_runtime_configs_share_no_mutable_default():
    first, second = RuntimeConfig(), RuntimeConfig()
    for name, value in vars(first).items():
        if isinstance(value, list | dict | set):
            assert value is not vars(second)[name], name


def test_runtime_dtype_is_that_of_the_weights():
    assert compat.runtime_dtype(nn.Linear(2, 2).double()) == torch.float64
