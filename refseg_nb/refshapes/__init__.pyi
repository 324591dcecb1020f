"Names of `refseg_nb.refshapes`, for type checkers, completion and the lazy loader."

from .dataset import make_refshapes, tiny_data
from .expressions import Expression, sample_expressions
from .scenes import Scene, SceneObject, render, sample_scene

__all__ = [
    "Expression",
    "Scene",
    "SceneObject",
    "make_refshapes",
    "render",
    "sample_expressions",
    "sample_scene",
    "tiny_data",
]
