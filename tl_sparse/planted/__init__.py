"""Models written by hand, whose circuits are known by construction."""

from tl_sparse.planted.compiled_programs import compiled as compiled
from tl_sparse.planted.component_edges import component_edges as component_edges
from tl_sparse.planted.false_circuits import FalseCircuit as FalseCircuit
from tl_sparse.planted.false_circuits import false_circuits as false_circuits
from tl_sparse.planted.false_circuits import planted_models as planted_models
from tl_sparse.planted.planted_model import PlantedModel as PlantedModel
from tl_sparse.planted.planted_model import Recovery as Recovery
from tl_sparse.planted.planted_model import recovery as recovery
from tl_sparse.planted.quote_closing import quote_closing as quote_closing

__all__ = [
    "FalseCircuit", "PlantedModel", "Recovery", "compiled", "component_edges", "false_circuits",
    "planted_models", "quote_closing", "recovery",
]  # fmt: skip
