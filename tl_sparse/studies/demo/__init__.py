"""The main job: train a sparse and a dense model, prune both, report how their circuits compare."""

from tl_sparse.studies.demo.report import write_report as write_report
from tl_sparse.studies.demo.study import DemoConfig as DemoConfig
from tl_sparse.studies.demo.study import DemoResult as DemoResult
from tl_sparse.studies.demo.study import run_demo as run_demo

__all__ = ["DemoConfig", "DemoResult", "run_demo", "write_report"]
