"Names of `refseg_nb.attention`, for type checkers, completion and the lazy loader."

from .browser import SampleBrowser
from .explorer import Explorer
from .maps import (
    AttentionMaps,
    attention_maps,
    figure7,
    pixel_scores,
    rollout,
    transformers_maps,
    word_scores,
)

__all__ = [
    "AttentionMaps",
    "Explorer",
    "SampleBrowser",
    "attention_maps",
    "figure7",
    "pixel_scores",
    "rollout",
    "transformers_maps",
    "word_scores",
]
