"""Models written by hand, whose circuits are known by construction."""

from tl_sparse.planted.planted_model import PlantedModel as PlantedModel
from tl_sparse.planted.planted_model import Recovery as Recovery
from tl_sparse.planted.planted_model import recovery as recovery
from tl_sparse.planted.quote_closing import quote_closing as quote_closing

__all__ = ["PlantedModel", "Recovery", "quote_closing", "recovery"]
