"""A trainer in a process of its own, in the environment that has its package: a line in, a line of JSON out."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benches.workers import ROOT

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


def is_peer(name: str) -> bool:
    """Whether the trainer's package lives in the peers' environment."""
    return name.split()[0] not in ("fastsae", "torch")


class Trainer:
    """A worker process; module is what it runs, with --trainer and the other arguments."""

    def __init__(self, module: str, name: str, *arguments: str) -> None:
        python = str(PEERS_PYTHON) if is_peer(name) else sys.executable
        paths = [str(ROOT)] if is_peer(name) else [str(ROOT), str(ROOT / "kernels")]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (until close)
        self._process = subprocess.Popen(
            [python, "-m", module, "--trainer", name, *arguments],
            cwd=ROOT,
            env={"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def ask(self, line: str = "") -> dict[str, Any]:
        """Its answer. RuntimeError with the process's last words where it has died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(f"{line}\n")
            stdin.flush()
            answer: dict[str, Any] = json.loads(stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._process.wait()
            self._errors.seek(0)
            words = self._errors.read().strip().splitlines()
            raise RuntimeError(words[-1] if words else "it ended without a word") from None
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


@contextmanager
def running(module: str, *names: str, arguments: list[str]) -> Iterator[list[Trainer]]:
    trainers: list[Trainer] = []
    try:
        for name in names:
            trainers.append(Trainer(module, name, *arguments))
        yield trainers
    finally:
        for trainer in trainers:
            trainer.close()
