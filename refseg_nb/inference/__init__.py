"""Inference: from an image and a phrase to a mask.

`load` opens a trained model as a `Segmenter`; `segment_batch` answers a file of requests.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
