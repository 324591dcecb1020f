"Names of `refseg_nb.attention`, for type checkers, completion and the lazy loader."

from .explorer import Explorer
from .maps import AttentionMaps, attention_maps, figure7, pixel_scores, rollout, word_scores

__all__ = [
    "AttentionMaps",
    "Explorer",
    "attention_maps",
    "figure7",
    "pixel_scores",
    "rollout",
    "word_scores",
]
