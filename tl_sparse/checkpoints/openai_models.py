"""The released models by name: which there are, what is known of them, and where they lie.

Source: the server's list and the models' own beeg_config.json as far as they could be read, else
what users of the models report; the column ``source`` says which.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from tl_sparse.checkpoints.openai_config import LOCATIONS
from tl_sparse.checkpoints.openai_listing import listed
from tl_sparse.checkpoints.openai_weights import layout
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.views.display import frame_html

BASE = "https://openaipublic.blob.core.windows.net/circuit-sparsity"
"""Where OpenAI keeps the released files."""
BASE_VARIABLE = "TL_SPARSE_OPENAI_URL"
"""Environment variable for other places: addresses or folders, separated by blanks, tried in
turn."""
FOLDERS = ("models", "viz", "train_curves", "tinypython")
"""What lies directly below the base."""
SWEEP = re.compile(
    r"csp_sweep1_(1|2|4|8|16)x_(0\.9|1\.9|3\.7|7\.4|14\.8)Mnonzero"
    r"_afrac(0\.062|0\.125|0\.250|0\.500|1\.000)"
)
"""Names of the grid of models that vary width, nonzero weights and afrac; not all exist."""
ALIASES = {"csp_bridge1": "csp_bridges1", "csp_bridge2": "csp_bridges2"}
"""Names in OpenAI's README, and those on the server."""
EMPTY = "0 bytes on the server (January 2026)"
FAULTS = {
    ("csp_bridges1", "final_model.pt"): "a zip archive without its directory on the server "
    "(January 2026)",
    ("csp_bridges1", "final_bridges.pt"): EMPTY,
    ("csp_bridges2", "final_bridges.pt"): EMPTY,
}
"""Files that users found broken on the server itself."""
EIGHT, SIX = ",".join(LOCATIONS[:8]), "attn_in,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"


@dataclass(frozen=True)
class ReleasedModel:
    """What is known of a released model; None: not known. Sizes in OpenAI's words."""

    name: str
    """Its folder below ``models/`` on the server."""
    n_layer: int | None = None
    d_model: int | None = None
    n_head: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    afrac: float | None = None
    """Share of channels that AbsTopK keeps; 1 where there is none."""
    afrac_loctypes: str | None = None
    """Where it stands."""
    sink: bool | None = None
    bigram: str | None = None
    """``learned`` or ``frozen``."""
    positions: str | None = None
    """``added``, or ``beside``: read as channels of their own."""
    d_pos: int = 0
    """How many."""
    source: str = "file"
    """``file``: its config was read; ``users``: they say so; ``derived`` from other facts."""
    note: str = ""
    """What is wrong with its files, or what else to know."""

    @property
    def parameters(self) -> int | None:
        """Numbers in final_model.pt, by the sizes; None where these are not all known."""
        sizes = (self.n_layer, self.d_model, self.n_head, self.d_head, self.d_mlp, self.bigram)
        if None in sizes:
            return None
        config = SparseTransformerConfig(
            n_layers=self.n_layer or 0, d_model=self.d_model or 0, n_heads=self.n_head,
            d_head=self.d_head or 0, d_mlp=self.d_mlp, n_ctx=1024, d_vocab=2048, d_pos=self.d_pos,
            positional_embedding_type="concat" if self.d_pos else "standard",
            use_attention_sinks=bool(self.sink), bigram_table="learned",
        )  # fmt: skip
        return sum(math.prod(entry.shape) for entry in layout(config))


RELEASED = (
    ReleasedModel("csp_yolo1", 12, 1024, 128, 8, 4096, sink=False, bigram="learned",
                  positions="added", source="derived", note="the quotes circuit"),
    ReleasedModel("csp_yolo2", 8, 2048, 128, 16, 8192, 0.25, EIGHT, True, "learned", "beside", 32,
                  note="the bracket circuits; openai/circuit-sparsity on the Hub"),
    ReleasedModel("csp_bridges1", 4, 2048, 128, 16, 8192, 0.125, EIGHT, False, "frozen", "added",
                  note="final_model.pt and final_bridges.pt broken on the server (January 2026)"),
    ReleasedModel("csp_bridges2", 4, 2048, 128, 16, 8192, 0.125, EIGHT, False, "frozen", "added",
                  note="final_bridges.pt broken on the server (January 2026)"),
    ReleasedModel("csp_sweep1_1x_0.9Mnonzero_afrac0.125", 8, 256, 16, 16, 1024, 0.125, SIX, False,
                  "learned", "added", note="one of a grid of sweep models"),
    ReleasedModel("csp_sweep1_2x_1.9Mnonzero_afrac0.125", 8, 512, 32, 16, 2048, 0.125, SIX, False,
                  "learned", "added", note="one of a grid of sweep models"),
    ReleasedModel("dense1_1x", 4, 256, 16, 16, 1024, 1.0, "", False, "learned", "added",
                  source="users"),
    ReleasedModel("dense1_2x", None, 512, afrac=1.0, afrac_loctypes="", sink=False,
                  source="users"),
    ReleasedModel("dense1_4x", 4, 1024, 64, 16, 4096, 1.0, "", False, "learned", "added"),
)  # fmt: skip
"""Names known by heart; ``SWEEP`` says what the others are called."""


