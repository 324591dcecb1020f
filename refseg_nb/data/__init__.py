"""Data sets, images, words and batches.

The readers of RefCOCO, RefCOCO+, RefCOCOg and ReferIt, whatever somebody brings of their own, and the
split of a data set as batches of K images and B expressions. `open_data` opens every one of them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
