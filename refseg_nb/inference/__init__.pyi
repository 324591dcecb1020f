"Names of `refseg_nb.inference`, for type checkers, completion and the lazy loader."

from .requests import segment_batch
from .segmenter import Answer, EncodedScene, Segmenter, load

__all__ = [
    "Answer",
    "EncodedScene",
    "Segmenter",
    "load",
    "segment_batch",
]
