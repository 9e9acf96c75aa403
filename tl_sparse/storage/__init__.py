"""Storage: files read with care and written whole; what a model's fingerprint is."""
