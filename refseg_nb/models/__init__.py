"""SHNet, CMPC, LAVT and CrossVLT, their backbones and text encoders, and how models are stored.

`create_model` makes one by name and preset, `list_models` lists the names, `save_model` and `load_model` keep
one. A model of your own is a subclass of `RISModel` with a `ModelConfig`, registered by `register_model`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
