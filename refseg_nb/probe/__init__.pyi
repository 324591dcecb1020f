"Names of `refseg_nb.probe`, for type checkers, completion and the lazy loader."

from .page import write_card, write_page
from .questions import Probe, load_probe, write_probe
from .readers import READERS, Reader
from .run import ProbeResult, load_result, run_probe

__all__ = [
    "Probe",
    "ProbeResult",
    "READERS",
    "Reader",
    "load_probe",
    "load_result",
    "run_probe",
    "write_card",
    "write_page",
    "write_probe",
]
