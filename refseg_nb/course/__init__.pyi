"Names of `refseg_nb.course`, for type checkers, completion and the lazy loader."

from .tools import exercise_stub, expect_error, results_folder

__all__ = [
    "exercise_stub",
    "expect_error",
    "results_folder",
]
