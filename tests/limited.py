"""A test body in a process of its own, with a limit on its memory: what takes too much is a failed test with
an example, and not a dead worker."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import pytest

ROOM = 2**30  # bytes, on top of what the process has already: less than the two gigabytes of the pickle bomb
SECONDS = 600


def _child(function, room, end):
    import resource

    if "torch" in sys.modules:
        # the threads of the parent are not there in a fork
        sys.modules["torch"].set_num_threads(1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = [held + room] + [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        function()
        said = ""
    except BaseException as error:
        # the report itself needs memory
        resource.setrlimit(resource.RLIMIT_AS, before)
        said = "".join(traceback.format_exception(error))
    end.send(said)


def run_limited(function, room=ROOM, seconds=SECONDS):
    """Call a function in a forked process that may take so many bytes more than this one; if it fails there,
    the test fails here, with the same report."""
    if sys.platform != "linux":
        function()
        return
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, room, theirs))
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(seconds) else f"it was not over after {seconds} seconds"
    except EOFError:
        said = None
    finally:
        if said:
            process.kill()
        process.join()
        ours.close()
    if said is None:
        said = f"the process died (exit code {process.exitcode}; below zero: the signal that ended it)"
    if said:
        pytest.fail(said, pytrace=False)


def enough_memory(error):
    """Fail if an error, or one behind it, is a MemoryError: readers wrap what a library raises in their own
    error, and a limit that was reached must not pass for a damaged file."""
    while error is not None:
        assert not isinstance(error, MemoryError), "the memory limit was reached"
        error = error.__cause__ or error.__context__
