"""The model: one forward pass with TransformerLens' hook names and methods."""
