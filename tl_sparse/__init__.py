"""Weight-sparse transformers and their circuits, as a plugin to TransformerLens.

The public names are listed in ``__init__.pyi``. Each is imported when it is first used, so that a
script, a command or another process pays only for what it needs.
"""

from importlib.metadata import version

import lazy_loader

from tl_sparse.imports import without_collection

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("tl-sparse")


def __getattr__(name: str) -> object:
    with without_collection():
        return _load(name)
