"""Arms that are tiny programs of known behavior."""

import sys
from collections.abc import Callable

import pytest
from harness import report
from harness.compare import Arm

END = """
import json, os
result = {"images": 10, "seconds": 1.0, "check": {"mean": [100.0]}, "details": {"pid": os.getpid()}}
result.update(globals().get("more", {}))
print("not the result")
print(json.dumps(result))
"""

MakeArm = Callable[..., Arm]


@pytest.fixture(scope="session")
def make_arm() -> MakeArm:
    """`make_arm(code)`: an arm that runs code, and reports `more` of it on top of 10 images."""
    return lambda code="": Arm([sys.executable, "-c", code + END])


@pytest.fixture(autouse=True)
def any_host(monkeypatch):
    """Keep pairs whatever the host steals: of a tenth of a second, one tick is 5 %."""
    monkeypatch.setattr(report, "MAX_STEAL", 100.0)
