"""Folders in OpenAI's format, for the circuits that come beside such a model."""

from tests.checkpoints.conftest import write as write
