"Names of `refseg_nb.data`, for type checkers, completion and the lazy loader."

from .batches import Batch, RISDataset, make_loader
from .images import read_image
from .refer import Refer, Sample
from .referit import ReferIt, open_data
from .store import ImageStore, open_store
from .words import Vocabulary, vocabulary_for

__all__ = [
    "Batch",
    "ImageStore",
    "RISDataset",
    "Refer",
    "ReferIt",
    "Sample",
    "Vocabulary",
    "make_loader",
    "open_data",
    "open_store",
    "read_image",
    "vocabulary_for",
]
