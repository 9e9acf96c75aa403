"""What of the suite TransformerLens 2 cannot run, and why: ``pytest -p tests.transformer_lens_2``.

A plugin of pytest's, for ``make test-tl2``. Every exception is something that TransformerLens 2
does not have, or does otherwise than 3 and 4; nothing here is a fault of a sparse model.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

NO_TOOLS = "transformer_lens.tools came with 3"
NO_BRIDGE = "TransformerBridge came with 3"
NO_SINKS = "HookedTransformer got attention sinks in 3"

WITHOUT = {
    "tests/conformance/test_analysis_*.py": NO_TOOLS,
}
"""Files that are not collected, by pattern → why."""

EXCEPT = {
    "tests/conformance/test_activation_cache.py": {
        "test_every_helper_of_the_cache_is_classified": "it has fewer helpers",
        **{
            f"test_neuron_results_are_what_each_neuron_adds_to_the_write[{option}]":
                "its own stack_neuron_results, the reference, takes no project_output_onto"
            for option in ("plain", "standard", "tied", "layer_norm", "wide_heads")
        },
    },
    "tests/conformance/test_circuits.py": {
        "test_singular_vectors_are_those_of_the_weights[*-tied]":
            "its SVDInterpreter asks named_parameters() for W_U, which a tied model has not",
    },
    "tests/conformance/test_contract.py": {
        "test_shared_methods_take_the_arguments_of_the_base_class_with_its_defaults":
            "its set_tokenizer pads on the right, where 3 follows the tokenizer",
    },
    "tests/conformance/test_running.py": {
        "test_every_activation_is_that_of_transformer_lens_own_model[layer_norm]":
            "hook_normalized of its LayerNorm comes after the weight",
        "test_gradients_are_cached_as_autograd_gives_them[layer_norm]":
            "hook_normalized of its LayerNorm comes after the weight",
        "test_greedy_generation_is_decoding_by_hand[*-standard]":
            "its generate() misplaces learned positions, with or without a cache",
    },
    "tests/conformance/test_tools.py": {
        "test_ioi_eval_is_the_logit_difference_of_the_names*": "its IOIDataset takes no seed",
    },
    "tests/model/test_attention_kernel.py": {
        "test_a_point_with_only_reading_hooks_shows_the_same_and_one_edit_more_still_counts*":
            "its hook points forget the function, so a hook that reads costs what an edit does",
    },
    "tests/checkpoints/test_transformer_lens.py": {
        "test_a_hooked_transformer_converts_to_equal_logits_and_activations[sinks]": NO_SINKS,
        "test_a_bridge_around_gpt2_converts_to_equal_logits_and_activations*": NO_BRIDGE,
        "test_a_bridge_with_folded_weights_converts_to_equal_logits": NO_BRIDGE,
        "test_what_the_config_does_not_tell_shows_in_the_logits": NO_BRIDGE,
        "test_every_field_of_the_installed_configs_is_judged": NO_BRIDGE,
    },
    "tests/model/test_layers.py": {
        "test_reset_draws_from_the_distribution_of_the_constructor": NO_TOOLS,
        "test_reset_without_a_generator_follows_torchs_seed": NO_TOOLS,
    },
}  # fmt: skip
"""File → pattern of its tests → why they are skipped."""


def pytest_configure(config: pytest.Config) -> None:
    """An exception whose file has moved would except nothing."""
    if gone := [path for path in EXCEPT if not (config.rootpath / path).is_file()]:
        raise pytest.UsageError(f"{__name__} names files that are not there: {', '.join(gone)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not collection_path.is_relative_to(config.rootpath):
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    return True if any(fnmatch(path, pattern) for pattern in WITHOUT) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path, _, name = item.nodeid.partition("::")
        for pattern, why in EXCEPT.get(path, {}).items():
            # the brackets of a test's id are no character class
            if fnmatch(name, pattern.replace("[", "[[]")):
                item.add_marker(pytest.mark.skip(reason=f"TransformerLens 2: {why}"))
