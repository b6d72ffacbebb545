"""The suite's own logic: what it says of a case that is wrong, one that raises, one that comes too late."""

import functools
import json
import os
import sys
import time

import pytest
import torch

from benches import suite, workers
from benches.cases import CASES
from benches.kernel_tests import run_tests
from benches.measure import checked, interleaved, measure
from benches.time_to_fvu import HELD_OUT, harvest
from benches.workers import rows
from benches.world import Case, Shape, World

CPU = torch.device("cpu")
TOP = {"copy_bytes": 2e9, "gather_bytes": 4e9, "flops": 1e9}
ENVIRONMENT = dict(os.environ)


def good() -> None:
    pass


def bad() -> None:
    raise AssertionError("x: error 1, allowed 0\nand more")


def no_bf16(i: int) -> None:
    raise RuntimeError("not implemented for 'BFloat16'\nat somewhere")


def clock(f) -> float:
    """Calls return how long they take."""
    return f()


@pytest.mark.parametrize("op", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_case_passes_its_own_check(op, dtype):
    case = CASES[op](World(Shape(40, 33, 300, 5, dtype), CPU))
    case.check()
    case.ours(1)


def test_a_failed_check_is_a_wrong_row():
    case = Case(lambda i: 0, {}, bad, 1.0)
    assert checked(case) == {"status": "wrong", "why": "x: error 1, allowed 0"}
    assert checked(case._replace(check=good)) is None


def test_ratios_rates_and_targets():
    """Ours takes 2 s and 4e9 bytes, half of them gathered."""
    rivals = {"slow": lambda i: 8.0, "fast": lambda i: 1.0, "broken": no_bf16}
    case = Case(lambda i: 2.0, rivals, good, 2e9, 2e9, aims={"slow": 0.5, "fast": 1.5}, copy_aim=0.7)
    row = measure(case, CPU, clock, TOP, 0.0)
    assert row["ratios"] == {"slow": 0.25, "fast": 2.0} and row["broken"]["broken"].endswith("'BFloat16'")
    assert (row["gb_per_s"], row["share_of_copy"], row["share_of_floor"]) == (2.0, 1.0, 0.75)
    assert [aim["reached"] for aim in row["aims"]] == [True, False, True]
    assert "tflop_per_s" not in row and "peak_bytes" not in row
    shape = {"batch": 1, "d": 2, "n": 3, "k": 4, "dtype": "float32"}
    text = suite.table([{"op": "x", "shape": shape, **row}])
    assert "time / slow <= 0.5: reached" in text and "time / fast <= 1.5: missed" in text


def test_runs_are_interleaved_and_inputs_rotate():
    order = []

    def record(name: str, i: int) -> float:
        order.append((name, i))
        return 1.0

    interleaved({name: functools.partial(record, name) for name in "ab"}, clock, 0.0)
    assert order[:6] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]


def worker(ops: list[str]) -> list[str]:
    """A process that measures every op but `raises`, `exits`, and one that `hangs`."""
    code = f"""
import json, sys, time
print("noise", flush=True)
for op in {ops!r}:
    print(json.dumps({{"begun": op}}), flush=True)
    if op == "raises": raise RuntimeError("CUDA error: an illegal memory access")
    if op == "exits": sys.exit(3)
    if op == "hangs": time.sleep(60)
    print(json.dumps({{"row": {{"op": op, "status": "measured"}}}}), flush=True)
"""
    return [sys.executable, "-c", code]


def test_one_failure_leaves_the_others(capsys):
    found = list(rows(worker, ["a", "raises", "b", "exits", "c"], ENVIRONMENT, time.monotonic() + 60))
    assert [(row["op"], row["status"]) for row in found] == [
        ("a", "measured"),
        ("raises", "failed"),
        ("b", "measured"),
        ("exits", "failed"),
        ("c", "measured"),
    ]
    assert found[1]["why"] == "RuntimeError: CUDA error: an illegal memory access"
    assert found[3]["why"] == "ended with 3"


def test_a_worker_that_cannot_start_fails_all_its_ops(capsys):
    found = list(
        rows(
            lambda ops: [sys.executable, "-c", "import nowhere"],
            ["a", "b"],
            ENVIRONMENT,
            time.monotonic() + 60,
        )
    )
    assert [row["status"] for row in found] == ["failed"] * 2
    assert found[0]["why"] == "ModuleNotFoundError: No module named 'nowhere'"


def test_what_comes_too_late_is_not_measured(monkeypatch):
    late = {"status": "not measured", "why": "time was up"}
    assert list(rows(worker, ["a"], ENVIRONMENT, time.monotonic() + 1)) == [{"op": "a", **late}]
    monkeypatch.setattr(workers, "LEAST_SECONDS", 0.0)
    found = list(rows(worker, ["a", "hangs", "b"], ENVIRONMENT, time.monotonic() + 2))
    assert found[1:] == [{"op": "hangs", **late}, {"op": "b", **late}] and found[0]["status"] == "measured"


def test_a_case_that_hangs_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(workers, "CASE_SECONDS", 1.0)
    found = list(rows(worker, ["hangs", "b"], ENVIRONMENT, time.monotonic() + 60))
    assert [row["status"] for row in found] == ["failed", "measured"]
    assert found[0]["why"] == "TimeoutError: took longer than 1 s"


@pytest.fixture
def files(tmp_path):
    contents = {
        "test_a.py": "import pytest\ndef test_1(): pass\ndef test_2(): assert 1 == 2, 'no'\ndef test_3(): pytest.skip('why')",
        "test_b.py": "import os\ndef test_1(): os._exit(7)",
        "test_c.py": "import time\ndef test_1(): pass\ndef test_2(): time.sleep(60)",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return [tmp_path / name for name in contents]


def test_tests_that_fail_crash_and_do_not_end(files):
    report = run_tests(ENVIRONMENT, time.monotonic() + 10, at_once=3, files=files)
    assert (report["passed"], report["failed"], report["skipped"]) == (2, 2, 1)
    assert [f["ended"] for f in report["files"].values()] == ["done", "pytest ended with 7", "time was up"]
    assert report["failures"][0]["why"].startswith("AssertionError: no") and report["skips"] == ["why"]
    assert "FAILED" in suite.summary(report)


def test_json_is_written_whole(tmp_path):
    suite.write(tmp_path / "kernels.json", {"cases": []})
    assert json.loads((tmp_path / "kernels.json").read_text()) == {"cases": []}
    assert [f.name for f in tmp_path.iterdir()] == ["kernels.json"]


def test_wall_times_are_compared_on_activations_of_one_scale(tmp_path):
    harvest(HELD_OUT + 1000, tmp_path / "rows.pt")
    rows = torch.load(tmp_path / "rows.pt")
    assert rows["train"].shape == (1000, 128) and rows["held_out"].shape == (HELD_OUT, 128)
    norms = torch.cat([rows["train"], rows["held_out"]]).norm(dim=1)
    assert norms.mean().item() == pytest.approx(128**0.5, rel=1e-5)
