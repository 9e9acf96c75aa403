"""The picture at the top of README: the quote circuit of the bundled sparse model.

    python benchmarks/readme_picture.py

Writes docs/images/quote_circuit.svg from the circuit that notebook 01 reads.
"""

from __future__ import annotations

from pathlib import Path

import tl_sparse as tls
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.views import circuit_svg

ROOT = Path(__file__).parents[1]


def picture() -> str:
    """The drawing, as SVG."""
    model = tls.SparseTransformer.from_pretrained("python-sparse")
    circuit = tls.Circuit.load(ROOT / "notebooks" / "quote_circuit", model)
    return circuit_svg(circuit.table(), tooltips=False)


if __name__ == "__main__":
    place = ROOT / "docs" / "images" / "quote_circuit.svg"
    place.parent.mkdir(exist_ok=True)
    write_atomic(place, picture())
    print(place)
