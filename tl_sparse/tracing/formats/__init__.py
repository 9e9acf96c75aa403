"""Dictionaries in other packages' files, read without importing those packages."""

from tl_sparse.tracing.formats.read import read_dictionary as read_dictionary
from tl_sparse.tracing.formats.sae_lens import from_sae_lens as from_sae_lens