@dataclass(frozen=True)
class OpenAIModels:
    """The released models; a table with :meth:`to_dataframe`."""

    known: tuple[ReleasedModel, ...] = RELEASED
    """What this package knows of."""
    listed: Mapping[str, Mapping[str, int]] | None = field(default=None, repr=False)
    """What the server lists: for each model its files and their sizes in bytes; None: not asked."""

    @property
    def names(self) -> tuple[str, ...]:
        """What ``SparseTransformer.from_openai`` takes: names known, then others on the server."""
        return tuple(dict.fromkeys([*(m.name for m in self.known), *(self.listed or {})]))

    def to_dataframe(self) -> pd.DataFrame:
        """A row per model: name, n_layer, d_model, n_head, d_head, d_mlp, afrac, afrac_loctypes,
        sink, bigram, positions, parameters, megabytes (10^6 bytes, by the sizes), source, note.

        If the server was asked, also ``on_server`` (10^6 bytes of all files there; missing: it has
        none) and ``files``.
        """
        known = {model.name: model for model in self.known}
        rows = []
        for name in self.names:
            model = known.get(name, ReleasedModel(name, source=""))
            row = asdict(model)
            del row["d_pos"]
            count = model.parameters
            facts = {"parameters": count, "megabytes": None if count is None else count * 4 / 1e6}
            row = {k: v for k, v in row.items() if k not in ("source", "note")} | facts | {
                "source": model.source, "note": model.note,
            }  # fmt: skip
            if self.listed is not None:
                files = self.listed.get(name, {})
                row["on_server"] = sum(files.values()) / 1e6 if files else None
                row["files"] = ", ".join(files)
            rows.append(row)
        frame = pd.DataFrame(rows)
        counts = ["n_layer", "d_model", "n_head", "d_head", "d_mlp", "parameters"]
        return frame.astype(dict.fromkeys(counts, "Int64"))

    def __repr__(self) -> str:
        server = "" if self.listed is None else f", {len(self.listed)} of them on the server"
        return f"OpenAIModels({len(self.names)} released models{server}: {', '.join(self.names)})"

    def _repr_html_(self) -> str:
        line = f"{len(self.names)} models; load one with SparseTransformer.from_openai(name)"
        return frame_html("OpenAI's released models", line, self.to_dataframe())


def openai_models(
    online: bool = False, base_url: str | Sequence[str] | None = None
) -> OpenAIModels:
    """OpenAI's released models: what is known of them, and with ``online`` what the server lists.

    Args:
        online: whether to ask the server which models and files it has; without it nothing is
            fetched.
        base_url: where to ask, as in ``SparseTransformer.from_openai``.

    Raises:
        FileNotFoundError: no server answers.
        ValueError: what it answers is no list.
    """
    if not online:
        return OpenAIModels()
    found: dict[str, dict[str, int]] = {}
    for path, size in listed(bases(base_url), "models/").items():
        _, model, *rest = path.split("/", 2)
        if rest and rest[0]:
            found.setdefault(model, {})[rest[0]] = size
    return OpenAIModels(listed=found)


# --------------------------------------------------------------------------------------------------
# from names to places


def bases(base_url: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Where released files are looked for: addresses or folders, in turn.

    Those given, else those of ``$TL_SPARSE_OPENAI_URL``, else OpenAI's.
    """
    given = [base_url] if isinstance(base_url, str | Path) else list(base_url or ())
    named = [str(base) for base in given if str(base)] or os.environ.get(BASE_VARIABLE, "").split()
    return tuple(base.rstrip("/") for base in named or [BASE])


def released_name(name: str) -> str | None:
    """The server's name of a model that was released, or may have been; None: there is none."""
    name = ALIASES.get(name, name)
    known = any(model.name == name for model in RELEASED) or SWEEP.fullmatch(name)
    return name if known else None


def places(place: str | Path, base_url: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Folders or addresses that a place stands for, in the order in which they are tried.

    Args:
        place: a folder, an address, a released model's name, or a path below the base such as
            ``viz/csp_yolo1/single_double_quote/prune_v2/64``.
        base_url: see :func:`bases`; where one is set, any name is looked for there.

    Raises:
        FileNotFoundError: it is none of these; the message says what there is.
        ValueError: an address that is neither http nor https.
    """
    text = str(place)
    if not isinstance(place, str) or os.path.isdir(place):
        return (text,)
    if "://" in place:
        return (address(place),)
    below = place.split("/")[0] in FOLDERS
    if not below and (re.search(r"[/\\\0]", place) or place.startswith((".", "~"))):
        return (text,)
    own = base_url is not None or bool(os.environ.get(BASE_VARIABLE))
    name = place if below else released_name(place) or (place if own and place else None)
    if name is None:
        names = [model.name for model in RELEASED]
        near = difflib.get_close_matches(place, [*names, *ALIASES], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FileNotFoundError(
            f"{text!r:.100} is neither a folder here nor a released model{hint}; released are "
            f"{', '.join(names)}, and more of the form of the two csp_sweep1 models"
        )
    path = name.strip("/") if below else f"models/{name}"
    return tuple(
        f"{address(base)}/{path}" if "://" in base else str(Path(base).expanduser() / path)
        for base in bases(base_url)
    )


def address(text: str) -> str:
    """An address without slashes at its end; ValueError unless it is http or https."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"{text} is no http or https address; choose one of these, or a folder")
    return text.rstrip("/")


def known_fault(place: str | Path, name: str) -> str:
    """What users found wrong with a file on OpenAI's server itself; empty if nothing."""
    model = str(place).rstrip("/").rpartition("/")[2]
    fault = FAULTS.get((ALIASES.get(model, model), name), "")
    return f"; this file of {model} was {fault}" if fault else ""
