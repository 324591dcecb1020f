"""Referring image segmentation: give an image and a phrase, get the mask of the object that the phrase means.

    import refseg_nb
    from refseg_nb.refshapes import render, sample_scene

    image = render(sample_scene(seed=0, index=2)).image  # or a path, a PIL image or any [H, W, 3] array
    segmenter = refseg_nb.load("shnet-refshapes")        # a small SHNet, trained on drawn scenes
    scene = segmenter.encode(image)                      # once, however many phrases follow
    answer = scene.segment("the blue plane")
    answer.mask, answer.score                            # bool [H, W], mean probability inside the mask

In a notebook the answer shows itself. With a model and data of your own:

    model = refseg_nb.create_model("shnet", vocab_size=1000)
    refer = refseg_nb.open_data("data", "refcoco", "unc")  # or RefCOCO+, RefCOCOg, ReferIt, RefShapes
    result = refseg_nb.train(refseg_nb.TrainConfig(root="data", data="refcoco", out="runs/first"))
    record = refseg_nb.evaluate(model, dataset)            # every sentence, original resolution, intervals

Every error that a user can cause is a `RefsegError`. The packages, from the ground up: `data`, `refshapes`,
`models`, `evaluation`, `training`, `inference`, `attention`, `reproduce`, `bench`. The course that builds all of
this is in `nbs/` and begins with `nbs/00_tour.ipynb`; on the command line, begin with `refseg --help`.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
