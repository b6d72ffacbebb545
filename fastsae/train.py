"""A run: `train` from a config to a Result, and the loop, which reads from top to bottom."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.checkpoint import SAES, save_checkpoint, save_saes
from fastsae.config import RunConfig
from fastsae.configfile import to_toml
from fastsae.errors import DataError, NonFiniteLossError, RunError
from fastsae.evaluate import Validation, evaluate
from fastsae.harvest import Harvester
from fastsae.init import initialise
from fastsae.log import JsonlSink, Sink, Sinks, WandbSink
from fastsae.prepare import ACTIVATIONS, Job, prepare
from fastsae.ring import RingBuffer
from fastsae.sae import SAE
from fastsae.step import TrainStep

CONFIG_FILE, METRICS_FILE = "config.toml", "metrics.jsonl"
CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Result:
    """What a run leaves. Keys are "<hook point>", or "<hook point>/<entry>" where [[saes]] has several."""

    saes: dict[str, SAE]
    metrics: dict[str, dict[str, Any]]
    """Per SAE the figures of the last training row, and over them those of the final validation."""
    run_dir: Path
    n_tokens: int
    """Activations trained on, per SAE."""
    tokens_per_second: float
    """Over the loop: without set-up, validation and checkpoints."""
    interrupted: bool


def train(
    config: RunConfig,
    *,
    model: Any = None,
    activations: Iterable[Tensor] | None = None,
    sinks: Sequence[Sink] = (),
) -> Result:
    """Train every SAE of `config` and write the run folder.

    Args:
        model: a TransformerBridge or HookedTransformer to use in place of config.model.name.
        activations: tensors [n, d_in] to train on in place of a source model; nothing is validated then.
        sinks: where figures go beside metrics.jsonl.
    Raises: a FastSAEError, in one line, for all that a user can mend. Ctrl-C ends with a checkpoint and
        a Result that says interrupted; before the first step it is a plain KeyboardInterrupt.
    """
    return run(prepare(config, model=model, activations=activations), sinks)


def run(job: Job, sinks: Sequence[Sink] = ()) -> Result:
    """Make the run folder and train; see `train`."""
    try:
        _make_run_dir(job)
        own: list[Sink] = [JsonlSink(job.run_dir / METRICS_FILE)]
        if job.config.log.wandb is not None:
            own.append(
                WandbSink(
                    job.config.log.wandb, job.run_dir.name, job.config.model_dump(mode="json"), job.run_dir
                )
            )
        with Sinks([*own, *sinks]) as sink, _interruptible() as stop:
            return _loop(job, sink, stop)
    finally:
        job.close()


def _loop(job: Job, sink: Sink, stop: threading.Event) -> Result:
    config, save = job.config, job.config.save
    ring = RingBuffer(
        job.widths,
        config.ring.capacity,
        min(config.step.batch_size, config.n_tokens),
        n_rows=config.n_tokens,
        max_write=job.max_write,
        device=job.device,
        dtype=job.ring_dtype,
        placement=config.ring.placement,
        seed=config.seed,
    )
    more = _feeder(job, ring, stop)
    ring.fill(more)
    if ring.n_written == 0:
        raise DataError("the dataset ended before its first activation; nothing was trained")
    for key, sae in job.saes.items():
        initialise(sae, lambda hook=job.hook_of[key]: ring.chunks(hook, CHUNK_ROWS))  # type: ignore[misc]
        if key in job.initial:
            sae.load_folded(job.initial[key])
    steps = {key: TrainStep(sae, job.steps[key], job.n_steps) for key, sae in job.saes.items()}

    n_tokens = n_done = 0
    figures: dict[str, dict[str, Any]] = {}
    validations: dict[str, Validation] = {}
    last_checkpoint: Path | None = None
    clock = _Clock()

    def log(kind: str, key: str, row: dict[str, Any]) -> None:
        sink.row({"kind": kind, "n_tokens": n_tokens, "step": n_done, "sae": key, **row})

    def report() -> None:
        for key, step in steps.items():
            figures[key] = step.read()  # the one place where the loop waits for the device
            bad = figures[key].pop("first_bad_step")
            if bad >= 0:
                raise NonFiniteLossError(
                    f"the loss of {key} became NaN or infinite at step {bad:.0f}; last good checkpoint: "
                    f"{last_checkpoint or 'none yet'}; config: {job.run_dir / CONFIG_FILE}"
                )
            log("train", key, {**figures[key], "tokens_per_second": n_tokens / clock.seconds()})

    def validate(baselines: bool = False) -> None:
        if job.source is None or job.tokens is None:
            return
        with clock.stopped():
            saes = {key: (job.hook_of[key], sae) for key, sae in job.saes.items()}
            held_out, batch_size = job.tokens.validation, config.model.batch_size
            validations.update(
                evaluate(job.source, saes, held_out, batch_size=batch_size, baselines=baselines)
            )
        for key, result in validations.items():
            log("validation", key, _figures(result))

    def checkpoint() -> None:
        nonlocal last_checkpoint
        position = job.tokens.train.state_dict() if job.tokens is not None else {}
        with clock.stopped():
            state = {"step": n_done, "ring": ring.state_dict(), "tokens": position}
            last_checkpoint = save_checkpoint(job.run_dir, n_tokens, steps, state, save.keep)

    try:
        for batch in ring.batches(more):
            for key, step in steps.items():
                step(batch[job.hook_of[key]])
            n_rows = len(next(iter(batch.values())))
            n_tokens += n_rows
            n_done += 1
            sink.advance(n_rows)
            due_validation = crossed(n_tokens, n_rows, save.validate_every)
            due_checkpoint = crossed(n_tokens, n_rows, save.checkpoint_every) or n_tokens == config.n_tokens
            if n_done % config.log.every == 0 or due_validation or due_checkpoint:
                report()
            if due_validation and n_tokens < config.n_tokens:
                validate()
            if due_checkpoint:
                checkpoint()
            if stop.is_set():
                break
    except KeyboardInterrupt:  # between two forwards of a fill
        pass
    tokens_per_second = n_tokens / clock.seconds()
    if n_tokens < config.n_tokens:  # interrupted, or the dataset ended early
        report()
        checkpoint()
    if n_tokens < config.n_tokens and not stop.is_set():
        message = (
            f"the dataset ended after {n_tokens:,} of n_tokens = {config.n_tokens:,} activations; the run ends "
            'here (data.on_exhausted = "repeat" would begin another epoch)'
        )
        log("warning", "", {"message": message})
    if not stop.is_set():
        validate(baselines=True)
    save_saes(job.run_dir / SAES, job.saes)
    metrics = {
        key: {**figures[key], **(_figures(validations[key]) if key in validations else {})} for key in steps
    }
    return Result(job.saes, metrics, job.run_dir, n_tokens, tokens_per_second, stop.is_set())


def _figures(result: Validation) -> dict[str, Any]:
    """A validation as part of a row, where n_tokens are those trained on."""
    figures = asdict(result)
    return {"n_validation_tokens": figures.pop("n_tokens"), **figures}


def crossed(n: int, n_new: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies among the last `n_new` of `n`."""
    return every is not None and n // every > (n - n_new) // every


