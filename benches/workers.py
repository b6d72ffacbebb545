"""Run benches.measure in processes of their own, and read the rows they print.

One process measures many ops, since starting one and making its inputs takes seconds. Where it dies, the op that it had
begun is a failed row, and another process goes on with the rest; where time is up, what is left is not measured.
"""

import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
CASE_SECONDS = 120.0  # a worker that says nothing for longer, compilation included, is given up
LEAST_SECONDS = 15.0  # no worker starts later than this before the deadline
OVER = "time was up"


def rows(
    command: Callable[[list[str]], list[str]], ops: list[str], environment: dict[str, str], deadline: float
) -> Iterator[Row]:
    """A row for every op: measured, wrong, failed or not measured; and the worker's lines of ceilings, as they come.

    command(ops) is what to run; deadline is by time.monotonic().
    """
    left = list(ops)
    while left:
        if deadline - time.monotonic() < LEAST_SECONDS:
            break
        begun = None
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            for line in _lines(command(left), environment, deadline, errors):
                begun = line.get("begun", begun)
                if "ceilings" in line:
                    yield line
                if "row" in line:
                    left.remove(line["row"]["op"])
                    yield line["row"]
            if not left or time.monotonic() >= deadline:
                break
            why = _reason(errors)
        # before the first op it is the inputs or an import that fail, and would again
        lost = [begun] if begun in left else list(left)
        for op in lost:
            left.remove(op)
            yield {"op": op, "status": "failed", "why": why}
    for op in left:
        yield {"op": op, "status": "not measured", "why": OVER}


def _lines(
    command: list[str], environment: dict[str, str], deadline: float, errors: IO[str]
) -> Iterator[dict[str, Any]]:
    """The JSON lines of a process, until it ends, is silent for too long, or the deadline passes."""
    said: queue.Queue[str | None] = queue.Queue()

    def listen(stream: IO[str]) -> None:
        for line in stream:
            said.put(line)
        said.put(None)

    worker = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    assert worker.stdout is not None
    listener = threading.Thread(target=listen, args=[worker.stdout], daemon=True)
    listener.start()
    try:
        while True:
            line = said.get(timeout=max(min(CASE_SECONDS, deadline - time.monotonic()), 0.01))
            if line is None:
                break
            if line.startswith("{"):
                yield json.loads(line)
        code = worker.wait()
        if code:
            print(f"ended with {code}", file=errors)
    except queue.Empty:
        print(f"TimeoutError: took longer than {CASE_SECONDS:.0f} s", file=errors)
    finally:
        worker.kill()
        worker.wait()
        listener.join()
        worker.stdout.close()


def _reason(errors: IO[str]) -> str:
    """The last line that names an error, else the last one; all of the end goes to the console."""
    errors.seek(0)
    lines = [line.rstrip() for line in errors if line.strip()]
    print(*lines[-30:], sep="\n", file=sys.stderr)
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["no message"])[-1]
