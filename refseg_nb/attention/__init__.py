"""What a model attends to: maps of words and positions, the figure of the paper, and the explorer.

`Explorer` shows the attention of one image and its phrases, in a notebook or as a page.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
