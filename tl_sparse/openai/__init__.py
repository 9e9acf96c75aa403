"""The format of openai/circuit_sparsity, the release of Gao et al. 2025: models and circuits."""

from tl_sparse.openai.circuits import CircuitPayload as CircuitPayload
from tl_sparse.openai.circuits import circuit_from_openai as circuit_from_openai
from tl_sparse.openai.circuits import read_payload as read_payload
from tl_sparse.openai.model_files import from_openai as from_openai
from tl_sparse.openai.model_files import to_openai as to_openai
from tl_sparse.openai.tokenizer import tokenizer_from_openai as tokenizer_from_openai
from tl_sparse.openai.tokenizer import tokenizer_to_openai as tokenizer_to_openai

__all__ = [
    "CircuitPayload", "circuit_from_openai", "from_openai", "read_payload",
    "to_openai", "tokenizer_from_openai", "tokenizer_to_openai",
]  # fmt: skip
