"""A study: a grid of models, their circuits, and the paper's figures for them, resumable."""

from tl_sparse.studies.grid.config import StudyConfig as StudyConfig
from tl_sparse.studies.grid.report import write_study as write_study
from tl_sparse.studies.grid.results import StudyResult as StudyResult
from tl_sparse.studies.grid.work import read_study as read_study
from tl_sparse.studies.grid.work import run_study as run_study

__all__ = ["StudyConfig", "StudyResult", "read_study", "run_study", "write_study"]
