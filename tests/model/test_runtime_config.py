import copy

from tl_sparse import compat
from tl_sparse.model.runtime_config import RuntimeConfig


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
