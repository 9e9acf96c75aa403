"""A circuit's nodes, edges and activations as plain tables, for other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_sparse.ablation.recording import kept_activations
from tl_sparse.circuits.circuit import Circuit
from tl_sparse.node import released_names
from tl_sparse.storage.atomic_write import atomic_folder
from tl_sparse.storage.json_files import plain
from tl_sparse.tasks.padding import real_positions
from tl_sparse.views.display import frame_html

FORMAT_VERSION = 1
ABOUT = "about.json"


@dataclass(frozen=True, eq=False, repr=False)
class NodeActivations:
    """The activation of every kept node of a circuit at every token of some prompts."""

    circuit: Circuit
    """The circuit."""
    tokens: Int[Tensor, "prompt pos"]
    """The prompts."""
    last: Int[Tensor, " prompt"]
    """Place of each prompt's last token; what follows is padding."""
    values: Float[Tensor, "node prompt pos"]
    """Activations in the order of ``circuit.nodes``."""
    alone: bool
    """Whether everything outside the circuit was ablated; otherwise in the full model."""

    def to_dataframe(self) -> pd.DataFrame:
        """A row per node, prompt and token: name, ours, prompt, position, token, activation."""
        names = names_of(self.circuit.nodes)
        prompt, position = (part.numpy() for part in torch.nonzero(self.real, as_tuple=True))
        count = len(prompt)
        return pd.DataFrame(
            {
                **{column: names[column].repeat(count).to_numpy() for column in names},
                "prompt": np.tile(prompt, len(names)),
                "position": np.tile(position, len(names)),
                "token": np.tile(self.tokens[self.real].numpy(), len(names)),
                "activation": self.values[:, self.real].flatten().numpy(),
            }
        )

    @property
    def real(self) -> Tensor:
        """[prompt, pos]: True at tokens, False at padding."""
        return real_positions(self.tokens.shape[1], self.last)

    def __repr__(self) -> str:
        where = "the circuit alone" if self.alone else "the full model"
        return (
            f"NodeActivations({len(self.values)} nodes of {self.circuit.task!r} on "
            f"{len(self.tokens)} prompts, in {where})"
        )

    def _repr_html_(self) -> str:
        inside = self.values.where(self.real, torch.nan).flatten(1)
        table = names_of(self.circuit.nodes).assign(
            mean=inside.nanmean(1).numpy(),
            least=inside.nan_to_num(torch.inf).amin(1).numpy(),
            most=inside.nan_to_num(-torch.inf).amax(1).numpy(),
        )
        return frame_html(self.circuit.task, repr(self), table.reset_index(drop=True))


def node_activations(
    circuit: Circuit,
    model: nn.Module,
    tokens: Int[Tensor, "prompt pos"],
    last: Int[Tensor, " prompt"] | None = None,
    alone: bool = True,
    batch_size: int = 64,
) -> NodeActivations:
    """Record a circuit's kept nodes on some prompts.

    Args:
        circuit: The circuit.
        model: Its model.
        tokens: The prompts, such as a ``TaskBatch``'s tokens.
        last: Place of each prompt's last token, where they are padded on the right.
        alone: Whether everything outside the circuit is ablated meanwhile.
        batch_size: Prompts of one forward pass.

    Raises:
        ValueError: another model than the circuit's, no tokens, a ``last`` that is no place in its
            prompt, or a circuit whose hooks depend on the prompts (see ``Circuit.hooks``) with
            ``alone``.
    """
    circuit.check_model(model)
    if last is None:
        last = torch.full((len(tokens),), tokens.shape[1] - 1)
    if last.shape != tokens.shape[:1] or bool(((last < 0) | (last >= tokens.shape[1])).any()):
        raise ValueError(f"last must be a place in each of the {len(tokens)} prompts, from 0 to "
                         f"{tokens.shape[1] - 1}")  # fmt: skip
    with circuit.applied(model) if alone else nullcontext():
        values = kept_activations(model, tokens, circuit.index, circuit.kept, batch_size)
    return NodeActivations(circuit, tokens.cpu(), last.cpu(), values, alone)


def names_of(nodes: pd.DataFrame) -> pd.DataFrame:
    """OpenAI's name and ours of the nodes in a table with layer, site and channel."""
    return pd.DataFrame({"name": nodes["name"], "ours": our_names(nodes, "site", "channel")})


def our_names(table: pd.DataFrame, site: str, channel: str) -> pd.Series:
    """``layer.site.channel``, as ``Node`` reads it."""
    parts = [table[column].astype(str) for column in ("layer", site, channel)]
    return parts[0] + "." + parts[1] + "." + parts[2]


