"""The command about released models: fetch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tl_sparse.checkpoints.openai import HUB
from tl_sparse.checkpoints.openai_files import fetch_model
from tl_sparse.checkpoints.openai_models import openai_models
from tl_sparse.cli.inputs import say
from tl_sparse.storage.hub import find_model


@dataclass(frozen=True)
class Fetch:
    """Fetch one of OpenAI's released models, its tokenizer too; with --list, say which there are.

    A download that broke off goes on where it stopped; a model that is there is checked against
    its manifest (sizes, SHA-256), and what differs is fetched anew.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
    """A released model's name, an address, or hf:owner/name."""
    out: str | None = None
    """Folder to write it to, for SparseTransformer.from_openai; default the cache."""
    list_models: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Say which models there are."""
    online: bool = False
    """With --list: ask the server."""
    files: tuple[str, ...] = ()
    """Further files of the model, such as final_bridges.pt."""
    base_url: str | None = None
    """Where names are looked for instead of OpenAI's server (or $TL_SPARSE_OPENAI_URL)."""

    def run(self) -> None:
        """Fetch it and say where it is, or say the list."""
        if self.list_models:
            table = openai_models(self.online, self.base_url).to_dataframe()
            say(table.dropna(axis="columns", how="all").to_string(index=False, na_rep="?"))
        if self.name is None:
            if not self.list_models:
                raise ValueError("say which model to fetch; --list says which there are")
        elif self.name.startswith(HUB):
            if self.out is not None or self.files:
                raise ValueError(
                    "a model of the Hub stays in the Hub's cache: no --out, no --files"
                )
            name, _, revision = self.name.removeprefix(HUB).partition("@")
            say(str(find_model(name, revision or None)))
        else:
            out = None if self.out is None else Path(self.out)
            say(str(fetch_model(self.name, out, self.files, self.base_url)))
