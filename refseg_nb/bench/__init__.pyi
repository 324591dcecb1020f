"Names of `refseg_nb.bench`, for type checkers, completion and the lazy loader."

from .growth import fitted_slope
from .savings import bench_table, read_bench

__all__ = [
    "bench_table",
    "fitted_slope",
    "read_bench",
]
