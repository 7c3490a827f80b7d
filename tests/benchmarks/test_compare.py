"""The harness on arms whose behavior is known. Nothing here is timed."""

from dataclasses import replace

import pytest
from harness import report as reporting
from harness.compare import Arm, ArmFailed, compare, measure, schedule
from harness.report import Measurement, report_of

from fastmoco.errors import DataError, UsageError

BURN = """
import time
end = time.process_time() + 0.2
while time.process_time() < end:
    sum(range(1000))
print(time.process_time(), flush=True)
"""
CHILD = f"""
import subprocess, sys
burn = {BURN!r}
ran = subprocess.run([sys.executable, "-c", burn], capture_output=True, text=True)
more = {{"details": {{"burnt": float(ran.stdout)}}}}
"""
ORPHAN = f"""
import subprocess, sys
burn = {BURN!r}
subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.DEVNULL)
"""
GRANDCHILD = """
import subprocess, sys
hold = "import time; held = b'x' * 100_000_000; time.sleep(0.5)"
run = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
subprocess.run([sys.executable, "-c", run])
"""


def test_the_order_is_abba():
    assert [arm for _, arm in schedule("AB", 4)] == list("ABBAABBA")
    assert [pair for pair, _ in schedule("AB", 2)] == [0, 0, 1, 1]
    assert [arm for _, arm in schedule("ABC", 2)] == list("ABCCBA")


def test_every_measurement_is_a_fresh_process_in_that_order(make_arm):
    seen = []
    report = compare({"a": make_arm(), "b": make_arm()}, 2, on_row=seen.append)
    assert [one.arm for one in seen] == ["a", "b", "b", "a"]
    assert len({one.details["pid"] for one in seen}) == 4
    assert report.measurements == seen
    assert not report.differences
    assert report.smallest_effect is None


def test_an_arm_against_itself(make_arm):
    report = compare({"a": make_arm(), "b": make_arm("x = 1 / 0")}, 1, against_itself=True)
    assert report.arms == ["a", "a (again)"]
    assert report.smallest_effect == 0.0


def test_cpu_seconds_of_a_child(make_arm):
    found = measure("a", make_arm(CHILD))
    assert found.whole_cpu_s >= found.details["burnt"] >= 0.2


def test_cpu_seconds_of_a_child_that_nobody_waited_for(make_arm):
    assert measure("a", make_arm(ORPHAN)).whole_cpu_s >= 0.2


def test_cpu_seconds_outside_of_the_section_are_taken_off(make_arm):
    found = measure("a", make_arm('more = {"outside_cpu_s": 0.001}'))
    assert found.cpu_s == pytest.approx(found.whole_cpu_s - 0.001)


def test_peak_memory_of_a_grandchild(make_arm):
    found = measure("a", make_arm(GRANDCHILD))
    assert 100e6 < found.peak_bytes < 200e6
    assert found.memory_samples > 3


def test_a_failing_arm_is_told_in_words(make_arm):
    with pytest.raises(ArmFailed, match=r"The arm b ended with exit code 3\.(.|\n)*no such photo"):
        failing = make_arm("import sys; print('no such photo', file=sys.stderr); sys.exit(3)")
        compare({"a": make_arm(), "b": failing}, 1)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("print('{}'); raise SystemExit", "did not end its output with a JSON object"),
        ("print('done'); raise SystemExit", "but with: 'done'"),
        ("more = {'images': 0}", "did not end its output"),
    ],
)
def test_other_ends_without_a_result(make_arm, code, words):
    with pytest.raises(ArmFailed, match=words):
        measure("a", make_arm(code))


def test_a_command_that_does_not_exist():
    with pytest.raises(ArmFailed, match=r"no-such-program cannot be started: No such file"):
        measure("a", Arm(["no-such-program"]))


def test_an_arm_that_takes_too_long_is_ended(make_arm):
    with pytest.raises(ArmFailed, match=r"took more than 0\.5 s"):
        measure("a", make_arm("import time; time.sleep(60)"), seconds=0.5)


def test_a_function_as_an_arm(tmp_path, monkeypatch):
    (tmp_path / "arms.py").write_text(
        "import atexit\n"
        "from fastmoco.errors import DataError\n"
        "atexit.register(print, 'the end of the interpreter, which is not measured')\n"
        "def good(section, count):\n"
        "    with section:\n"
        "        sum(range(1000))\n"
        "    return {'images': count, 'check': {'count': count}}\n"
        "def bad(section):\n"
        "    raise DataError('two photos are torn')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = measure("a", Arm.of("arms:good", count=3))
    assert (found.images, found.check) == (3, {"count": 3})
    assert 0 < found.cpu_s < found.whole_cpu_s
    assert found.seconds < found.wall_s
    with pytest.raises(ArmFailed, match="error: two photos are torn") as caught:
        measure("a", Arm.of("arms:bad"))
    assert "Traceback" not in str(caught.value)


def test_without_psutil(monkeypatch, make_arm):
    monkeypatch.setattr("harness.compare.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fastmoco\[bench\]'"):
        compare({"a": make_arm()}, 1)


def measured(arm="a", pair=0, seconds=1.0, **changes):
    one = Measurement(arm, pair, 10, seconds, seconds, 2.0, 2.0, 10**6, 5, 0.1, 0.0, {"mean": 1.0})
    return replace(one, **changes)


def reported(*found):
    return report_of(list(found), {}, {}, tolerance=0.5)


def test_ratios_are_taken_within_pairs():
    seconds = [(1.0, 2.0), (10.0, 30.0), (1.0, 4.0)]
    rows = [measured(a, p, s[a == "b"]) for p, s in enumerate(seconds) for a in "ab"]
    (found,) = reported(*rows).comparisons
    assert (found.arm, found.reference, found.pairs) == ("a", "b", 3)
    assert found.speed.median == found.cpu.median == 3.0
    assert (found.speed.low, found.speed.high) == (2.0, 4.0)


def test_a_pair_under_steal_is_dropped():
    limit = reporting.MAX_STEAL
    rows = [
        measured("a", 0),
        measured("b", 0, 2.0, steal_percent=limit),
        measured("b", 1, 9.0, steal_percent=limit + 1),
        measured("a", 1),
    ]
    report = reported(*rows)
    (found,) = report.comparisons
    assert (found.pairs, found.dropped) == (1, {1: limit + 1})
    assert found.speed.median == 2.0
    report.require_result()
    with pytest.raises(DataError, match="in every pair: there is no result"):
        reported(*rows[2:]).require_result()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": 9}, "images: 9 in b, 10 in a"),
        ({"check": {"mean": 1.6}}, "mean: 1.6 in b, 1.0 in a"),
        ({"check": {}}, "mean: None in b, 1.0 in a"),
        ({"check": {"mean": float("nan")}}, "mean: nan in b"),
        ({"check": {"mean": 1.0, "count": 2}}, "count: 2 in b, None in a"),
    ],
)
def test_other_work_is_no_result(changes, words):
    report = reported(measured(), measured("b", **changes))
    with pytest.raises(DataError, match="did not do the same work") as caught:
        report.require_result()
    assert words in str(caught.value)
    assert report.row()["same_work"] is False


def test_floats_of_the_same_work_may_differ_a_little():
    ours = measured(check={"mean": [100.0, 50.0], "count": 7})
    reported(ours, measured("b", check={"mean": [100.4, 49.6], "count": 7})).require_result()
    assert reported(ours, measured("b", check={"mean": [100.0], "count": 7})).differences
