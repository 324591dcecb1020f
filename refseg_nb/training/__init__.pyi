"Names of `refseg_nb.training`, for type checkers, completion and the lazy loader."

from .checkpoint import checkpoints
from .config import TrainConfig
from .learner import Learner, TrainResult, train

__all__ = [
    "Learner",
    "TrainConfig",
    "TrainResult",
    "checkpoints",
    "train",
]
