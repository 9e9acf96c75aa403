"""Weight sparsity: the top-k projection, its schedules, and masks on any model."""
