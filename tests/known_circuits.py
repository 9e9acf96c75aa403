"""Models in which the nodes that a task needs are known by construction, and a tiny task."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

MARKS, QUERY, ANSWERS = (5, 6), 10, (3, 4)


@pytest.fixture
def words() -> Any:
    """A tokenizer over the words w3 .. w29; ids are their numbers, and 0..2 pad, begin, end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, 30))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture
def marks(words: Any) -> Any:
    """The task: w3 follows where w5 stood among other words, w4 where w6 did."""
    from tl_sparse.tasks import Task, task

    @task(answers=(" w3", " w4"), source="test")
    def marked(rng, split):
        """Whether w5 or w6 stood somewhere before."""
        low, high = (20, 25) if split == "train" else (25, 30)
        filler = [f"w{rng.randrange(low, high)}" for _ in range(rng.randint(3, 7))]
        place = rng.randrange(len(filler))
        return tuple(
            " ".join([*filler[:place], f"w{mark}", *filler[place:], f"w{QUERY}"]) for mark in MARKS
        )

    return Task.bind(marked, words, max_tokens=12)


def plant(model: Any, gain: float, layer_of_mlp: int | None) -> set[tuple[int, str, int]]:
    """Write a chain of nodes into a model; everything else only disturbs the stream's norm.

    Head 0 of layer 0 averages channel 0, on which the two marks differ in sign, into channel 1.
    With ``layer_of_mlp`` a neuron there passes channel 1 on to channel 2. The unembedding reads the
    last channel of the chain, and nothing else writes to the chain's channels.
    """
    from tl_sparse.sparsity.matrices import weight_matrices

    generator = torch.Generator().manual_seed(7)
    weights = {matrix.name: matrix.parts[0] for matrix in weight_matrices(model)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", ".b_Q", ".b_K", ".b_V", ".b_O", ".b_in", ".b_out", "b_U")):
                parameter.zero_()
        for name, weight in weights.items():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
            if name.endswith(("W_O", "W_out")):
                weight[..., :3] = 0  # nobody else writes to the chain
            if name.endswith(("W_Q", "W_K", "W_pos")):
                weight.zero_()  # attention is uniform, and positions tell nothing
        embed, unembed = weights["embed.W_E"], weights["unembed.W_U"]
        embed[:, :3] = 0
        # they dominate the norms, so that an answer grows with each link of the chain
        embed[:, 3], embed[:, 4] = 12.0, -12.0
        embed[MARKS[0], 0], embed[MARKS[1], 0] = 12.0, -12.0
        value, out = weights["blocks.0.attn.W_V"], weights["blocks.0.attn.W_O"]
        value[0, :, 1] = 0
        value[0, 0, 1] = 1.0
        out[0, 1, :] = 0
        out[0, 1, 1] = 4.0
        chain, last = {(0, "attn_in", 0), (0, "attn_v", 1), (0, "attn_out", 1)}, 1
        if layer_of_mlp is not None:
            mlp = f"blocks.{layer_of_mlp}.mlp"
            weights[f"{mlp}.W_in"][:, 5] = 0
            weights[f"{mlp}.W_in"][1, 5] = 1.0
            model.blocks[layer_of_mlp].mlp.b_in[5] = 8.0  # far from the bend: the neuron is linear
            weights[f"{mlp}.W_out"][5, :] = 0
            weights[f"{mlp}.W_out"][5, 2] = 3.0
            model.blocks[layer_of_mlp].mlp.b_out[2] = -24.0
            chain |= {
                (layer_of_mlp, "mlp_in", 1), (layer_of_mlp, "mlp_neuron", 5),
                (layer_of_mlp, "mlp_out", 2),
            }  # fmt: skip
            last = 2
        unembed[:] = 0
        unembed[last, ANSWERS[0]], unembed[last, ANSWERS[1]] = gain, -gain
    return chain


@pytest.fixture
def planted(words: Any) -> Callable[..., tuple[Any, set[tuple[int, str, int]]]]:
    """``planted(**config)``: a SparseTransformer and the six nodes that the task needs in it.

    With ``attn_only`` they are the three of attention.
    """

    def build(**changes: Any) -> tuple[Any, set[tuple[int, str, int]]]:
        from tl_sparse.config import SparseTransformerConfig
        from tl_sparse.model.transformer import SparseTransformer

        values = {"n_layers": 2, "d_model": 8, "d_head": 4, "n_heads": 2, "d_mlp": 12, "n_ctx": 12}
        if changes.get("attn_only"):
            del values["d_mlp"]
        config = SparseTransformerConfig(**(values | {"d_vocab": 30} | changes))
        model = SparseTransformer(config, words).eval()
        # logit_diffs of about 4: where losses are next to nothing, there is nothing to learn from
        return model, plant(model, gain=25.0, layer_of_mlp=None if config.attn_only else 1)

    return build


@pytest.fixture
def dense_model() -> Any:
    """A dense model of TransformerLens' own: HookedTransformer before 4.0, a bridge since."""
    from tl_sparse.compat import HAS_HOOKED_TRANSFORMER

    plain = {
        "n_layers": 2, "d_model": 16, "d_head": 4, "n_heads": 4, "n_ctx": 12, "d_vocab": 30,
        "act_fn": "gelu", "normalization_type": "LN", "d_mlp": 64,
    }  # fmt: skip
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        return HookedTransformer(HookedTransformerConfig(**plain, seed=0)).eval()
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_native(plain).eval()


@pytest.fixture
def dense_planted(dense_model: Any) -> tuple[Any, set[tuple[int, str, int]]]:
    """The same with the three nodes of attention that the task needs."""
    return dense_model, plant(dense_model, gain=8.0, layer_of_mlp=None)


@pytest.fixture
def random_tokens() -> torch.Tensor:
    """Sequences [64, 12] of random words, to take means over."""
    return torch.randint(3, 30, (64, 12), generator=torch.Generator().manual_seed(4))
