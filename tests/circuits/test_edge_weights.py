"""Removing edges: identities with node ablation, on every layout of weights that models have."""

import pytest
import torch

from tl_sparse.ablation import ablation_hooks, activation_means
from tl_sparse.ablation.logit_diff import task_logit_diffs
from tl_sparse.circuits import circuit_edges
from tl_sparse.circuits.edge_weights import ablated_reads, gated_logit_diffs, locate
from tl_sparse.sites import MATRICES, NodeIndex
from tl_sparse.sparsity.temporary import tensors_of

SOURCES = ("attn_in", "attn_v", "mlp_in", "mlp_neuron")


class Setting:
    """A model, random nodes of it that are kept, and edges among them."""

    def __init__(self, model, task, tokens, share=0.6, random_values=False):
        self.model, self.batch = model, task.batch(6, split="train", seed=0)
        self.means = activation_means(model, tokens)
        self.index, self.values = self.means.index, self.means.values
        generator = torch.Generator().manual_seed(5)
        if random_values:  # an identity that holds for any values tells more than one for means
            self.values = torch.randn(self.values.shape, generator=generator)
        self.kept = torch.rand(self.index.n_nodes, generator=generator) < share
        self.hooks = ablation_hooks(self.index, self.kept, self.values)
        self.edges = circuit_edges(model, self.index, self.kept)
        with torch.no_grad():
            reads = ablated_reads(model, self.index, self.values, self.batch, self.hooks)
            self.weights = locate(model, self.index, self.edges, reads)

    def gated(self, keep):
        with torch.no_grad():
            return gated_logit_diffs(
                self.model, self.batch, self.hooks, self.weights, torch.tensor(keep).float()
            )

    def ablated(self, kept):
        with torch.no_grad():
            return task_logit_diffs(
                self.model, self.batch, ablation_hooks(self.index, kept, self.values)
            )

    def some(self, site, draw):
        """A few kept nodes of a site: places among all nodes, and the edges at either end."""
        places, of_edges = [], {"source": [], "target": []}
        for layer in range(self.index.n_layers):
            piece = self.index.slices[self.index.hook(layer, site)]
            here = torch.nonzero(self.kept[piece]).flatten().tolist()
            chosen = here[draw::2]
            places += [piece.start + channel for channel in chosen]
            for end, found in of_edges.items():
                mine = self.edges["layer"].eq(layer) & self.edges[f"{end}_site"].eq(site)
                found += self.edges.index[mine & self.edges[end].isin(chosen)].tolist()
        return places, of_edges


def without(n, removed):
    keep = torch.ones(n, dtype=torch.bool)
    keep[removed] = False
    return keep.tolist()


def test_with_all_edges_it_is_the_circuit_to_the_bit(small_model, option, marks, random_tokens):
    it = Setting(small_model(option), marks, random_tokens, random_values=True)
    assert len(it.edges) > 100
    assert torch.equal(it.gated([True] * len(it.edges)), it.ablated(it.kept))


def test_all_edges_out_of_nodes_removed_is_those_nodes_ablated(
    small_model, option, marks, random_tokens
):
    """With AbsTopK, where removed nodes compete with kept ones: where all nodes are kept."""
    model = small_model(option)
    has_topk = any(density < 1 for density in vars(model.config.activation_density).values())
    share = 1.1 if has_topk else 0.6
    it = Setting(model, marks, random_tokens, share=share, random_values=True)
    has_sinks = it.model.config.use_attention_sinks
    for site in SOURCES:
        if site not in it.index.sites or (site == "attn_v" and has_sinks):
            continue
        nodes, edges = it.some(site, 0)
        fewer = it.kept.clone()
        fewer[nodes] = False
        got, expected = it.gated(without(len(it.edges), edges["source"])), it.ablated(fewer)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert (expected - it.ablated(it.kept)).abs().max() > 1e-2, site


def test_with_sinks_a_removed_value_edge_carries_the_patterns_mean_row_sum(
    small_model, marks, random_tokens
):
    model = small_model("sinks")
    it = Setting(model, marks, random_tokens)
    with torch.no_grad():
        reads = ablated_reads(model, it.index, it.values, it.batch, it.hooks)
    with torch.no_grad(), model.hooks(fwd_hooks=it.hooks):
        _, cache = model.run_with_cache(it.batch.tokens)
    real = torch.arange(it.batch.tokens.shape[1]) <= it.batch.last[:, None]
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]  # [prompt, head, dest, src]
        share = pattern.sum(-1).transpose(1, 2)[real].mean(0)
        assert share.max() < 0.99
        piece = it.index.slices[it.index.hook(layer, "attn_v")]
        expected = it.values[piece] * share.repeat_interleave(model.cfg.d_head)
        torch.testing.assert_close(reads[piece], expected)


