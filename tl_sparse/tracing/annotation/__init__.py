"""What features stand for, and which of them a graph needs: by rule, or by a language model."""

from tl_sparse.tracing.annotation.annotate import annotate as annotate
from tl_sparse.tracing.annotation.answers import Annotation as Annotation
from tl_sparse.tracing.annotation.answers import Label as Label
from tl_sparse.tracing.annotation.cards import FeatureCard as FeatureCard
from tl_sparse.tracing.annotation.cards import feature_cards as feature_cards
from tl_sparse.tracing.annotation.label_tests import check_labels as check_labels
from tl_sparse.tracing.annotation.llm import LLMAnnotator as LLMAnnotator
from tl_sparse.tracing.annotation.rule import RuleAnnotator as RuleAnnotator
