"""Weight sparsity: top-k projection, schedules, projection while training, and fixed masks."""
