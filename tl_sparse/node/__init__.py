"""``Node``: one node of a model by any name, and sets of nodes."""

from tl_sparse.node.names import FORMS as FORMS
from tl_sparse.node.names import LAST as LAST
from tl_sparse.node.node import Node as Node
from tl_sparse.node.sets import NodeName as NodeName
from tl_sparse.node.sets import Nodes as Nodes
from tl_sparse.node.sets import as_mask as as_mask
from tl_sparse.node.sets import node_at as node_at
from tl_sparse.node.sets import node_mask as node_mask
from tl_sparse.node.sets import numbers as numbers
from tl_sparse.node.sets import released_names as released_names
from tl_sparse.node.sets import resolve as resolve
