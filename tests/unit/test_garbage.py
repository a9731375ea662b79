"""The garbage collector's sight, in a process of its own: what is frozen stays so for all tests after it."""

import subprocess
import sys

PROGRAM = """
import gc
from vision_service.engine.garbage import settle_garbage
before = [[number] for number in range(1000)]
settle_garbage()
assert not any(thing is one for thing in gc.get_objects() for one in before[:5]), "is still walked"
after = [[number] for number in range(1000)]
after.append(after)  # a cycle
del after
assert gc.collect() >= 1, "a cycle that came later is not freed"
print(gc.get_freeze_count() > 1000)
"""


def test_only_what_came_later_is_walked_and_freed():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "True", done.stderr
