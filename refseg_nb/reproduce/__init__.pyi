"Names of `refseg_nb.reproduce`, for type checkers, completion and the lazy loader."

from .experiments import Experiment, PAPER
from .report import reproduce
from .tables import load_runs

__all__ = [
    "Experiment",
    "PAPER",
    "load_runs",
    "reproduce",
]
