"""Referring image segmentation: an image and a phrase in, the mask of the object that is meant out.

>>> import refseg_nb
>>> from refseg_nb.refshapes import render, sample_scene
>>> image = render(sample_scene(3)).image           # or the path of a picture, or a PIL image, or an array
>>> segmenter = refseg_nb.load("shnet-refshapes")   # a small SHNet that knows drawn scenes
>>> scene = segmenter.encode(image)                 # once, however many phrases follow
>>> answer = scene.segment("the red car")
>>> answer.mask.shape == image.shape[:2]            # bool, at the size of the image
True

In a notebook an answer shows itself; `answer.score` is the mean probability inside the mask.

Models      `create_model("shnet", vocab_size=100)`
Data        `open_data(root, "refcoco", "unc")` reads RefCOCO, RefCOCO+, RefCOCOg, ReferIt and RefShapes
Training    `train(TrainConfig(data="refshapes", out="runs/first"))`
Evaluation  `evaluate(model, dataset)` scores every sentence at original resolution, with intervals
Errors      `RefsegError` is the base of everything that a user can cause

The course is in `nbs/`; begin with `nbs/00_tour.ipynb`. On the command line: `refseg --help`.
"""

__version__ = "0.2.0"

try:
    import lazy_loader
except ModuleNotFoundError:  # for the time in which an environment is older than this file
    from . import _lazy_fallback as lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
