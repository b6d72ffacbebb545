"""The folder of a run while it trains: made or gone on with, kept from a second process, and where its figures go."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsae.checkpoint import CONFIG_FILE, SAES, checkpoints
from fastsae.configfile import to_toml
from fastsae.errors import RunError, reason
from fastsae.log import JsonlSink, Sink, Sinks, WandbSink
from fastsae.prepare import Job

METRICS_FILE, LOCK_FILE = "metrics.jsonl", ".lock"


@contextmanager
def outputs(job: Job, sinks: Sequence[Sink]) -> Iterator[Sink]:
    """The run folder, and the sinks of the run; a new folder is removed again where a sink of ours cannot be opened. Of a resumed run the
    metrics behind its checkpoint are cut off.

    Raises RunError where the folder cannot be written, or another process trains in it.
    """
    run_dir = job.run_dir
    first = next((p for p in reversed(run_dir.parents) if not p.exists()), run_dir)
    if job.checkpoint is None:
        try:
            run_dir.mkdir(parents=True)
            (run_dir / CONFIG_FILE).write_text(to_toml(job.config), encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write the run folder {run_dir}: {reason(error)}") from None
    with _locked(run_dir):
        if job.checkpoint is not None:
            if checkpoints(run_dir)[-1:] != [job.checkpoint.folder]:
                raise RunError(f"another process went on with {run_dir} meanwhile; resume it again")
            _cut_off(run_dir / METRICS_FILE, job.checkpoint.state["metrics_bytes"])
            # of where it was stopped: not what the run ends with
            shutil.rmtree(run_dir / SAES, ignore_errors=True)
        try:
            own = _own_sinks(job)
        except BaseException:
            if job.checkpoint is None:
                _remove(run_dir, first)
            raise
        with Sinks([*own, *sinks]) as sink:
            yield sink


def last_figures(path: Path) -> dict[str, dict[str, Any]]:
    """Per SAE the figures of its last training row in metrics.jsonl."""
    found = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.pop("kind") == "train":
                sae = row.pop("sae")
                found[sae] = {
                    k: v for k, v in row.items() if k not in ("n_tokens", "step", "tokens_per_second")
                }
    return found


def _remove(run_dir: Path, first: Path) -> None:
    """A run folder that was just made, and the folders above it down from `first` that hold nothing else."""
    shutil.rmtree(run_dir)
    for parent in run_dir.parents:
        if parent == first.parent:
            return
        try:
            parent.rmdir()
        except OSError:  # another run's
            return


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """No other process is in such a block for this folder, where the system has file locks."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    try:
        file = (run_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise RunError(f"cannot write {run_dir / LOCK_FILE}: {reason(error)}") from None
    with file:  # which stays: another process may have it open, to wait for its turn
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process trains in {run_dir}") from None
        except OSError:  # a file system without them
            pass
        yield


def _cut_off(path: Path, n_bytes: int) -> None:
    """Drop what lies behind the first n_bytes of a file."""
    try:
        size = path.stat().st_size
        if size >= n_bytes:
            os.truncate(path, n_bytes)
    except OSError as error:
        raise RunError(f"cannot write {path}: {reason(error)}") from None
    if size < n_bytes:
        raise RunError(f"{path} has {size} bytes, but had {n_bytes} at the checkpoint; put the old one back")


def _own_sinks(job: Job) -> list[Sink]:
    own: list[Sink] = [JsonlSink(job.run_dir / METRICS_FILE)]
    if job.config.log.wandb is not None:
        described = job.config.model_dump(mode="json")
        own.append(WandbSink(job.config.log.wandb, job.run_dir.name, described, job.run_dir))
    return own