def _feeder(job: Job, ring: RingBuffer, stop: threading.Event) -> Callable[[], bool]:
    """What brings more rows: one forward, or one piece of given activations; an interrupt ends it in between."""
    if job.rows is None:
        assert job.source is not None
        assert job.tokens is not None
        write = Harvester(job.source, job.tokens.train, ring, job.config.model.batch_size).forward
    else:
        write = _pieces(job.rows, ring, job.max_write)

    def more() -> bool:
        if stop.is_set():
            raise KeyboardInterrupt
        return write()

    return more


def _pieces(rows: Iterator[Tensor], ring: RingBuffer, size: int) -> Callable[[], bool]:
    pieces = (piece for chunk in rows for piece in chunk.split(size))
    width = None

    def more() -> bool:
        nonlocal width
        piece = next(pieces, None)
        if piece is None:
            return False
        width = width or piece.shape[1]
        if piece.ndim != 2 or piece.shape[1] != width:
            raise DataError(f"activations must all be [n, {width}]; got {tuple(piece.shape)}")
        with ring.writing(torch.arange(len(piece))) as write:
            write(ACTIVATIONS, piece.to(ring.device))
        return True

    return more


def _make_run_dir(job: Job) -> None:
    try:
        job.run_dir.mkdir(parents=True)
        (job.run_dir / CONFIG_FILE).write_text(to_toml(job.config), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the run folder {job.run_dir}: {error.strerror or error}") from None


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that a step is never cut in half; a second Ctrl-C raises."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Clock:
    """Seconds since it was made, without those in `stopped` blocks."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - before
