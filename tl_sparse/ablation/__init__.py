"""Ablation: what nodes are set to, the hooks that do it, and runs under many masks."""

from tl_sparse.ablation.frozen_layernorms import NoNormScales as NoNormScales
from tl_sparse.ablation.frozen_layernorms import frozen_norm_hooks as frozen_norm_hooks
from tl_sparse.ablation.frozen_layernorms import norm_hooks as norm_hooks
from tl_sparse.ablation.interventions import FwdHook as FwdHook
from tl_sparse.ablation.interventions import Intervention as Intervention
from tl_sparse.ablation.interventions import Replacement as Replacement
from tl_sparse.ablation.interventions import ablation_hooks as ablation_hooks
from tl_sparse.ablation.interventions import broadcast as broadcast
from tl_sparse.ablation.interventions import check_fired as check_fired
from tl_sparse.ablation.interventions import gated_ablation_hooks as gated_ablation_hooks
from tl_sparse.ablation.kinds import KINDS as KINDS
from tl_sparse.ablation.kinds import Ablation as Ablation
from tl_sparse.ablation.kinds import AblationKind as AblationKind
from tl_sparse.ablation.kinds import takes_sources as takes_sources
from tl_sparse.ablation.means import ActivationMeans as ActivationMeans
from tl_sparse.ablation.means import activation_means as activation_means
from tl_sparse.ablation.openai_means import means_from_openai as means_from_openai
from tl_sparse.ablation.permanent_hooks import permanent as permanent
from tl_sparse.ablation.resampling import ResampleSources as ResampleSources
from tl_sparse.ablation.resampling import aligned_sources as aligned_sources
from tl_sparse.ablation.resampling import positional_means as positional_means
from tl_sparse.ablation.resampling import resample_sources as resample_sources
