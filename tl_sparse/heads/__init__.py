"""Heads of a circuit from a few prompts: discrete codes of what every head writes."""

from tl_sparse.heads.agreement import Agreement as Agreement
from tl_sparse.heads.agreement import agreement as agreement
from tl_sparse.heads.agreement import curves_figure as curves_figure
from tl_sparse.heads.baselines import HeadScores as HeadScores
from tl_sparse.heads.baselines import baseline as baseline
from tl_sparse.heads.baselines import baseline_of_outputs as baseline_of_outputs
from tl_sparse.heads.causal import CausalCheck as CausalCheck
from tl_sparse.heads.causal import causal_check as causal_check
from tl_sparse.heads.codes import Codes as Codes
from tl_sparse.heads.component import Component as Component
from tl_sparse.heads.contrastive import contrastive as contrastive
from tl_sparse.heads.contrastive import contrastive_names as contrastive_names
from tl_sparse.heads.contrastive import contrastive_task as contrastive_task
from tl_sparse.heads.controls import Controls as Controls
from tl_sparse.heads.controls import controls as controls
from tl_sparse.heads.dataset import ContrastiveDataset as ContrastiveDataset
from tl_sparse.heads.discrete_sae import DiscreteSAE as DiscreteSAE
from tl_sparse.heads.edges import EdgeScores as EdgeScores
from tl_sparse.heads.edges import score_edges as score_edges
from tl_sparse.heads.files import contrastive_from_jsonl as contrastive_from_jsonl
from tl_sparse.heads.identify import IdentifiedHeads as IdentifiedHeads
from tl_sparse.heads.identify import identify as identify
from tl_sparse.heads.known import dataset_of as dataset_of
from tl_sparse.heads.outputs import HeadOutputs as HeadOutputs
from tl_sparse.heads.outputs import extract_head_outputs as extract_head_outputs
from tl_sparse.heads.prompt_pairs import PromptPairs as PromptPairs
