"""Imports between rooms point down, and no modules import each other in a circle."""

from pathlib import Path

import pytest

from tests.rooms import PACKAGE, ROOMS, arrows_up, circles, import_graph


@pytest.fixture
def package(tmp_path: Path):
    """``package({"model/a.py": "import ..."})``: a small package with the same rooms."""

    def write(files: dict[str, str]) -> Path:
        root = tmp_path / "tl_sparse"
        for name, text in {"__init__.py": "", **files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return write


def test_no_room_imports_one_above_it():
    assert arrows_up(import_graph()) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(import_graph()) == []


def test_every_room_has_a_place_in_the_order():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} <= set(ROOMS)


@pytest.mark.parametrize(
    "text",
    [
        "from tl_sparse.circuits.b import x",
        "import tl_sparse.circuits.b",
        "from ..circuits import b",
        "def f():\n    from tl_sparse.circuits import b",
        "from typing import TYPE_CHECKING as T\nif T:\n    from tl_sparse.circuits.b import x",
    ],
)
def test_an_arrow_up_is_found_wherever_it_hides(package, text):
    root = package({"model/__init__.py": "", "model/a.py": text, "circuits/__init__.py": "",
                    "circuits/b.py": "x = 1"})  # fmt: skip
    (found,) = arrows_up(import_graph(root))
    assert found.startswith("tl_sparse.model.a imports tl_sparse.circuits")


def test_an_import_of_the_whole_package_is_an_arrow_up(package):
    root = package({"model/__init__.py": "", "model/a.py": "import tl_sparse"})
    assert arrows_up(import_graph(root)) == ["tl_sparse.model.a imports tl_sparse"]


def test_a_circle_is_found_though_one_of_its_imports_is_lazy(package):
    root = package({"model/__init__.py": "", "model/a.py": "from tl_sparse.model import b",
                    "model/b.py": "def f():\n    from tl_sparse.model.a import y"})  # fmt: skip
    assert circles(import_graph(root)) == [["tl_sparse.model.a", "tl_sparse.model.b"]]


def test_a_room_without_a_place_is_found(package):
    root = package({"attic.py": ""})
    assert arrows_up(import_graph(root)) == ["attic has no place among the rooms"]
