import math

import pytest

from tl_sparse.circuits import PruningConfig


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_loss", 0.7, "between 0 and ln 2"),
        ("target_loss", 0.0, "between 0 and ln 2"),
        ("target_loss", math.nan, "between 0 and ln 2"),
        ("lr", math.inf, "lr=inf must be a finite number"),
        ("l0_penalty", math.inf, "must be a finite number"),
        ("weight_decay", math.inf, "must be a finite number"),
        ("init_bias", math.nan, "must be a finite number"),
        ("steps", 0, "steps=0 must be at least 1"),
        ("batch_pairs", 0, "batch_pairs=0 must be at least 1"),
        ("selection_pairs", -1, "selection_pairs=-1"),
        ("report_pairs", 0, "report_pairs=0"),
        ("lr", 0.0, "lr=0.0 must be positive"),
        ("l0_penalty", -1.0, "l0_penalty=-1.0 must be positive"),
        ("temperature", 0.0, "temperature=0.0 must be positive"),
        ("beta1", 1.0, "beta1=1.0 must be at least 0 and below 1"),
        ("beta2", -0.1, "beta2=-0.1 must be at least 0"),
        ("warmup_frac", 1.0, "warmup_frac=1.0 must be at least 0 and below 1"),
        ("weight_decay", -0.1, "weight_decay=-0.1"),
        ("adapt_rate", -0.1, "adapt_rate=-0.1"),
        ("init_scale", -0.1, "init_scale=-0.1"),
        ("penalty", "none", "penalty='none' is unknown; choose from adaptive, fixed"),
        ("on_collapse", "stop", "on_collapse='stop' is unknown; choose from eliminate, fail"),
        ("ablation", "noise", "ablation='noise' is unknown; choose from mean, task_mean, zero"),
    ],
)
def test_a_bad_option_is_named(name, value, message):
    # not by the constructor: the type checker that the tests run under would answer first
    config = PruningConfig()
    object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=message):
        config.__post_init__()
