"""Released circuits' files, built here from the description of the released ones."""

import json

import torch

from tests.checkpoints.openai_reference_model import BASE, D, H

WIDTHS = {"attn.act_in": D, "attn.q": D, "attn.k": D, "attn.v": D, "attn.resid_delta": D,
          "mlp.act_in": D, "mlp.post_act": 4 * D, "mlp.resid_delta": D}  # fmt: skip
PAIRS = {
    ("attn.act_in", "attn.q"): ("attn.c_attn", 0),
    ("attn.act_in", "attn.k"): ("attn.c_attn", 1),
    ("attn.act_in", "attn.v"): ("attn.c_attn", 2),
    ("attn.v", "attn.resid_delta"): ("attn.c_proj", 0),
    ("mlp.act_in", "mlp.post_act"): ("mlp.c_fc", 0),
    ("mlp.post_act", "mlp.resid_delta"): ("mlp.c_proj", 0),
}
"""Two places → the linear layer between them, and which third of its rows."""
PLACES = {"attn_in": "attn.act_in", "attn_q": "attn.q", "attn_k": "attn.k", "attn_v": "attn.v",
          "attn_out": "attn.resid_delta", "mlp_in": "mlp.act_in", "mlp_neuron": "mlp.post_act",
          "mlp_out": "mlp.resid_delta"}  # fmt: skip


def make_payload(state):
    """A payload with the released structure: kept channels, and the weights between them."""
    generator = torch.Generator().manual_seed(3)
    kept = {
        f"{layer}.{place}": torch.randperm(width, generator=generator)[: 2 + layer]
        for layer in range(2)
        for place, width in WIDTHS.items()
    }
    kept["1.attn.q"] = torch.zeros(0, dtype=torch.int64)
    kept["final_resid"] = torch.tensor([1, 5, 6])
    pair_data = []
    for layer in range(2):
        for (source, target), (linear, third) in PAIRS.items():
            weight = state[f"transformer.h.{layer}.{linear}.weight"]
            bias = state[f"transformer.h.{layer}.{linear}.bias"]
            # c_attn's rows are q, then k, then v
            rows, columns = kept[f"{layer}.{target}"], kept[f"{layer}.{source}"]
            own = rows + third * D
            matrix = torch.cat([weight[own][:, columns].T, bias[own][None]])
            pair_data.append(
                [matrix, [*columns.tolist(), "bias"], rows.tolist(),
                 (f"{layer}.{source}", f"{layer}.{target}")]
            )  # fmt: skip
    tokens = torch.tensor([[3, 0, 5, 0, 0], [3, 1, 5, 6, 0], [4, 0, 5, 0, 0], [4, 1, 5, 6, 7]])
    losses = {
        name: [0.25 * (1 + i) for i in range(len(channels))] for name, channels in kept.items()
    }
    return {
        "circuit_data": kept,
        "samples": {"0.attn.q": {3: {0.5: [[], []]}}, "1.mlp.post_act": samples()},
        "importances": {
            "ch_interv_losses": losses,
            "layer_interv_losses": {"0.attn": 0.7, "1.mlp": torch.tensor(0.5)},
            "loc_interv_losses": {"0.attn.q": torch.tensor([0.4]), "1.attn.q": 0.3},
            "interv_loss": torch.tensor(0.3),
            "loss": 0.04,
            "pair_data": [[0.01 * matrix, *rest] for matrix, *rest in pair_data],
            "pair_data_connections": pair_data,
            "task_samples": (tokens, task_activations(kept)),
            "beeg_model_config": BASE | {"d_head": D // H, "d_mlp": None},
        },
        "all_loss": [(0, 1.0), (1, torch.tensor(0.5))],
        "num_total_nodes": 2 * sum(WIDTHS.values()) + D,
        "prune_config": {"k_coef": 1e-4, "lr": [1, 2], "dtype": torch.float32, "on": True},
    }


def set_at(*keys):
    """A change that sets the value at a path of keys."""
    *path, last, value = keys

    def change(values):
        for key in path:
            values = values[key]
        values[last] = value

    return change


def drop(values, location):
    del values["circuit_data"][location]
    del values["importances"]["ch_interv_losses"][location]


def samples():
    """Two channels' stretches of text; upstream has tensors among the keys, and number types that
    differ from file to file."""

    def stretch(seed, place, length=6, dtype=torch.int32):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 19, (length,), generator=generator).to(dtype)
        return tokens, torch.randn(length, generator=generator).bfloat16(), place

    both = ([stretch(1, 2)], [stretch(2, torch.tensor(5)), stretch(3, 0, dtype=torch.float32)])
    return {7: {0.001: both, 0.5: ([], [stretch(4, 1)])}, torch.tensor(9): {0.1: ([], [])}}


def task_activations(kept):
    """Activations of the nodes of two locations, which say what they are of."""
    return {
        name: {
            int(channel): torch.full((4, 5), float(channel)).bfloat16() for channel in kept[name]
        }
        for name in ("0.attn.v", "final_resid", "1.attn.q")
    }


def write_tinypython(folder, merges=(), d_vocab=300):
    """The tokenizer's two files in a folder: the 256 bytes, these merges, and the end of text."""
    from tl_sparse.checkpoints.openai_tokenizer import BYTES

    folder.mkdir(exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.bpe").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = [*BYTES, *("".join(pair) for pair in merges)]
    ids = {token: i for i, token in enumerate(tokens)} | {"<|endoftext|>": d_vocab - 1}
    (folder / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    return folder
