"""Stands in for lazy_loader in an environment that was installed before it became a requirement.

To be removed, with its import in `__init__.py`, as soon as `pip install -e .` was run there.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path


def attach_stub(package, filename):
    body = ast.parse(Path(filename).with_suffix(".pyi").read_text()).body
    home = {n.name: x.module for x in body if isinstance(x, ast.ImportFrom) for n in x.names}

    def get(name):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home), sorted(home)


sys.modules["lazy_loader"] = sys.modules[__name__]
