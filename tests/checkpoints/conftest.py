"""Folders in the format of openai/circuit_sparsity, free to be broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def openai(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the reference model."""
    source = request.config.rootpath / "tests" / "reference" / "yolo_like"
    return shutil.copytree(source, tmp_path / "yolo_like")


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(folder, config=f, state=g)`` applies functions to a folder's config and tensors."""

    def change(folder: Path, *, config: Any = None, state: Any = None) -> None:
        if config is not None:
            path = folder / "beeg_config.json"
            values = json.loads(path.read_text())
            config(values)
            path.write_text(json.dumps(values))
        if state is not None:
            tensors = torch.load(folder / "final_model.pt", weights_only=True)
            state(tensors)
            torch.save(tensors, folder / "final_model.pt")

    return change


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(config, state)``: a new folder with these two files."""

    def new(config: dict[str, Any], state: dict[str, torch.Tensor], name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "beeg_config.json").write_text(json.dumps(config))
        torch.save(state, folder / "final_model.pt")
        return folder

    return new
