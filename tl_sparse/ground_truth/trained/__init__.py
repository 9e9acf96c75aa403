"""Small models that were trained here, and their head circuits, found by patching."""
