import pytest
import torch
from torch import nn

from tl_sparse import compat
from tl_sparse.compat import HookPoint, has_hooks, hooked


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


def test_hooks_get_a_copy_only_under_gradients():
    point, x = HookPoint(), torch.randn(3, requires_grad=True)
    assert hooked(point, x) is x
    point.add_hook(lambda x, hook: None)
    assert hooked(point, x) is not x
    assert torch.equal(hooked(point, x), x)
    with torch.no_grad():
        assert hooked(point, x) is x


def test_runtime_dtype_is_that_of_the_weights():
    assert compat.runtime_dtype(nn.Linear(2, 2).double()) == torch.float64
