"""Hierarchical attribution: known answers, exact sums, an explicit second way, batches."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from tests.tracing.conftest import (
    dictionaries,
    random_dictionary,
    randomized,
    sparse_transformer,
    tl_model,
)
from tests.tracing.explicit import Explicit


class KnownAnswer(nn.Module):
    """The authors' test: y = 16 through two layers of two neurons, all weights written down."""

    def __new__(cls) -> Any:
        from tl_sparse.compat import HookedRootModule, HookPoint

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hook_resid_pre, self.hook_mlp_out = HookPoint(), HookPoint()
                self.hook_resid_post = HookPoint()

        class Model(HookedRootModule):
            def __init__(self) -> None:
                super().__init__()
                self.cfg = SimpleNamespace(n_layers=2, n_heads=1, d_vocab=4)
                self.hook_embed = HookPoint()
                self.blocks = nn.ModuleList([Block(), Block()])
                self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))
                self.setup()

            def forward(self, tokens: torch.Tensor, return_type: str = "logits") -> Any:
                x = self.hook_embed(self.x.expand(*tokens.shape, 1))
                for block, d in zip(self.blocks, known_dictionaries(), strict=True):
                    x = block.hook_resid_pre(x)
                    x = block.hook_resid_post(x + block.hook_mlp_out(x @ d.W_enc @ d.W_dec))
                return x

        return Model()


