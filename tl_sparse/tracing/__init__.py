"""Hierarchical tracing: which features of a model's dictionaries a logit is made of."""

from tl_sparse.tracing.aggregate import FeatureSummary as FeatureSummary
from tl_sparse.tracing.aggregate import aggregate as aggregate
from tl_sparse.tracing.annotation import Annotation as Annotation
from tl_sparse.tracing.annotation import LLMAnnotator as LLMAnnotator
from tl_sparse.tracing.annotation import RuleAnnotator as RuleAnnotator
from tl_sparse.tracing.annotation import annotate as annotate
from tl_sparse.tracing.annotation import check_labels as check_labels
from tl_sparse.tracing.annotation import feature_cards as feature_cards
from tl_sparse.tracing.attribution_graph import attribution_graph as attribution_graph
from tl_sparse.tracing.attribution_graph import save_attribution_graph as save_attribution_graph
from tl_sparse.tracing.baselines import baseline_scores as baseline_scores
from tl_sparse.tracing.dictionary import Dictionary as Dictionary
from tl_sparse.tracing.dictionary_config import (
    DictionaryTrainingConfig as DictionaryTrainingConfig,
)
from tl_sparse.tracing.dictionary_config import Place as Place
from tl_sparse.tracing.dictionary_config import dictionary_run as dictionary_run
from tl_sparse.tracing.dictionary_config import places as places
from tl_sparse.tracing.files import bundled_dictionaries as bundled_dictionaries
from tl_sparse.tracing.files import load_dictionaries as load_dictionaries
from tl_sparse.tracing.files import save_dictionaries as save_dictionaries
from tl_sparse.tracing.formats import from_sae_lens as from_sae_lens
from tl_sparse.tracing.formats import read_dictionary as read_dictionary
from tl_sparse.tracing.freeze import Freeze as Freeze
from tl_sparse.tracing.functions import FunctionDictionary as FunctionDictionary
from tl_sparse.tracing.gate import Gate as Gate
from tl_sparse.tracing.graph import TracedGraph as TracedGraph
from tl_sparse.tracing.graph_files import load_graph as load_graph
from tl_sparse.tracing.graph_files import save_graph as save_graph
from tl_sparse.tracing.graph_files import to_networkx as to_networkx
from tl_sparse.tracing.influence import graph_scores as graph_scores
from tl_sparse.tracing.influence import prune_by_influence as prune_by_influence
from tl_sparse.tracing.interventions import FeatureChange as FeatureChange
from tl_sparse.tracing.interventions import feature_hooks as feature_hooks
from tl_sparse.tracing.page import page_graph as page_graph
from tl_sparse.tracing.qk import QKTrace as QKTrace
from tl_sparse.tracing.qk import trace_qk as trace_qk
from tl_sparse.tracing.roots import AttentionPattern as AttentionPattern
from tl_sparse.tracing.roots import AttentionScore as AttentionScore
from tl_sparse.tracing.roots import Custom as Custom
from tl_sparse.tracing.roots import FeatureRoot as FeatureRoot
from tl_sparse.tracing.roots import Logit as Logit
from tl_sparse.tracing.roots import LogitDiff as LogitDiff
from tl_sparse.tracing.roots import LogProb as LogProb
from tl_sparse.tracing.sae_lens_training import train_with_sae_lens as train_with_sae_lens
from tl_sparse.tracing.session import TraceSession as TraceSession
from tl_sparse.tracing.splice import NotLinear as NotLinear
from tl_sparse.tracing.splice import Splice as Splice
from tl_sparse.tracing.spliced_model import SplicedModel as SplicedModel
from tl_sparse.tracing.spliced_model import feature_circuit as feature_circuit
from tl_sparse.tracing.trace import TracedGraphs as TracedGraphs
from tl_sparse.tracing.trace import trace as trace
from tl_sparse.tracing.trace import trace_each as trace_each
from tl_sparse.tracing.train_dictionaries import train_dictionaries as train_dictionaries
