"""Checkpoints: files in three formats (ours, OpenAI's, TransformerLens') and back."""
