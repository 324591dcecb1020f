"Names of `refseg_nb.evaluation`, for type checkers, completion and the lazy loader."

from .crf import CrfConfig, dense_crf
from .evaluator import Evaluator, Record, evaluate, load_record, save_record
from .metrics import intersection_union, iou, scores
from .protocols import PROTOCOLS, Protocol, choose_threshold, compare, evaluate_protocols

__all__ = [
    "CrfConfig",
    "Evaluator",
    "PROTOCOLS",
    "Protocol",
    "Record",
    "choose_threshold",
    "compare",
    "dense_crf",
    "evaluate",
    "evaluate_protocols",
    "intersection_union",
    "iou",
    "load_record",
    "save_record",
    "scores",
]
