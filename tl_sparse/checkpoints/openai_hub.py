"""The layout of ``openai/circuit-sparsity`` on the Hugging Face Hub, read without its code.

A folder with config.json (the released GPTConfig's keys, those of the ``transformers`` library, and
ten that no published code has), the same tensors as final_model.pt with ``circuit_model.`` in front
of their names (safetensors or ``.bin`` files, one or several), and tokenizer.json. No file of code
is fetched or opened.

Source: code of the layout's users; the ten keys and their only values: Neuronpedia's loader.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_sparse.checkpoints.openai_config import USED, config_from_openai, is_off, known_keys
from tl_sparse.checkpoints.openai_weights import EMBED, UNEMBED
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.storage.hub import CONFIG, WEIGHTS
from tl_sparse.storage.json_files import read_json
from tl_sparse.storage.tensor_files import read_tensors
from tl_sparse.storage.torch_files import read_state

PREFIX = "circuit_model."
MODEL_TYPE = "circuitgpt"
UNPUBLISHED = {
    "unembed_rank": None, "bigram_table_rank": None, "afrac_ste": False,
    "afrac_ste_only_non_neurons": False, "afrac_approx": False, "rtopk": False, "mup": False,
    "mup_width_multiplier": None, "enable_fp8_linear": False, "scale_invariance": False,
}  # fmt: skip
"""Keys that the layout's code passes on and the published code does not know, and the only values
with which both mean the same model."""
SAME = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "head_dim": "d_head", "intermediate_size": "d_mlp", "max_position_embeddings": "block_size",
    "n_positions": "block_size", "n_ctx": "block_size", "hidden_act": "activation_type",
    "activation_function": "activation_type",
}  # fmt: skip
"""Names that ``transformers`` has for the same."""
NEEDED = ("n_layer", "n_head", "d_model", "block_size", "vocab_size", "rms_norm", "activation_type",
          "afrac")  # fmt: skip
"""Keys without which a model could be loaded as another one: nobody published this layout's
defaults."""
LIBRARY = {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "id2label",
    "initializer_range", "is_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "problem_type", "return_dict",
    "sep_token_id", "task_specific_params", "tf_legacy_loss",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version",
    "use_bfloat16", "use_cache",
    # how text is generated
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
"""Keys of the library that change nothing in what a model computes. Whether the unembedding is tied
is said by ``tied_unembed``, and shown by the tensors."""


def is_openai_hub(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    known = {"n_layer", "d_model", "block_size"} <= values.keys()
    return "schema_version" not in values and (values.get("model_type") == MODEL_TYPE or known)


def openai_hub_config(values: Mapping[str, Any], origin: str) -> SparseTransformerConfig:
    """Our config from a config.json of this layout.

    A key that is unknown and null, false or 0 gives a warning: it may be a newer library's.

    Raises:
        ValueError: one of the ten unpublished keys has another value than the published code
            computes, or a key is missing, unknown, or contradicts another.
    """
    for name, only in UNPUBLISHED.items():
        if name in values and (values[name] != only or type(values[name]) is not type(only)):
            raise ValueError(
                f"{name}={values[name]!r:.80} in {origin}: the published code has {only!r} only, "
                "so what this model computes is not known"
            )
    mapped = {
        name: value
        for name, value in values.items()
        if name not in {*UNPUBLISHED, *LIBRARY, *SAME} or name in USED
    }
    for theirs, ours in SAME.items():
        if values.get(theirs) is not None and mapped.setdefault(ours, values[theirs]) not in (
            None, values[theirs],
        ):  # fmt: skip
            raise ValueError(
                f"{theirs}={values[theirs]!r:.80} and {ours}={mapped[ours]!r:.80} in {origin} "
                "contradict each other"
            )
    if mapped.get("afrac") is not None and "afrac_loctypes" not in mapped:
        raise ValueError(f"{origin} lacks afrac_loctypes: where AbsTopK stands is not known")
    if missing := [name for name in NEEDED if name not in mapped]:
        raise ValueError(f"{origin} lacks {', '.join(missing)}")
    unknown = sorted(n for n in mapped if n not in known_keys() and is_off(mapped[n]))
    if unknown:
        warnings.warn(
            f"{origin}: ignored unknown key(s) {', '.join(unknown)}, which are null, false or 0",
            stacklevel=5,
        )
    return config_from_openai({n: v for n, v in mapped.items() if n not in unknown}, origin=origin)


def openai_hub_tensors(folder: Path, tied: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors in a folder of this layout by their names in final_model.pt, and where they are.

    ``tied``: whether the unembedding is the embedding, which a safetensors file holds once.

    Raises:
        FileNotFoundError: there are no weights, or a file of them is missing.
        ValueError: a file is broken, or a tensor is there twice.
    """
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        read = read_tensors if path.suffix == ".safetensors" else read_state
        for name, tensor in read(path).items():
            short = name.removeprefix(PREFIX)
            if short in tensors:
                raise ValueError(f"{folder} holds {short} twice")
            tensors[short] = tensor
    if tied and EMBED in tensors:
        tensors.setdefault(UNEMBED, tensors[EMBED])
    return tensors, str(files[0] if len(files) == 1 else folder)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: safetensors if there are any, else ``.bin`` files.

    Raises:
        FileNotFoundError: there are none, or one that an index names is missing.
        ValueError: an index is broken, or names something else than files beside it.
    """
    for whole in (WEIGHTS, "pytorch_model.bin"):
        if (folder / whole).is_file():
            return [folder / whole]
        index = folder / f"{whole}.index.json"
        if not index.is_file():
            continue
        table = read_json(index).get("weight_map")
        names = sorted(set(table.values())) if isinstance(table, dict) and is_table(table) else []
        suffix = Path(whole).suffix
        if not names or not all(n == Path(n).name and n.endswith(suffix) for n in names):
            raise ValueError(f"{index} must map tensors to {suffix} files beside it")
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing, which {index.name} names")
        return [folder / name for name in names]
    raise FileNotFoundError(
        f"{folder} holds no weights: neither {WEIGHTS} nor pytorch_model.bin, nor their parts with "
        "an index"
    )


def is_table(value: Mapping[str, Any]) -> bool:
    """Whether all entries of an object are strings."""
    return all(isinstance(each, str) for each in value.values())


def read_openai_hub_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken, or of a model of this package.
    """
    values = read_json(folder / CONFIG)
    if "schema_version" in values:
        raise ValueError(f"{folder} holds a model of tl_sparse: load it with from_pretrained")
    return values
