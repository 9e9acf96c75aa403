"""Hierarchical tracing: which features of a model's dictionaries a logit is made of."""

from tl_sparse.tracing.dictionary import Dictionary as Dictionary
from tl_sparse.tracing.freeze import Freeze as Freeze
from tl_sparse.tracing.graph import TracedGraph as TracedGraph
