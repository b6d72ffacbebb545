"""Run tests/kernels in processes of their own, one a file, so that a crash of one file leaves the others' results."""

import copy
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benches.workers import OVER, ROOT

Report = dict[str, Any]
EMPTY: Report = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": []}
GRACE_S = 15.0  # for pytest to write its report after an interrupt


def kernel_test_files() -> list[Path]:
    """What needs a GPU first, what needs only a compiler last."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    return sorted(files, key=lambda f: (f.stem != "test_gpu", f.stem == "test_compiled"))


def run_tests(environment: dict[str, str], deadline: float, *, at_once: int, files: list[Path]) -> Report:
    """Totals, failures with the first line of each, reasons of skips, and how each file ended; `deadline` by time.monotonic()."""
    with ThreadPoolExecutor(at_once) as pool:
        reports = list(pool.map(lambda file: run_file(file, environment, deadline), files))
    return {
        **{key: sum(r[key] for r in reports) for key in ("passed", "failed", "skipped")},
        "failures": [failure for r in reports for failure in r["failures"]],
        "skips": sorted({reason for r in reports for reason in r["skips"]}),
        "files": {
            f.name: {"ended": r["ended"], "seconds": r["seconds"]}
            for f, r in zip(files, reports, strict=True)
        },
    }


def run_file(file: Path, environment: dict[str, str], deadline: float) -> Report:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(file),
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junit-xml={xml}",
        ]
        with open(Path(folder) / "output", "w+", encoding="utf-8") as output:
            ended = _run(command, environment, deadline, output.fileno())
            output.seek(0)
            tail = [line for line in output.read().splitlines() if line.strip()][-1:]
        report = copy.deepcopy(EMPTY)
        if xml.exists():
            read_report(xml, report, interrupted=ended == OVER)
    if ended not in ("done", OVER):
        report["failed"] += 1
        report["failures"].append({"test": file.name, "why": f"{ended}: {' '.join(tail)}"})
    return report | {"ended": ended, "seconds": round(time.monotonic() - start, 1)}


def _run(command: list[str], environment: dict[str, str], deadline: float, output: int) -> str:
    """How it ended: done, time was up, or by what it crashed."""
    left = deadline - time.monotonic()
    if left <= 0:
        return OVER
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process:
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then reports on what has run
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return OVER
    # pytest: 0 all passed, 1 some failed, 5 none collected
    return "done" if code in (0, 1, 5) else f"pytest ended with {code}"


def read_report(xml: Path, report: Report, *, interrupted: bool) -> None:
    """Add the counts, failures and skips of a JUnit file, in which an interrupted test looks as if it had passed."""
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    for case in cases[:-1] if interrupted else cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            lines = (bad.get("message") or bad.text or "no message").splitlines()
            name = f"{case.get('classname')}::{case.get('name')}"
            report["failures"].append({"test": name, "why": lines[0].replace(str(ROOT) + os.sep, "")})
            report["failed"] += 1
        elif skip is not None:
            report["skips"].append(skip.get("message") or "no reason")
            report["skipped"] += 1
        else:
            report["passed"] += 1
