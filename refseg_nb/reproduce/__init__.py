"""The reproduction: the paper's numbers, the experiments, and tables and figures from their records.

`refseg reproduce` on the command line runs all of it; a record that is there is not computed again.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
