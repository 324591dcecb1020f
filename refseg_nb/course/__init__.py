"What only the chapters import: helpers for their cells, and the checks of the exercises."

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
