"""Outputs of heads: the same as TransformerLens' own hook_result, at every position."""

import warnings

import pytest
import torch

from tl_sparse.heads import ContrastiveDataset, extract_head_outputs


def dataset_of(model, lengths=(7, 9, 5, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 30, (n,), generator=generator).tolist() for n in lengths]
    half = len(rows) // 2
    roles = {"second": [1] * len(rows)}
    return ContrastiveDataset.of("some", model, rows[:half], rows[half:], roles=roles)


def results_of(model, tokens):
    """[pos, component, width] of one prompt, by ``use_attn_result``."""
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens[None])
    model.set_use_attn_result(False)
    layers = range(model.cfg.n_layers)
    return torch.cat([cache[f"blocks.{layer}.attn.hook_result"][0] for layer in layers], 1)


def by_hand(model, dataset, position):
    rows = []
    for tokens, last in zip(dataset.prompts.tokens, dataset.prompts.last.tolist(), strict=True):
        x = results_of(model, tokens[: last + 1])
        if position == "mean":
            rows.append(x.mean(0))
        elif position == "max":
            best = x.norm(dim=2).argmax(0)
            rows.append(torch.stack([x[p, i] for i, p in enumerate(best.tolist())]))
        else:
            rows.append(x[last if position == "last" else 1])
    return torch.stack(rows).detach()


def test_a_sparse_transformers_heads_add_up_to_the_write(small_model):
    model = small_model()
    dataset = dataset_of(model, (8, 8))
    values = extract_head_outputs(model, dataset, "last").values
    _, cache = model.run_with_cache(dataset.prompts.tokens)
    for layer in (0, 1):
        written = cache[f"blocks.{layer}.hook_attn_out"][:, -1] - model.blocks[layer].attn.b_O
        torch.testing.assert_close(values[:, 4 * layer : 4 * layer + 4].sum(1), written)


@pytest.fixture(scope="module")
def grouped():
    """Four heads, two keys and values, of either major version of TransformerLens."""
    from tl_sparse import compat

    sizes = {"n_layers": 2, "d_model": 16, "d_head": 4, "n_heads": 4, "d_mlp": 16, "n_ctx": 16}
    if compat.HAS_HOOKED_TRANSFORMER:
        config = compat.ConfigBase(
            **sizes, n_key_value_heads=2, d_vocab=30, act_fn="gelu", normalization_type="LN"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it goes in 4
            return compat.ModelBase(config)
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=30, head_dim=4,
    )  # fmt: skip
    model = build_bridge_from_module(LlamaForCausalLM(config), "LlamaForCausalLM", hf_config=config)
    return model


@pytest.mark.parametrize("position", ["mean", "last", "max", "second"])
def test_outputs_are_those_of_use_attn_result(grouped, position):
    dataset = dataset_of(grouped)
    outputs = extract_head_outputs(grouped, dataset, position, batch_size=3)
    assert [str(c) for c in outputs.components][2:6] == ["L0H2", "L0H3", "L1H0", "L1H1"]
    assert outputs.factors.shape == (4, 8, 4)
    torch.testing.assert_close(outputs.values, by_hand(grouped, dataset, position))


def test_heads_that_share_keys_and_values(grouped):
    model = grouped
    dataset = dataset_of(model, (8, 6))
    keys = extract_head_outputs(model, dataset, "last", ("q", "k"))
    assert [str(c) for c in keys.components if c.layer == 0] == [
        "L0H0.q", "L0H1.q", "L0H2.q", "L0H3.q", "L0H0.k", "L0H1.k"
    ]  # fmt: skip
    _, cache = model.run_with_cache(dataset.prompts.tokens[:1])
    found = cache["blocks.0.attn.hook_k"].reshape(1, -1, 2, 4)[0, dataset.prompts.last[0]]
    torch.testing.assert_close(keys.values[0, 4:6], found)


def test_mlps_and_heads_together(small_model):
    model = small_model()
    dataset = dataset_of(model, (8, 8))
    both = extract_head_outputs(model, dataset, "last", ("head", "mlp"))
    assert [str(c) for c in both.components][3:6] == ["L0H3", "0.mlp", "L1H0"]
    heads = extract_head_outputs(model, dataset, "last")
    torch.testing.assert_close(both.values[:, [0, 5]], heads.values[:, [0, 4]])
    _, cache = model.run_with_cache(dataset.prompts.tokens)
    torch.testing.assert_close(both.values[:, 4], cache["blocks.0.hook_mlp_out"][:, -1])


def test_the_product_with_a_weight_is_that_of_the_vectors(small_model):
    model = small_model()
    outputs = extract_head_outputs(model, dataset_of(model))
    for groups in (1, len(outputs.components)):
        weight = torch.randn(groups, outputs.width, 5)
        parts = [part for _, part in outputs.through(weight)]
        expected = torch.einsum("pcw,cwu->pcu", outputs.values, weight.expand(8, -1, -1))
        torch.testing.assert_close(torch.cat(parts), expected)


def test_what_cannot_be_read_is_refused_by_name(small_model):
    model = small_model()
    dataset = dataset_of(model)
    with pytest.raises(ValueError, match=r"nodes='neuron'.*head, mlp, q, k, v"):
        extract_head_outputs(model, dataset, nodes="neuron")
    with pytest.raises(ValueError, match="position='first': choose from mean, last, max, second"):
        extract_head_outputs(model, dataset, "first")
    with pytest.raises(ValueError, match=r"different widths \[4, 16\]"):
        extract_head_outputs(model, dataset, nodes=("mlp", "q"))
    with pytest.raises(ValueError, match="no hook for mlp"):
        extract_head_outputs(small_model("attn_only"), dataset, nodes="mlp")
