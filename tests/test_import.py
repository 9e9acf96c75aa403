"""``import tl_sparse`` brings little more than ``import transformer_lens``."""

import subprocess
import sys

HEAVY = {"accelerate", "datasets", "networkx", "optuna", "plotly", "scipy", "sklearn", "sqlalchemy"}


def imported(statement: str) -> set[str]:
    """Top-level packages in a fresh process after an import."""
    code = f"{statement}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_imports_no_heavy_library_before_it_is_used():
    ours = imported("import tl_sparse")
    assert {"tl_sparse", "transformer_lens"} <= ours
    # TransformerLens brings some of them itself, which of them depends on its version
    assert not (ours & HEAVY) - imported("import transformer_lens")
