"""Everything about the kernels on one machine: `python3 -m benches.suite --device cuda --minutes 8 --out DIR`.

Runs the tests of tests/kernels (with --device cuda, or --tests) and the benches, and needs torch, triton, pytest and
pytest-benchmark only. Run it from the repository's root. DIR gets tests.json and kernels.json, the latter after every case, so that
what has been measured is there whatever ends the run. On a GPU beside which TransformerLens is installed, whole runs come last (end_to_end.json).
A table comes last. The exit code is 1 where a test or a check
failed, a file of tests did not end or an op raised; a missed target is a figure, not a failure. Times exclude compilation and warm-up.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benches.kernel_tests import kernel_test_files, run_tests
from benches.workers import ROOT, Row, rows

TEST_SHARE = 0.45  # of the time, at most
RUNS_SHARE = 0.25  # of the time, for whole runs
AT_ONCE = 4  # files of tests beside one another on a GPU, where most of their time is compilation
MARGIN_S = 5.0


def environment() -> dict[str, str]:
    """For the children: `kernels` is a source root; OpenMP's threads sleep while they wait."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | own


def measure_command(device: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "benches.measure", "--device", device, *more]


def worker_command(device: str, shape: int, ops: list[str]) -> list[str]:
    return measure_command(device, "--shape", str(shape), "--ops", *ops)


def write(path: Path, content: object) -> None:
    """All of it or nothing."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def run_benches(out: Path, command: str, plan: Row, device: str, deadline: float) -> list[Row]:
    """Targets at every shape first, then all other ops; every row, in that order."""
    found: list[Row] = []
    ceilings: list[Row] = []
    for group in ("targeted", "others"):
        for place, shape in enumerate(plan["shapes"]):
            worker = partial(worker_command, device, place)
            for line in rows(worker, plan[group], environment(), deadline):
                if "ceilings" in line:
                    ceilings.append({"shape": shape, **line["ceilings"]})
                else:
                    found.append({"op": line["op"], "shape": shape, **line})
                    if line["status"] != "not measured":
                        print(table(found[-1:], header=False), flush=True)
                write(
                    out / "kernels.json",
                    {"command": command, **plan["about"], "ceilings_per_s": ceilings, "cases": found},
                )
    return found


def run_whole(out: Path, seconds: float) -> None:
    """benches.end_to_end, as far as it comes; its JSON is rewritten after each scene."""
    command = [sys.executable, "-m", "benches.end_to_end", "--device", "cuda"]
    try:
        subprocess.run(
            [*command, "--out", str(out / "end_to_end.json")],
            cwd=ROOT,
            env=environment(),
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print("end_to_end: time was up")


def table(found: list[Row], *, header: bool = True) -> str:
    """One line a row: time, its ratio to each rival's (below 1 ours is faster), speed, shares, targets."""
    lines = [("op", "batch x d x n, k", "dtype", "ms", "ratio to", "speed", "floor", "copy", "target")]
    for row in found:
        s = row["shape"]
        line = (row["op"], f"{s['batch']} x {s['d']} x {s['n']}, {s['k']}", s["dtype"])
        if row["status"] != "measured":
            lines.append((*line, "", f"{row['status']}: {row['why']}", "", "", "", ""))
            continue
        speed = f"{row['tflop_per_s']:.3g} TFLOP/s" if "tflop_per_s" in row else f"{row['gb_per_s']:.4g} GB/s"
        aims = [
            f"{aim['what']} {'<=' if 'at_most' in aim else '>='} {aim.get('at_most', aim.get('at_least')):.3g}:"
            f" {'reached' if aim['reached'] else 'missed'}"
            for aim in row["aims"]
        ]
        lines.append(
            (
                *line,
                f"{row['times']['ours']['median_ms']:.4g}",
                "; ".join(f"{rival} {ratio:.3g}" for rival, ratio in row["ratios"].items()),
                speed,
                f"{row['share_of_floor']:.0%}",
                f"{row['share_of_copy']:.0%}",
                "; ".join(aims),
            )
        )
    if not header:
        return "  ".join(cell for cell in lines[1] if cell)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def summary(report: dict[str, Any]) -> str:
    """The tests' totals, what failed, and which files did not finish."""
    lines = [f"tests: {report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped"]
    lines += [f"FAILED {failure['test']}: {failure['why']}" for failure in report["failures"]]
    lines += [f"{name}: {f['ended']}" for name, f in report["files"].items() if f["ended"] != "done"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; default 8")
    parser.add_argument("--out", type=Path, required=True, help="folder for tests.json and kernels.json")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, help="default: with --device cuda")
    arguments = parser.parse_args()
    device, out = arguments.device, arguments.out.resolve()
    start = time.monotonic()
    deadline = start + 60 * arguments.minutes - MARGIN_S
    out.mkdir(parents=True, exist_ok=True)
    asked = subprocess.run(
        measure_command(device, "--plan"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if asked.returncode:
        sys.exit(asked.returncode)
    plan = json.loads(asked.stdout.splitlines()[-1])
    report = None
    if arguments.tests if arguments.tests is not None else device == "cuda":
        at_once = min(AT_ONCE, max((os.cpu_count() or 1) // 2, 1)) if device == "cuda" else 1
        until = start + TEST_SHARE * (deadline - start)
        report = run_tests(environment(), until, at_once=at_once, files=kernel_test_files())
        write(out / "tests.json", {**plan["about"], **report})
        print(summary(report), flush=True)
    command = f"python3 -m benches.suite --device {device} --minutes {arguments.minutes:g}"
    whole_runs = device == "cuda" and find_spec("transformer_lens") is not None
    until = deadline - RUNS_SHARE * (deadline - start) if whole_runs else deadline
    found = run_benches(out, command, plan, device, until)
    if whole_runs:
        run_whole(out, deadline - time.monotonic())
    print(f"\n{plan['about']['device']}, torch {plan['about']['versions']['torch']}\n{table(found)}")
    if report is not None:
        print(summary(report))
    bad = any(row["status"] in ("wrong", "failed") for row in found)
    if report is not None:
        bad = bad or report["failed"] > 0 or any(file["ended"] != "done" for file in report["files"].values())
    sys.exit(bad)


if __name__ == "__main__":
    main()
