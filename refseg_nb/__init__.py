__version__ = "0.1.0"

__all__ = ["load"]


def __getattr__(name):
    "`refseg_nb.load`, without importing torch until it is asked for."
    if name in ("load", "Segmenter", "EncodedScene", "Answer"):
        from .inference import segmenter as inference
        return getattr(inference, name)
    raise AttributeError(f"module 'refseg_nb' has no attribute {name!r}")
