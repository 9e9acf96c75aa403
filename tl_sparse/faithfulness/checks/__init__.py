"""The checks of the faithfulness suite: one file a check, found by its name.

A file here is a check if it holds ``CHECK``, a :class:`~tl_sparse.faithfulness.registry.Check`.
No other file has to change.
"""

from __future__ import annotations

import pkgutil


def check_names() -> tuple[str, ...]:
    """Names of all checks, without importing any."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