def node_table(circuit: Circuit) -> pd.DataFrame:
    """The circuit's nodes with both names first."""
    nodes = circuit.nodes
    return pd.concat([names_of(nodes), nodes.drop(columns="name")], axis=1).reset_index(drop=True)


def edge_table(edges: pd.DataFrame) -> pd.DataFrame:
    """A circuit's edges with both names of their ends first."""
    named = pd.DataFrame(index=edges.index)
    for end in ("source", "target"):
        site = f"{end}_site"
        named[f"{end}_name"] = released_names(edges["layer"], edges[site], edges[end])
        named[f"{end}_ours"] = our_names(edges, site, end)
    return pd.concat([named, edges], axis=1).reset_index(drop=True)


def export_circuit(
    circuit: Circuit,
    folder: str | Path,
    format: str = "parquet",
    activations: NodeActivations | None = None,
) -> None:
    """Write a circuit as tables with OpenAI's names (``4.attn.act_in:1249``) and ours.

    ``nodes``, ``edges``, where edges were pruned ``removed_edges``, and with ``activations`` those,
    a file each; and ``about.json``: task, model, means, losses (nats per prompt), counts. Parquet
    keeps every number to the bit; CSV and JSON write the shortest text that reads back as the same
    number. A missing number is empty in CSV and null in JSON. The folder appears when it is
    complete; to read a circuit back as a :class:`Circuit`, use ``circuit.save``.

    Args:
        circuit: The circuit.
        folder: Where to; an earlier export there is replaced.
        format: "parquet", "csv" or "json" (a list of rows).
        activations: What :func:`node_activations` recorded of this circuit.

    Raises:
        ImportError: "parquet" without pyarrow.
        ValueError: another format, or activations of another circuit.
        OSError: there is no room for it on the disk.
    """
    if format not in WRITERS:
        raise ValueError(f"format={format!r} is unknown; choose from {', '.join(WRITERS)}")
    check_activations(circuit, activations)
    tables = {"nodes": node_table(circuit), "edges": edge_table(circuit.edges)}
    if len(circuit.removed_edges):
        tables["removed_edges"] = edge_table(circuit.removed_edges)
    if activations is not None:
        tables["activations"] = activations.to_dataframe()
    with atomic_folder(folder) as work:
        for name, table in tables.items():
            WRITERS[format](table, work / f"{name}.{format}")
        text = json.dumps(plain(about(circuit)), indent=1, allow_nan=False)
        (work / ABOUT).write_text(text, encoding="utf-8")


def check_activations(circuit: Circuit, activations: NodeActivations | None) -> None:
    """ValueError for activations of another circuit."""
    if activations is not None and activations.circuit is not circuit:
        of = activations.circuit
        if of.model_fingerprint != circuit.model_fingerprint or not torch.equal(
            of.kept.cpu(), circuit.kept.cpu()
        ):
            raise ValueError("the activations are of another circuit: record them with "
                             "node_activations(circuit, model, tokens)")  # fmt: skip


def about(circuit: Circuit) -> dict[str, Any]:
    """What is known of a circuit as a whole."""
    means = circuit.means
    return {
        "format_version": FORMAT_VERSION,
        "tl_sparse_version": version("tl-sparse"),
        "task": circuit.task,
        "model_name": circuit.model_name,
        "model_fingerprint": circuit.model_fingerprint,
        "n_nodes": circuit.n_nodes,
        "n_edges": circuit.n_edges,
        "units": "losses in nats per prompt",
        **{name: getattr(circuit, name) for name in
           ("loss", "loss_calibrated", "accuracy", "selection_loss", "model_loss", "target_loss",
            "seed")},
        "calibration": None if circuit.calibration is None else asdict(circuit.calibration),
        "means": repr(means),
        "config": dict(circuit.config),
    }  # fmt: skip


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """A table as Parquet, its numbers of the types that they are of."""
    try:
        import_module("pyarrow")  # what pandas writes it with
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow, or choose "
                          "format='csv' or 'json'") from error  # fmt: skip
    table.to_parquet(path, engine="pyarrow", index=False)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """A table as CSV in UTF-8."""
    table.to_csv(path, index=False, lineterminator="\n")


def write_json(table: pd.DataFrame, path: Path) -> None:
    """A table as a JSON list of rows; what is missing or not finite is null."""
    table = table.replace([math.inf, -math.inf], math.nan)
    whole = table.astype(object).where(table.notna(), None)
    rows = (dict(zip(whole.columns, row, strict=True)) for row in whole.itertuples(index=False))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("[")
        for i, row in enumerate(rows):
            file.write("\n" if i == 0 else ",\n")
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, default=number))
        file.write("\n]\n")


def number(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item()


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    "parquet": write_parquet, "csv": write_csv, "json": write_json,
}  # fmt: skip