@pytest.mark.parametrize("option", ["plain", "concat", "wide_heads", "no_bias"])
def test_all_edges_into_linear_nodes_removed_is_those_nodes_at_their_means(
    small_model, option, marks, random_tokens
):
    """The mean of a sum is the sum of means: where every source is a node that is kept, and
    nothing bends the target."""
    it = Setting(small_model(option), marks, random_tokens, share=1.1)
    for site in ("attn_q", "attn_k", "attn_v", "mlp_out"):
        nodes, edges = it.some(site, 1)
        fewer = it.kept.clone()
        fewer[nodes] = False
        got, expected = it.gated(without(len(it.edges), edges["target"])), it.ablated(fewer)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_edge_by_hand(small_model, marks, random_tokens):
    model = small_model("layer_norm")
    it = Setting(model, marks, random_tokens, random_values=True)
    which = int(it.edges.index[it.edges["matrix"].eq("W_in")][7])
    edge = it.edges.loc[which]
    gates = torch.tensor(without(len(it.edges), [which])).float()
    changed = it.weights.gated(tensors_of(model), gates)
    assert set(changed) == it.weights.tensors
    mlp = f"blocks.{edge['layer']}.mlp"
    i, j = edge["source"], edge["target"]
    weight, bias = (dict(model.named_parameters())[f"{mlp}.{name}"] for name in ("W_in", "b_in"))
    mean = it.values[it.index.slices[it.index.hook(int(edge["layer"]), "mlp_in")]][i]
    expected_weight, expected_bias = weight.detach().clone(), bias.detach().clone()
    expected_weight[i, j] = 0
    expected_bias[j] += weight[i, j].detach() * mean
    torch.testing.assert_close(changed[f"{mlp}.W_in"], expected_weight, rtol=0, atol=0)
    torch.testing.assert_close(changed[f"{mlp}.b_in"], expected_bias)
    others = it.weights.tensors - {f"{mlp}.W_in", f"{mlp}.b_in"}
    assert all(torch.equal(changed[name], tensors_of(model)[name]) for name in others)


@pytest.mark.parametrize("option", ["plain", "concat", "together"])
def test_gradients_in_the_gates_are_those_of_finite_differences(
    small_model, option, marks, random_tokens
):
    changes = {} if option != "together" else {"activation_density": {}}  # top-k has jumps
    model = small_model(option, **changes).double()
    it = Setting(model, marks, random_tokens)
    gates = torch.ones(len(it.edges), dtype=torch.float64, requires_grad=True)

    def total(gates):
        return gated_logit_diffs(model, it.batch, it.hooks, it.weights, gates).double().sum()

    (grad,) = torch.autograd.grad(total(gates), gates)
    for which in range(0, len(it.edges), len(it.edges) // 6):
        step = torch.zeros_like(gates)
        step[which] = 1e-3
        with torch.no_grad():
            slope = (total(gates + step) - total(gates - step)) / 2e-3
        # logit_diffs are float32 sums: differences of them are good to about 1e-3
        assert float(grad[which]) == pytest.approx(float(slope), rel=0.02, abs=5e-3)


def test_every_matrix_of_a_transformer_lens_model(dense_model, marks, random_tokens):
    """Norm weights come after its hooks, and its weights may be views of joint or turned ones."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in dense_model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise)
    it = Setting(dense_model, marks, random_tokens, random_values=True)
    assert set(it.edges["matrix"]) == {matrix for matrix, _, _ in MATRICES}
    assert torch.equal(it.gated([True] * len(it.edges)), it.ablated(it.kept))
    for site in SOURCES:
        nodes, edges = it.some(site, 0)
        fewer = it.kept.clone()
        fewer[nodes] = False
        got, expected = it.gated(without(len(it.edges), edges["source"])), it.ablated(fewer)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert (expected - it.ablated(it.kept)).abs().max() > 0.02


def test_a_model_without_a_place_for_constants_is_refused(small_model, marks, random_tokens):
    model = small_model("plain")
    index = NodeIndex.of(model)
    kept = torch.ones(index.n_nodes, dtype=torch.bool)
    edges = circuit_edges(model, index, kept)
    bias = model.blocks[1].mlp.b_in
    model.blocks[1].mlp._parameters["b_in"] = None
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp has no b_in"):
        locate(model, index, edges, torch.ones(index.n_nodes))
    found = locate(model, index, edges, torch.zeros(index.n_nodes))  # nothing is left behind
    assert not found.constant.any()
    model.blocks[1].mlp._parameters["b_in"] = bias
