"""Training: the configuration, the loop, checkpoints, several processes, and pre-training of backbones.

`train` runs a `TrainConfig` from its first step, or from its last checkpoint, to its end.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
