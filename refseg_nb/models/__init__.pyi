"Names of `refseg_nb.models`, for type checkers, completion and the lazy loader."

from .cmpc import CMPC
from .crossvlt import CrossVLT
from .hub import load_model, save_model
from .lavt import LAVT
from .shnet import SHNet, create_model

__all__ = [
    "CMPC",
    "CrossVLT",
    "LAVT",
    "SHNet",
    "create_model",
    "load_model",
    "save_model",
]
