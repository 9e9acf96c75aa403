"""``import tl_sparse`` brings nothing heavy; its names bring what they need when they are used."""

import contextlib
import gc
import subprocess
import sys

import pytest

from tl_sparse.imports import without_collection

HEAVY = {"accelerate", "datasets", "networkx", "optuna", "plotly", "scipy", "sklearn", "sqlalchemy"}


def imported(statement: str) -> set[str]:
    """Top-level packages in a fresh process after an import."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_imports_no_library():
    ours = imported("import tl_sparse; tl_sparse.__version__; dir(tl_sparse)")
    assert "tl_sparse" in ours
    assert not ours & (HEAVY | {"torch", "numpy", "pandas", "transformers", "transformer_lens"})


def test_a_name_of_the_package_imports_no_heavy_library_before_it_is_used():
    ours = imported("from tl_sparse import *")
    assert {"tl_sparse", "transformer_lens"} <= ours
    # TransformerLens brings some of them itself, which of them depends on its version
    assert not (ours & HEAVY) - imported("import transformer_lens")


def test_every_public_name_is_there_and_the_collector_runs_on():
    import tl_sparse

    assert {"prune", "evaluate", "SparseTransformer", "tasks", "Circuit"} <= set(tl_sparse.__all__)
    for name in tl_sparse.__all__:
        assert getattr(tl_sparse, name) is not None
    assert gc.isenabled()
    assert tl_sparse.prune.__module__ == "tl_sparse.circuits.pruning"
    with pytest.raises(AttributeError, match="tl_sparse attribute prun"):
        tl_sparse.prun  # noqa: B018


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_meanwhile_and_afterwards_all_is_as_it_was(on):
    was = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with contextlib.suppress(ImportError), without_collection():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()
