"""Benchmarks: what each way of computing SHNet saves, how cost grows, and how long imports take.

Each one is a command, such as `python -m refseg_nb.bench.savings`, and writes a record to `results/`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
