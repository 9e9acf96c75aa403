"""Nodes: what they are connected to, what they do, patching one into another."""

from tl_sparse.nodes.connections import connections as connections
from tl_sparse.nodes.connections import readers as readers
from tl_sparse.nodes.connections import writers as writers
from tl_sparse.nodes.graph import Direction as Direction
from tl_sparse.nodes.graph import NodeGraph as NodeGraph
from tl_sparse.nodes.qk import QKChannels as QKChannels
from tl_sparse.nodes.qk import qk_channels as qk_channels
from tl_sparse.nodes.tokens import bigram_row as bigram_row
from tl_sparse.nodes.tokens import channel_tokens as channel_tokens
from tl_sparse.nodes.trace import Trace as Trace
from tl_sparse.nodes.trace import effective_product as effective_product
from tl_sparse.nodes.trace import trace as trace
from tl_sparse.nodes.trace import weight_product as weight_product
