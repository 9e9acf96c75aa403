"""Nodes: what they are connected to, what they do, patching one into another."""

from tl_sparse.nodes.concept_masks import concept_masks as concept_masks
from tl_sparse.nodes.concept_results import ConceptMasks as ConceptMasks
from tl_sparse.nodes.connections import connections as connections
from tl_sparse.nodes.connections import readers as readers
from tl_sparse.nodes.connections import writers as writers
from tl_sparse.nodes.effect_files import load_effects as load_effects
from tl_sparse.nodes.effect_files import save_effects as save_effects
from tl_sparse.nodes.effect_results import WeightEffects as WeightEffects
from tl_sparse.nodes.example_results import Examples as Examples
from tl_sparse.nodes.example_results import TopExamples as TopExamples
from tl_sparse.nodes.graph import Direction as Direction
from tl_sparse.nodes.graph import NodeGraph as NodeGraph
from tl_sparse.nodes.qk import QKChannels as QKChannels
from tl_sparse.nodes.qk import qk_channels as qk_channels
from tl_sparse.nodes.tokens import bigram_row as bigram_row
from tl_sparse.nodes.tokens import channel_tokens as channel_tokens
from tl_sparse.nodes.top_examples import top_examples as top_examples
from tl_sparse.nodes.trace import Trace as Trace
from tl_sparse.nodes.trace import effective_product as effective_product
from tl_sparse.nodes.trace import trace as trace
from tl_sparse.nodes.trace import weight_product as weight_product
from tl_sparse.nodes.weight_effects import weight_effects as weight_effects
