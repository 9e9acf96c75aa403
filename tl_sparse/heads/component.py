"""``Component``: what a code stands for, such as an attention head; ``Edge``: two of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

Kind = Literal["head", "mlp", "q", "k", "v"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ComponentName: TypeAlias = "Component | str | tuple[int, int]"
"""A component, its name, or (layer, head)."""
_NAME = re.compile(r"L(?P<layer>\d+)H(?P<head>\d+)(?:\.(?P<part>[qkv]))?|(?P<mlp>\d+)\.mlp")


@dataclass(frozen=True, order=True)
class Component:
    """One output of a model that gets a code for every prompt."""

    layer: int
    """Its layer."""
    kind: Kind = "head"
    """A head's contribution to the residual stream, an MLP's, or a head's query, key or value."""
    head: int | None = None
    """Number of the head, or, of a key or value that several heads share, of these; None of an
    MLP."""

    def __str__(self) -> str:
        """Its name: ``L9H6``, ``L9H6.q``, ``4.mlp``."""
        if self.head is None:
            return f"{self.layer}.{self.kind}"
        return f"L{self.layer}H{self.head}" + ("" if self.kind == "head" else f".{self.kind}")

    @classmethod
    def of(cls, name: ComponentName) -> Component:
        """The component of a name, or of (layer, head).

        Raises:
            ValueError: it is no name of one.
        """
        if isinstance(name, Component):
            return name
        if isinstance(name, str):
            if (found := _NAME.fullmatch(name.strip())) is None:
                raise ValueError(
                    f"{name!r:.80} is no component: write a head as 'L9H6' or (9, 6), its parts as "
                    "'L9H6.q', an MLP as '4.mlp'"
                )
            if found["mlp"]:
                return cls(int(found["mlp"]), "mlp")
            part = cast(Kind, found["part"] or "head")
            return cls(int(found["layer"]), part, int(found["head"]))
        layer, head = name
        return cls(int(layer), "head", int(head))


@dataclass(frozen=True, order=True)
class Edge:
    """A component and one in a later layer, of which the first tells the second something."""

    source: Component
    """The earlier one."""
    target: Component
    """The later one."""

    def __str__(self) -> str:
        """Its name: ``L4H11→L5H5``."""
        return f"{self.source}→{self.target}"


def places(names: Iterable[ComponentName], components: Sequence[Component]) -> list[int]:
    """Where these stand among components.

    Raises:
        ValueError: one that is not among them.
    """
    at = {component: i for i, component in enumerate(components)}
    wanted = [Component.of(name) for name in names]
    if absent := [str(component) for component in wanted if component not in at]:
        raise ValueError(
            f"{', '.join(absent)}: not among the {len(components)} components "
            f"{components[0]} to {components[-1]}"
        )
    return [at[component] for component in wanted]
