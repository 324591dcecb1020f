"Names of `refseg_nb`, for type checkers, completion and the lazy loader."

from .data import open_data
from .errors import RefsegError
from .evaluation import evaluate
from .inference import Answer, Segmenter, load
from .models import create_model
from .training import TrainConfig, train

__all__ = [
    "Answer",
    "RefsegError",
    "Segmenter",
    "TrainConfig",
    "create_model",
    "evaluate",
    "load",
    "open_data",
    "train",
]

__version__: str