def known_dictionaries() -> list[Any]:
    from tl_sparse.tracing import Dictionary

    def tensor(*rows: list[float]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    zeros = torch.zeros(2, dtype=torch.float64)
    return [
        Dictionary("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", tensor([1, 2]), zeros,
                   tensor([1], [1]), zeros[:1]),
        Dictionary("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", tensor([1, 1]), zeros,
                   tensor([2], [1]), zeros[:1]),
    ]  # fmt: skip


def known_scores(gate: Any, edges: str = "none") -> tuple[Any, dict[str, float]]:
    from tl_sparse.tracing import Custom, Splice, trace

    splice = Splice(KnownAnswer(), known_dictionaries())
    root = Custom(lambda logits, last: logits[:, 0, 0], "y")
    graph = trace(splice, torch.tensor([[0]]), root, gate, edges=edges)
    features = graph.features
    return graph, dict(zip(features["id"], features["attribution"], strict=True))


def test_known_answer_hierarchical() -> None:
    from tl_sparse.tracing import Gate

    graph, scores = known_scores(Gate(tau=0.1))
    assert graph.value == 16
    assert scores == {"0.mlp/0/0": 4, "0.mlp/0/1": 8, "1.mlp/0/0": 8, "1.mlp/0/1": 4}


def test_known_answer_with_a_high_threshold_keeps_three_nodes() -> None:
    from tl_sparse.tracing import Gate

    graph, scores = known_scores(Gate(tau=5))
    # what went through 1.mlp/0/1 is not credited; of the 9 that are left of the token, the target
    # and two features are the three nodes of the authors' test, which has no leaves
    assert scores == {"0.mlp/0/1": 6, "1.mlp/0/0": 8}
    nodes = graph.nodes.set_index("id")["attribution"].to_dict()
    assert nodes == scores | {graph.root: 16, "token/0": 9}
    assert graph.mass["cut"] == 4 + 3
    assert sum(graph.mass.values()) == pytest.approx(16, abs=1e-12)


def test_known_answer_direct() -> None:
    from tl_sparse.tracing import Gate

    graph, _ = known_scores(Gate(tau=0.1), edges="direct")
    to_root = graph.edges[graph.edges["target"] == graph.root].set_index("source")["weight"]
    features = to_root[to_root.index.str.contains("mlp/")]
    assert features.to_dict() == {
        "0.mlp/0/0": 1, "0.mlp/0/1": 2, "1.mlp/0/0": 8, "1.mlp/0/1": 4,
    }  # fmt: skip


def test_logits_are_unchanged_to_the_bit(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing.run import run

    found = run(spliced(any_model), prompt, torch.tensor([5]))
    assert torch.equal(found.logits, any_model(prompt))


@pytest.mark.parametrize("tau", [-math.inf, 0.05, 1.0])
def test_leaves_and_cut_features_sum_to_the_root(any_model, spliced, prompt, tau) -> None:
    from tl_sparse.tracing import Gate, LogitDiff, trace

    root = LogitDiff(4, 9)
    graph = trace(spliced(any_model), prompt, root, Gate(tau=tau), edges="none")
    logits = any_model(prompt)[0, -1].detach()
    assert graph.value == pytest.approx(float(logits[4] - logits[9]), abs=1e-12)
    size = sum(abs(part) for part in graph.mass.values())
    assert abs(sum(graph.mass.values()) - graph.value) <= 1e-12 * size
    assert (graph.mass["cut"] == 0) == (tau == -math.inf)


def test_without_an_embedding_dictionary_tokens_are_leaves(own_model, prompt) -> None:
    from tl_sparse.tracing import Logit, Splice, trace

    graph = trace(Splice(own_model, dictionaries()[1:]), prompt, Logit(4), edges="none")
    assert graph.mass["token"] != 0
    assert sum(graph.mass.values()) == pytest.approx(graph.value, abs=1e-10)


@pytest.mark.parametrize("mlp", ["error", "ratio"])
def test_mlps_without_dictionary(any_model, prompt, mlp) -> None:
    from tl_sparse.tracing import Logit, Splice, trace

    without = [d for d in dictionaries() if "mlp" not in d.name]
    graph = trace(Splice(any_model, without, mlp=mlp), prompt, Logit(4), edges="none")
    assert sum(graph.mass.values()) == pytest.approx(graph.value, abs=1e-10)


def test_an_mlps_gradient_is_its_slope(own_model, prompt) -> None:
    """Against finite differences in the model with patterns and norms held."""
    from tl_sparse.tracing import Gate, Logit, Splice, trace

    d = dictionaries()[1]
    splice = Splice(own_model, [d], mlp="gradient")
    assert not splice.strict
    found = trace(splice, prompt, Logit(4), Gate.off(), edges="none").features
    _, cache = own_model.run_with_cache(prompt)
    held = [(n, lambda x, hook=None, n=n: cache[n]) for n in own_model.hook_dict
            if n.endswith(("hook_scale", "hook_pattern"))]  # fmt: skip
    row = found.loc[found["attribution"].abs().idxmax()]

    def logit(change: float) -> float:
        def scale(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
            x = x.clone()
            x[0, row["pos"]] += change * row["activation"] * d.W_dec[row["index"]]
            return x

        with torch.no_grad():
            return float(
                own_model.run_with_hooks(prompt, fwd_hooks=[*held, (d.hook_out, scale)])[0, -1, 4]
            )

    slope = (logit(1e-4) - logit(-1e-4)) / 2e-4
    assert row["attribution"] == pytest.approx(slope, rel=1e-6)
    # what it adds in all is another number: the MLPs between are curved
    assert abs(logit(0) - logit(-1) - slope) > 1e-3 * abs(slope)


def test_published_mode_is_not_linear(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Freeze, Gate, Logit
    from tl_sparse.tracing.attribution import attribute
    from tl_sparse.tracing.run import run

    last = torch.tensor([5])
    strict = attribute(run(spliced(any_model), prompt, last, Gate.off()), Logit(4))
    compat = spliced(any_model, freeze=Freeze.compat())
    published = attribute(run(compat, prompt, last, Gate.off(), biases=True), Logit(4))
    assert torch.equal(strict.values, published.values)
    assert float((strict.total - strict.values).detach().abs()) < 1e-10
    assert float((published.total - published.values).detach().abs()) > 0.1


def test_direct_rows_sum_to_activations(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Logit, trace

    graph = trace(spliced(any_model), prompt, Logit(4))
    rows = graph.rows.set_index("target")
    sums = rows.drop(columns="activation").sum(axis=1)
    assert len(rows) > 5
    assert float((sums - rows["activation"]).abs().max()) < 1e-10


def test_direct_edges_carry_the_hierarchical_attribution(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Gate, Logit, trace

    graph = trace(spliced(any_model), prompt, Logit(4), Gate(tau=0.05, sign="absolute"))
    sums = graph.edges.groupby("source")["attribution"].sum()
    features = graph.features.set_index("id")["attribution"]
    assert float((sums.reindex(features.index).fillna(0) - features).abs().max()) < 1e-10


def test_edges_through_cut_features_carry_the_plain_attribution(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Gate, Logit, trace

    splice = spliced(own_model)
    plain = trace(splice, prompt, Logit(4), Gate.off(), edges="none")
    plain_scores = plain.nodes.set_index("id")["attribution"]
    graph = trace(splice, prompt, Logit(4), Gate(tau=1.0, sign="absolute"), edges="through")
    activation = graph.nodes.set_index("id")["activation"]
    edges = graph.edges
    share = plain_scores[edges["target"]].to_numpy() / activation[edges["target"]].to_numpy()
    sums = (edges["weight"] * share).groupby(edges["source"]).sum()
    features = graph.features["id"]
    assert len(features) < len(plain.features)
    assert float((sums.reindex(features).fillna(0) - plain_scores[features]).abs().max()) < 1e-10


def test_edges_are_those_worked_out_by_hand(any_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Gate, Logit, trace

    splice = spliced(any_model)
    graph = trace(splice, prompt, Logit(4), Gate.off(), heads=True)
    by_hand = Explicit(any_model, list(splice.dictionaries), prompt)
    edges = graph.edges.set_index(["target", "source"])["weight"]
    heads = graph.heads.set_index(["target", "source", "head"])["weight"]

    def check(target: str, expected: dict[str, torch.Tensor]) -> int:
        found = edges[target]
        expected = {k: v for k, v in expected.items() if not k.split("/")[0].endswith("bias")}
        for source, weight in expected.items():
            assert found.get(source, 0.0) == pytest.approx(float(weight.sum()), abs=1e-9)
        return sum(abs(float(weight.sum())) > 1e-6 for weight in expected.values())

    assert check(graph.root, by_hand.to_logit(4)) > 10
    features = graph.features
    for layer in range(2):
        mlp = features[features["site"] == f"{layer}.mlp"].iloc[-1]
        assert check(mlp["id"], by_hand.to_mlp_feature(layer, mlp["pos"], mlp["index"])) > 10
        attn = features[features["site"] == f"{layer}.attn"].iloc[-1]
        expected = by_hand.to_attention_feature(layer, attn["pos"], attn["index"])
        assert check(attn["id"], expected) > 10
        for source, by_head in expected.items():
            if source.startswith(("embed/", "0.mlp/")):
                for head, weight in enumerate(by_head.tolist()):
                    found = heads.get((attn["id"], source, head), 0.0)
                    assert found == pytest.approx(weight, abs=1e-9)


def test_an_edge_is_the_sum_over_heads(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Logit, trace

    graph = trace(spliced(own_model), prompt, Logit(4), heads=True)
    sums = graph.heads.groupby(["source", "target"])["weight"].sum()
    edges = graph.edges.set_index(["source", "target"])["weight"].reindex(sums.index)
    assert len(sums) > 20
    assert float((sums - edges).abs().max()) < 1e-10


def test_open_gate_is_gradient_times_activation(own_model, prompt) -> None:
    """Against autograd on a splice written down here."""
    from tl_sparse.tracing import Gate, Logit, Splice, trace

    d = random_dictionary("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    graph = trace(Splice(own_model, [d]), prompt, Logit(4), Gate.off(), edges="none")
    kept: dict[str, torch.Tensor] = {}

    def read(x: torch.Tensor, hook: Any = None) -> None:
        kept["f"] = d.encode(x).detach().requires_grad_()

    def write(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
        x_hat = d.decode(kept["f"])
        return x_hat + (x - x_hat).detach()

    names = [n for n in own_model.hook_dict if n.endswith(("hook_scale", "hook_pattern"))]
    # later MLPs are leaves: constants
    names.append("blocks.1.hook_mlp_out")
    frozen = [(n, lambda x, hook=None: x.detach()) for n in names]
    logits = own_model.run_with_hooks(
        prompt, fwd_hooks=[(d.hook_in, read), (d.hook_out, write), *frozen]
    )
    (gradient,) = torch.autograd.grad(logits[0, -1, 4], kept["f"])
    expected = (gradient * kept["f"])[0].detach()
    assert len(graph.features) == int((expected != 0).sum())
    for row in graph.features.itertuples():
        assert row.attribution == pytest.approx(float(expected[row.pos, row.index]), abs=1e-12)


def test_many_prompts_at_once_are_as_one_by_one(any_model, spliced) -> None:
    from tl_sparse.tracing import Gate, Logit, trace, trace_each

    prompts = [[3, 7, 1, 12], [9, 2, 2]]
    splice = spliced(any_model)
    gate = Gate(tau=2, mode="top_k", sign="absolute")
    tokens = [4, 9]
    together = trace_each(splice, prompts, Logit(tokens), gate, heads=True)
    for prompt, token, graph in zip(prompts, tokens, together, strict=True):
        alone = trace(splice, [prompt], Logit(token), gate, heads=True)
        assert graph.value == pytest.approx(alone.value, abs=1e-10)
        for name, keys in (("nodes", ["id"]), ("edges", ["source", "target"]),
                           ("heads", ["source", "target", "head"])):  # fmt: skip
            a, b = (getattr(g, name).set_index(keys).sort_index() for g in (graph, alone))
            assert list(a.index) == list(b.index)
            column = "attribution" if name == "nodes" else "weight"
            assert float((a[column] - b[column]).abs().max()) < 1e-9


@pytest.mark.parametrize("root", ["score", "score_key", "feature", "log_prob", "pattern"])
def test_other_roots(any_model, spliced, prompt, root) -> None:
    from tl_sparse.tracing import (
        AttentionPattern,
        AttentionScore,
        FeatureRoot,
        Gate,
        LogProb,
        trace,
    )

    _, cache = any_model.run_with_cache(prompt)
    splice = spliced(any_model)
    weights = splice.dictionary("1.mlp")
    acts = weights.encode(cache[weights.hook_in])[0, 3].detach()
    index = int(acts.argmax())
    q, k = (cache[f"blocks.1.attn.hook_{x}"][0] for x in "qk")
    score = float((q[4, 2] * k[1, 2]).sum() / 2)
    spec, value = {
        "score": (AttentionScore(1, 2, 4, 1), score),
        "score_key": (AttentionScore(1, 2, 4, 1, side="key"), score),
        "feature": (FeatureRoot("1.mlp", index, 3), float(acts[index])),
        "log_prob": (LogProb(4), float(any_model(prompt)[0, -1].detach().log_softmax(-1)[4])),
        "pattern": (AttentionPattern(1, 2, 4, 1),
                    float(cache["blocks.1.attn.hook_pattern"][0, 2, 4, 1])),
    }[root]  # fmt: skip
    graph = trace(splice, prompt, spec, Gate(tau=1e-3), edges="none")
    assert graph.value == pytest.approx(value, abs=1e-9)
    if spec.linear:
        assert sum(graph.mass.values()) == pytest.approx(value, abs=1e-9)
    assert len(graph.features) > 0


def test_score_nodes_do_not_depend_on_a_constant_in_all_scores(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Freeze, Gate, Logit
    from tl_sparse.tracing.attribution import attribute
    from tl_sparse.tracing.run import run

    def scores(raw: bool, shift: float) -> torch.Tensor:
        splice = spliced(own_model, score_nodes=True, raw_scores=raw, freeze=Freeze(pattern=False))
        with own_model.hooks([("blocks.1.attn.hook_attn_scores", lambda x, hook=None: x + shift)]):
            found = run(splice, prompt, torch.tensor([5]), Gate.off())
        return attribute(found, Logit(4)).score["1.scores"]

    assert bool(scores(False, 0).isfinite().all())  # masked entries are -inf
    assert float(scores(False, 0).abs().max()) > 0
    assert torch.allclose(scores(False, 0), scores(False, 5.0), atol=1e-10)
    assert not torch.allclose(scores(True, 0), scores(True, 5.0), atol=1e-3)


def test_a_model_from_hugging_face(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from tl_sparse.compat import bridge_class
    from tl_sparse.tracing import Logit, Splice, trace

    if not hasattr(bridge_class(), "boot_transformers"):
        pytest.skip("this TransformerLens has no TransformerBridge")
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 12, "vocab_size": 20}
    randomized(GPT2LMHeadModel(GPT2Config(**sizes))).save_pretrained(tmp_path)
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(20)}, "w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="w0", eos_token="w1", bos_token="w1"
    ).save_pretrained(tmp_path)
    model = bridge_class().boot_transformers(str(tmp_path), device="cpu").double()
    with torch.no_grad():  # a caller's no_grad does no harm
        graph = trace(Splice(model, dictionaries()), torch.tensor([[3, 7, 1, 12]]), Logit(4))
    expected = model(torch.tensor([[3, 7, 1, 12]]))[0, -1, 4].detach()
    assert graph.value == pytest.approx(float(expected))
    sums = graph.rows.drop(columns=["target", "activation"]).sum(axis=1)
    assert float((sums - graph.rows["activation"]).abs().max()) < 1e-9


def test_a_model_that_is_not_held_constant_is_refused(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Logit, NotLinear, trace

    hook = ("ln_final.hook_normalized", lambda x, hook=None: x * x.detach().sum().sin() + x**2)
    with own_model.hooks(fwd_hooks=[hook]), pytest.raises(NotLinear, match="parts sum to"):
        trace(spliced(own_model), prompt, Logit(4))


def test_abstopk_inside_attention_is_refused_in_strict_mode_alone(prompt) -> None:
    from tl_sparse.tracing import Freeze, Logit, Splice, trace

    model = sparse_transformer(activation_density={"attn_v": 0.5})
    with pytest.raises(ValueError, match="AbsTopK at attn_v: a bias has no part of its own"):
        trace(Splice(model, dictionaries()), prompt, Logit(4))
    graph = trace(Splice(model, dictionaries(), freeze=Freeze.compat()), prompt, Logit(4))
    assert graph.value == pytest.approx(float(model(prompt)[0, -1, 4].detach()))
    # a graph says how it was made
    assert graph.settings["freeze"] == vars(Freeze.compat())
    assert not graph.settings["raw_scores"]
    assert graph.settings["tau"] == 0.1


def test_dictionaries_that_do_not_fit_are_refused(own_model, prompt) -> None:
    from tl_sparse.tracing import Gate, Logit, Splice, trace

    wide = random_dictionary("blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out")
    with pytest.raises(ValueError, match="has 32 channels, not 16"):
        trace(Splice(own_model, [wide]), prompt, Logit(4))
    other = dictionaries()[0].to(dtype=torch.float32)
    with pytest.raises(ValueError, match="float32"):
        trace(Splice(own_model, [other]), prompt, Logit(4))
    with pytest.raises(ValueError, match="two dictionaries"):
        Splice(own_model, dictionaries()[:1] * 2)
    with pytest.raises(ValueError, match="no hook"):
        Splice(own_model, [random_dictionary("blocks.0.hook_x", "blocks.0.hook_mlp_out")])
    with pytest.raises(ValueError, match="no feature's id"):
        Gate(ban=("1.mlp",))


def test_protected_and_banned_nodes(own_model, spliced, prompt) -> None:
    from tl_sparse.tracing import Gate, Logit, trace

    gate = Gate(tau=math.inf, protect=("1.mlp/*/5", "0.attn/5/0"))
    kept = trace(spliced(own_model), prompt, Logit(4), gate, edges="none").features
    assert set(zip(kept["site"], kept["index"], strict=True)) <= {("1.mlp", 5), ("0.attn", 0)}
    assert len(kept) == 2
    free = trace(spliced(own_model), prompt, Logit(4), edges="none").features["id"]
    gone = next(name for name in free if name.startswith("1.attn/5/"))
    gate = Gate(ban=(gone.replace("/5/", "/*/"),))
    banned = trace(spliced(own_model), prompt, Logit(4), gate, edges="none").features["id"]
    assert gone not in set(banned)
    assert len(banned) > 0


@pytest.mark.parametrize(("mode", "tau"), [("budget", 9), ("top_k", 2), ("quantile", 0.9)])
def test_modes_that_count(own_model, spliced, prompt, mode, tau) -> None:
    from tl_sparse.tracing import Gate, Logit, trace

    gate = Gate(tau=tau, mode=mode, sign="absolute")
    kept = trace(spliced(own_model), prompt[:, :4], Logit(4), gate, edges="none").features
    if mode == "budget":
        assert 6 <= len(kept) <= 9
    elif mode == "top_k":
        assert kept["site"].value_counts().to_dict() == dict.fromkeys(kept["site"].unique(), 2)
    else:
        assert 0 < len(kept) < 25


OPTIONS = {
    "jumprelu": {"activation": "jumprelu", "threshold": torch.full((24,), 0.7).double()},
    "topk": {"activation": "topk", "k": 5},
    "batchtopk": {"activation": "batchtopk", "k": 3},
    "token_norm": {"norm": "token"},
    "layer_norm": {"norm": "layer_norm"},
}


@pytest.mark.parametrize("option", [*OPTIONS, "skip"])
def test_kinds_of_dictionaries(any_model, prompt, option) -> None:
    from dataclasses import replace

    from tl_sparse.tracing import Gate, Logit, Splice, trace

    found = dictionaries(**OPTIONS.get(option, {}))
    if option == "skip":
        skip = torch.randn(16, 16, dtype=torch.float64)
        found = [replace(d, W_skip=skip) if d.transcoder else d for d in found]
    gate = Gate(tau=1e-3, sign="absolute")
    graph = trace(Splice(any_model, found), prompt, Logit(4), gate)
    rows = graph.rows.drop(columns=["target", "activation"]).sum(axis=1)
    assert float((rows - graph.rows["activation"]).abs().max()) < 1e-9
    # activations are those of the dictionary's own encode, and x̂ = f W_dec + ... its decode's
    _, cache = any_model.run_with_cache(prompt)
    d = found[2]
    acts = d.encode(cache[d.hook_in], cache[d.hook_out])[0].detach()
    mine = graph.features[graph.features["site"] == d.name]
    assert len(mine) > 0
    for row in mine.itertuples():
        assert row.activation == pytest.approx(float(acts[row.pos, row.index]), abs=1e-10)


def architectures() -> dict[str, dict[str, Any]]:
    from tl_sparse.compat import HAS_HOOKED_TRANSFORMER

    own = {"own_rms": {"normalization_type": "RMS"}, "own_no_norm": {"normalization_type": "none"},
           "own_concat": {"positional_embedding_type": "concat", "d_pos": 4},
           "own_bigram": {"bigram_table": "learned"}}  # fmt: skip
    if not HAS_HOOKED_TRANSFORMER:
        return own
    return own | {
        "rotary": {"positional_embedding_type": "rotary", "rotary_dim": 4},
        "gqa": {"n_key_value_heads": 2},
        "rms": {"normalization_type": "RMS"},
        "no_norm": {"normalization_type": None},
        "parallel": {"parallel_attn_mlp": True},
        "soft_cap": {"output_logits_soft_cap": 5.0, "attn_scores_soft_cap": 5.0},
        "post_norms": {"use_normalization_before_and_after": True, "normalization_type": "RMS"},
        "qk_norm": {"use_qk_norm": True},
        "moe": {"num_experts": 2, "experts_per_token": 1, "gated_mlp": True, "act_fn": "silu"},
    }


@pytest.mark.parametrize("name", architectures())
def test_architectures(prompt, name) -> None:
    from tl_sparse.tracing import AttentionScore, LogitDiff, Splice, trace

    options = architectures()[name]
    model = sparse_transformer(**options) if name.startswith("own") else tl_model(**options)
    found = dictionaries()
    if name == "own_no_norm" or name == "no_norm":
        found = [d for d in found if not d.transcoder]
    if name == "parallel":
        found = [random_dictionary("blocks.0.ln1.hook_normalized", "blocks.0.hook_mlp_out")]
    splice = Splice(model, found)
    graph = trace(splice, prompt, LogitDiff(4, 9))  # raises if the parts do not sum to it
    sums = graph.rows.drop(columns=["target", "activation"]).sum(axis=1)
    assert float((sums - graph.rows["activation"]).abs().max()) < 1e-8
    if name not in ("soft_cap",):
        trace(splice, prompt, AttentionScore(1, 3, 4, 2), edges="none")
        trace(splice, prompt, AttentionScore(1, 3, 4, 2, side="key"), edges="none")


@pytest.mark.parametrize("root", ["AttentionScore", "AttentionPattern"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head": 9}, "head=9: layer 1 has"),
     ({"layer": 7}, "the model has layers 0 to 1")],
)  # fmt: skip
def test_what_attention_does_not_have_is_refused(
    any_model, spliced, prompt, root, changes, message
) -> None:
    from tl_sparse import tracing

    of = {"layer": 1, "head": 2, "query": 4, "key": 1} | changes
    with pytest.raises(ValueError, match=message):
        tracing.trace(spliced(any_model), prompt, getattr(tracing, root)(**of))


def test_roots_of_a_batch_are_named_by_tokens_where_these_are_texts(
    small_model, make_tokenizer
) -> None:
    from tl_sparse.nodes.prompts import Prompts
    from tl_sparse.tracing import Splice, trace_each

    model = small_model(n_layers=1, tokenizer=make_tokenizer())
    ids = torch.tensor([[1, 4, 5], [1, 6, 7]])
    prompts = Prompts(ids, torch.tensor([2, 2]), ("a", "b"), torch.tensor([5, 1]),
                      torch.tensor([9, 3]))  # fmt: skip
    graphs = trace_each(Splice(model, ()), prompts, edges="none")
    assert [g.root for g in graphs] == ["logit('w5') - logit('w9')", "logit('<bos>') - logit('w3')"]
    model.tokenizer = None
    graphs = trace_each(Splice(model, ()), prompts, edges="none")
    assert graphs[0].root == "logit(5) - logit(9)"
