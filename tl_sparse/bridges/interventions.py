"""What a bridged pair does to its dense model by nodes of its sparse one, as methods."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation import FwdHook
from tl_sparse.bridges.bridged_dense import BridgedDense
from tl_sparse.bridges.bridges import Bridges
from tl_sparse.bridges.dense_circuit import DenseCircuit, dense_circuit
from tl_sparse.bridges.reading import ablate, patch
from tl_sparse.bridges.steering import steer
from tl_sparse.circuits import Circuit
from tl_sparse.node import Nodes
from tl_sparse.nodes.prompts import Prompts, PromptsLike


class InterventionMixin:
    """Methods of :class:`~tl_sparse.bridges.BridgedPair`; each is the function of its name."""

    dense: nn.Module
    sparse: nn.Module
    bridges: Bridges

    def steer(
        self,
        nodes: Nodes,
        counterfactual: PromptsLike | Prompts | None,
        presented: PromptsLike | Prompts,
        strength: float = 1.0,
        **options: Any,
    ) -> list[FwdHook]:
        """Hooks on the dense model that move nodes of the sparse one towards what they are on other
        prompts; see :func:`~tl_sparse.bridges.steer`."""
        return steer(self, nodes, counterfactual, presented, strength, **options)

    def ablate(
        self,
        nodes: Nodes,
        text: PromptsLike | Prompts,
        values: float | Float[Tensor, " node"] | None = None,
    ) -> list[FwdHook]:
        """Hooks on the dense model that set nodes of the sparse one to fixed values there; see
        :func:`~tl_sparse.bridges.ablate`."""
        return ablate(self, nodes, text, values)

    def patch(
        self,
        nodes: Nodes,
        counterfactual: PromptsLike | Prompts | None,
        presented: PromptsLike | Prompts,
        **options: Any,
    ) -> list[FwdHook]:
        """Hooks on the dense model that set nodes of the sparse one to what the dense model itself
        has on other prompts; see :func:`~tl_sparse.bridges.patch`."""
        return patch(self, nodes, counterfactual, presented, **options)

    def bridged_dense(self, reference: PromptsLike | Prompts) -> BridgedDense:
        """The dense model with the sparse one's nodes as hook points; see
        :class:`~tl_sparse.bridges.BridgedDense`."""
        return BridgedDense(self, reference)

    def dense_circuit(
        self, circuit: Circuit, tokens: Int[Tensor, "sequence pos"], **options: Any
    ) -> DenseCircuit:
        """What a circuit of the sparse model names in the dense one; see
        :func:`~tl_sparse.bridges.dense_circuit`."""
        return dense_circuit(self, circuit, tokens, **options)
