"""The relation probe: which words of a phrase does a predictor read? Pairs of phrases that differ in one slot.

`run_probe` asks any predictor the fixed questions and says which slot it ignores; `READERS` are its reference points.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
