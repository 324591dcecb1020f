"""Evaluation: scores with intervals, records, comparisons, other programs' protocols, and a dense CRF.

`evaluate` scores a model on a split and returns a `Record`; `compare` says whether two of them differ.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
