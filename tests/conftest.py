"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
from limited import run_limited

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data():
    """The root of the micro real data set; only read, never written to."""
    root = Path(os.environ.get("REFSEG_REAL_DATA") or REPO.parent / "shared" / "real")
    if not (root / "refcoco" / "instances.json").is_file():
        pytest.skip(f"no real data at {root}: set REFSEG_REAL_DATA to a folder in the REFER layout")
    return root


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """The root of the `tiny` RefShapes data sets, both flavours, drawn once a session."""
    from refseg_nb.refshapes.dataset import make_refshapes

    root = tmp_path_factory.mktemp("refshapes")
    for name in ("refshapes", "refshapes+"):
        make_refshapes(root, name, "tiny", progress=False)
    return root


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Every Hypothesis test runs in a process of its own, under a memory limit; its fixtures are this one's."""
    body = pyfuncitem.obj
    if getattr(body, "is_hypothesis_test", False):
        pyfuncitem.obj = lambda **arguments: run_limited(lambda: body(**arguments))
    try:
        return (yield)
    finally:
        pyfuncitem.obj = body
