"""Training: one loop for sparse and dense models, resumable to the bit."""
