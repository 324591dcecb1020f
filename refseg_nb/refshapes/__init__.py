"""RefShapes, the drawn world: scenes, expressions about their objects, and data sets of them.

It has the file layout of RefCOCO, so that the same code reads both. `tiny_data` draws one in seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
