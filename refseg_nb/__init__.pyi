"Names of `refseg_nb`, for type checkers, completion and the lazy loader."

from .data import open_data
from .errors import RefsegError
from .evaluation import evaluate
from .inference import Answer, Segmenter, load
from .models import create_model, list_models, register_model
from .training import TrainConfig, train

__all__ = [
    "Answer",
    "RefsegError",
    "Segmenter",
    "TrainConfig",
    "create_model",
    "evaluate",
    "list_models",
    "load",
    "open_data",
    "register_model",
    "train",
]

__version__: str
