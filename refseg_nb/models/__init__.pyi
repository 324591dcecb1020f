"Names of `refseg_nb.models`, for type checkers, completion and the lazy loader."

from .base import ModelConfig, RISModel
from .cmpc import CMPC
from .crossvlt import CrossVLT
from .hub import load_model, save_model, shipped
from .lavt import LAVT
from .registry import create_model, list_models, register_model
from .shnet import SHNet

__all__ = [
    "CMPC",
    "CrossVLT",
    "LAVT",
    "ModelConfig",
    "RISModel",
    "SHNet",
    "create_model",
    "list_models",
    "load_model",
    "register_model",
    "save_model",
    "shipped",
]
