"""How the threads of a server that runs are scheduled, as the kernel says."""

import os
from pathlib import Path

import pytest

from tests.unit.test_slices import needs_slices
from vision_service.engine.slices import SHORT_US, slice_us


def slices_by_niceness(pid):
    """The slices of a process's threads by how nice they are."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        thread = int(task.name)
        found.setdefault(os.getpriority(os.PRIO_PROCESS, thread), set()).add(slice_us(thread))
    return found


@needs_slices
@pytest.mark.parametrize(("nice", "short"), [(3, True), (0, False)])
def test_the_thread_that_talks_has_short_slices_and_those_that_compute_have_not(serve, nice, short):
    process, _, _ = serve("", VISION_SERVICE_COMPUTE_NICE=str(nice))
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert (slice_us(process.pid) == SHORT_US) is short
    by_niceness = slices_by_niceness(process.pid)
    assert set(by_niceness) == {mine, mine + nice}
    if nice:
        assert SHORT_US not in by_niceness[mine + nice]
