"""``changed``: a model's weights changed inside a block, and put back after it.

Blocks on one model may overlap and end in any order. A model's weights are then always what they
were before the first block, with the changes of all blocks that are open; so no block can put back
what another one wrote.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Edit = Callable[[Mapping[str, Tensor]], None]
"""Changes some tensors, given by name, in place."""


class WeightsLost(RuntimeError):
    """Weights were changed inside a block, and these changes could not be kept."""


@dataclass(eq=False)
class Changes:
    """What is changed in one model now."""

    thread: int = field(default_factory=threading.get_ident)
    """The thread whose blocks are open."""
    before: dict[str, Tensor] = field(default_factory=dict)
    """The changed tensors as they were before the first block."""
    edits: list[tuple[frozenset[str], Edit]] = field(default_factory=list)
    """Names of the tensors, and what is done to them, for each open block."""

    def values(self) -> dict[str, Tensor]:
        """The tensors as the open blocks have them."""
        found = {name: tensor.clone() for name, tensor in self.before.items()}
        for _, edit in self.edits:
            edit(found)
        return found


# Not an attribute of the model: copies made inside a block are models of their own.
_CHANGES: WeakKeyDictionary[nn.Module, Changes] = WeakKeyDictionary()
_LOCK = threading.RLock()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: absent biases are buffers in some models."""
    return dict(model.named_buffers()) | dict(model.named_parameters())


@contextmanager
def changed(model: nn.Module, names: Collection[str], edit: Edit) -> Iterator[None]:
    """Change a model's tensors inside the block; afterwards they are what they were, to the bit.

    That holds where the model is moved or cast inside (a cast weight comes back as the cast of what
    it was), and where an exception ends the block. A copy of the model made inside stays as it is.

    Args:
        model: The model.
        names: The tensors that change, as in ``named_parameters`` and ``named_buffers``.
        edit: Changes them in place: it gets copies, on the device and in the dtype that they had
            before the first block.

    Raises:
        WeightsLost: the tensors were changed inside the block by something else, such as training
            or ``load_state_dict``. They are what they were before it all the same.
        RuntimeError: blocks of another thread are open on this model.
    """
    block = (frozenset(names), edit)
    enter(model, block)
    try:
        yield
    except BaseException as error:
        if lost := leave(model, block):
            error.add_note(told(lost))
        raise
    if lost := leave(model, block):
        raise WeightsLost(told(lost))


@torch.no_grad()
def enter(model: nn.Module, block: tuple[frozenset[str], Edit]) -> None:
    """Open a block."""
    with _LOCK:
        changes = _CHANGES.get(model) or Changes()
        if changes.thread != threading.get_ident():
            raise RuntimeError(
                "another thread has changed this model's weights for a while, and its results "
                "would be of both changes: give each thread a copy.deepcopy of the model"
            )
        if lost := differing(model, changes.values()):
            raise WeightsLost(told(lost))
        live = tensors_of(model)
        fresh = {name: live[name].detach().clone() for name in block[0] - set(changes.before)}
        opened = Changes(changes.thread, changes.before | fresh, [*changes.edits, block])
        write(live, opened.values())
        _CHANGES[model] = opened


@torch.no_grad()
def leave(model: nn.Module, block: tuple[frozenset[str], Edit]) -> list[str]:
    """Close a block; returns the names of tensors in which something else was changed."""
    with _LOCK:
        changes = _CHANGES[model]
        lost = differing(model, changes.values())
        changes.edits.remove(block)
        write(tensors_of(model), changes.values())
        open_still = {name for names, _ in changes.edits for name in names}
        changes.before = {name: changes.before[name] for name in open_still}
        if not changes.edits:
            del _CHANGES[model]
        return lost


def differing(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that the model has no longer, or that are not these values, cast."""
    live = tensors_of(model)
    return [
        name for name, value in values.items()
        if name not in live or live[name].shape != value.shape
        or not torch.equal(live[name].nan_to_num(), value.to(live[name]).nan_to_num())
    ]  # fmt: skip


def write(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into a model's tensors of the same names and shapes."""
    for name, value in values.items():
        if name in live and live[name].shape == value.shape:
            live[name].copy_(value)


def told(lost: Collection[str]) -> str:
    """What is lost, in words."""
    return (
        f"{', '.join(sorted(lost))}: changed inside a block that puts weights back at its end (by "
        "training, load_state_dict, or a cast to lower precision and back). These changes are "
        "lost: the weights are what they were before the block. Make them outside of it; to train "
        "with weights held at zero, use WeightMasks.attach or WeightProjector"
    )
