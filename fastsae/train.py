"""A run: `train` from a config to a Result, and the loop, which reads from top to bottom."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.checkpoint import Checkpoint, save_checkpoint, save_final
from fastsae.compiled import with_compiled_blocks
from fastsae.config import RunConfig
from fastsae.configfile import to_toml
from fastsae.errors import DataError, FastSAEError, NonFiniteLossError, RunError
from fastsae.evaluate import Validation, evaluate
from fastsae.folder import METRICS_FILE, last_figures, outputs
from fastsae.harvest import DiskFeeder, Feeder, Harvester
from fastsae.init import initialise
from fastsae.interrupt import InterruptedRun, interruptible, until
from fastsae.log import Sink, WarningSink
from fastsae.memory import refused_if_too_large
from fastsae.origin import ACTIVATIONS
from fastsae.prepare import Job, prepare
from fastsae.resume import config_of, is_finished, machine, mark, newest, other_machine
from fastsae.ring import RingBuffer
from fastsae.sae import SAE
from fastsae.step import TrainStep
from fastsae.timeline import Timeline

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
    """Over the first fill and the loop: without loading, initialisation, what a resume brings again, validation and checkpoints."""
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
        sinks: where figures go beside metrics.jsonl; by default messages become warnings.
    Raises: a FastSAEError, in one line, for all that a user can mend. Ctrl-C ends with a checkpoint and
        a Result that says interrupted; before the first step it is a plain KeyboardInterrupt.
    """
    return run(prepare(config, model=model, activations=activations), sinks or [WarningSink()])


def resume(
    run_dir: Path | str,
    overrides: Mapping[str, Any] | None = None,
    *,
    model: Any = None,
    sinks: Sequence[Sink] = (),
) -> Result:
    """Go on with a run that was stopped, from its newest checkpoint: on the same machine to the bit as if it had not been.

    Args:
        overrides: of the sections save and log, and of device, nested like the config's file; anything else goes on as it began.
        model: the model object that the run was begun with, where it was.
    Raises: as `train`; ConfigError that names another field that is overridden, RunError for a run that is finished, has no checkpoint, or
        was trained on given activations.
    """
    run_dir = Path(run_dir).resolve()
    checkpoint, config = newest(run_dir), config_of(run_dir, overrides)
    if is_finished(run_dir, checkpoint, config):
        raise RunError(f"the run {run_dir} is finished: {config.n_tokens:,} activations")
    return run(prepare(config, model=model, checkpoint=checkpoint), sinks or [WarningSink()])


def run(job: Job, sinks: Sequence[Sink] = ()) -> Result:
    """Train a prepared job; see `train`. The run folder is made after the first fill of the ring."""
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    try:
        job = _with_compiled_blocks(job)
        with interruptible() as stop:
            clock, timeline = _Clock(), Timeline(job.device)
            ring = _ring(job)
            feeder = _feeder(job, ring, timeline)
            more = until(stop, _pieces(job, ring) if feeder is None else feeder.forward)
            with timeline.part("ring"):
                if job.checkpoint is None:
                    ring.fill(more)
                elif feeder is not None:
                    with clock.stopped():
                        _fill_again(job.checkpoint, ring, feeder, stop)
            if ring.n_written == 0:
                raise DataError("the dataset ended before its first activation; nothing was trained")
            with clock.stopped():
                steps = _steps(job, ring)
            with outputs(job, sinks) as sink:
                return _Loop(job, steps, feeder, sink, stop, clock, timeline).run(ring, more)
    finally:
        job.close()


class _Loop:
    """The loop, and what it has reached."""

    def __init__(
        self,
        job: Job,
        steps: dict[str, TrainStep],
        feeder: Feeder | None,
        sink: Sink,
        stop: threading.Event,
        clock: "_Clock",
        timeline: Timeline,
    ) -> None:
        self.job, self.steps, self.feeder = job, steps, feeder
        self.sink, self.stop, self.clock, self.timeline = sink, stop, clock, timeline
        state = {} if job.checkpoint is None else job.checkpoint.state
        self.n_tokens: int = state.get("n_tokens", 0)
        self.n_done: int = state.get("step", 0)
        self.n_rows: int = state.get("n_rows", 0)  # of the last batch
        self.n_before: int = self.n_tokens
        self.mark = None if job.source is None else mark(job.source.model)
        if job.shards is not None:
            self.mark = job.shards.identity
        self.figures: dict[str, dict[str, Any]] = {}
        self.validations: dict[str, Validation] = {}
        self.last_checkpoint: Path | None = None
        self.reported_at = self.saved_at = self.validated_at = -1

    def run(self, ring: RingBuffer, more: Callable[[], bool]) -> Result:
        config, save = self.job.config, self.job.config.save
        batches = ring.batches(more)
        with self.saved_where_it_fails(ring), suppress(InterruptedRun):
            of = "first fill" if self.job.checkpoint is None else "resume"
            self.log("time", "", {"of": of, **self.timeline.read()})
            if self.job.checkpoint is not None:
                self.go_on(self.job.checkpoint)
            while (batch := self.next_of(batches)) is not None:
                with self.timeline.part("step"):
                    for key, step in self.steps.items():
                        step(batch[self.job.hook_of[key]])
                self.n_rows = len(next(iter(batch.values())))
                self.n_tokens += self.n_rows
                self.n_done += 1
                self.sink.advance(self.n_rows)
                checkpoint = crossed(self.n_tokens, self.n_rows, save.checkpoint_every)
                if self.n_done % config.log.every == 0 or self.is_to_validate() or checkpoint:
                    self.report()
                if checkpoint:
                    self.checkpoint(ring)
                if self.stop.is_set():
                    break
                if self.is_to_validate():
                    self.validate()
        tokens_per_second = self.speed()
        with self.saved_where_it_fails(ring):
            self.report()
            self.checkpoint(ring)
        for step in self.steps.values():
            step.optimizer.take_average()
        save_final(self.job.run_dir, self.job.saes)
        self.validations = {}
        interrupted = self.stop.is_set() and self.n_tokens < config.n_tokens
        if not interrupted:
            self.warn_if_early()
            with suppress(InterruptedRun):
                self.validate(baselines=save.baselines)
        self.log("time", "", {"of": "the end", **self.timeline.read()})
        rows = {key: validation.row() for key, validation in self.validations.items()}
        metrics = {key: {**self.figures.get(key, {}), **rows.get(key, {})} for key in self.steps}
        return Result(self.job.saes, metrics, self.job.run_dir, self.n_tokens, tokens_per_second, interrupted)

    @contextmanager
    def saved_where_it_fails(self, ring: RingBuffer) -> Iterator[None]:
        """A checkpoint before an error ends the run; a step whose loss is not finite has moved nothing, so that the weights are good."""
        try:
            yield
        except (DataError, RunError, NonFiniteLossError) as error:
            with suppress(FastSAEError):
                self.checkpoint(ring)
            last = self.last_checkpoint or "none: nothing good could be written"
            raise type(error)(f"{error}; the run ends, its last checkpoint is {last}") from None

    def go_on(self, checkpoint: Checkpoint) -> None:
        """With what came between the checkpoint and the next batch."""
        self.sink.advance(self.n_tokens)
        self.reported_at = self.saved_at = self.n_done
        self.last_checkpoint = checkpoint.folder
        self.figures = last_figures(self.job.run_dir / METRICS_FILE)
        if message := other_machine(checkpoint, self.job.device):
            self.log("warning", "", {"message": message})
        if self.is_to_validate() and not checkpoint.state.get("validated"):
            self.validate()

    def next_of(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        with self.timeline.part("ring"):
            return next(batches, None)

    def is_to_validate(self) -> bool:
        """Whether the last batch crossed a multiple of save.validate_every; at the end there is one anyway."""
        due = crossed(self.n_tokens, self.n_rows, self.job.config.save.validate_every)
        return due and self.n_tokens < self.job.config.n_tokens

    def speed(self) -> float:
        """Activations per second of this part of the run."""
        n: float = self.n_tokens - self.n_before
        return n / self.clock.seconds()

    def log(self, kind: str, key: str, row: dict[str, Any]) -> None:
        self.sink.row({"kind": kind, "n_tokens": self.n_tokens, "step": self.n_done, "sae": key, **row})

    def report(self) -> None:
        """Read the counters and log them, once per step: the one place where the loop waits for the device."""
        if self.reported_at == self.n_done:
            return
        self.reported_at = self.n_done
        bad = {}
        for key, step in self.steps.items():
            row = self.figures[key] = step.read()
            bad[key] = row.pop("first_bad_step")
            self.log("train", key, {**row, "tokens_per_second": self.speed()})
        self.log("time", "", {"of": "the loop", **self.timeline.read()})
        for key, at in bad.items():
            if at >= 0:
                again = "" if self.feeder is None else "; a resume goes on behind it"
                raise NonFiniteLossError(
                    f"the loss of {key} became NaN or infinite at step {at:.0f}, which moved nothing{again}"
                )

    def validate(self, baselines: bool = False) -> None:
        """Evaluate every SAE on the held-out tokens, where there are any."""
        job = self.job
        if job.source is None or job.tokens is None:
            return
        with self.clock.stopped(), self.timeline.part("validation"), ExitStack() as averages:
            for step in self.steps.values():
                averages.enter_context(step.optimizer.averaged())
            saes = {key: (job.hook_of[key], sae) for key, sae in job.saes.items()}
            held_out, batch_size = job.tokens.validation, job.config.model.batch_size
            try:
                self.validations = evaluate(
                    job.source, saes, held_out, batch_size=batch_size, baselines=baselines
                )
            except KeyboardInterrupt:
                raise InterruptedRun from None
        for key, validation in self.validations.items():
            self.log("validation", key, validation.row())
        self.validated_at = self.n_done

    def checkpoint(self, ring: RingBuffer) -> None:
        """Save everything, once per step. Raises NonFiniteLossError in place of saving NaN or infinity."""
        if self.saved_at == self.n_done:
            return
        job = self.job
        for key, sae in job.saes.items():
            if not all(bool(p.isfinite().all()) for p in sae.parameters()):
                raise NonFiniteLossError(f"the weights of {key} became NaN or infinite by step {self.n_done}")
        self.saved_at = self.n_done
        at = ring.state_dict()
        forwards, tensors = ({}, {}) if self.feeder is None else self.feeder.state_dict(at["fill_number"])
        state = {
            "step": self.n_done,
            "n_rows": self.n_rows,
            "validated": self.validated_at == self.n_done,
            "metrics_bytes": (job.run_dir / METRICS_FILE).stat().st_size,
            "model": self.mark,
            "model_given": job.model_given,
            "machine": machine(job.device),
            "ring": at,
            "forwards": forwards,
        }
        with self.clock.stopped():
            self.last_checkpoint = save_checkpoint(
                job.run_dir,
                self.n_tokens,
                self.steps,
                state,
                tensors,
                ring.rows() if job.config.save.ring else None,
                to_toml(job.config),
                job.config.save.keep,
            )

    def warn_if_early(self) -> None:
        if self.n_tokens < self.job.config.n_tokens:
            what, more = "dataset", ' (data.on_exhausted = "repeat" would begin another epoch)'
            if self.job.tokens is not None and (held := self.job.tokens.train.n_held_out):
                more += (
                    f"; its first {held:,} documents are held out for validation (data.n_validation_tokens)"
                )
            if self.job.rows is not None:
                what, more = "iterable", ""
            message = (
                f"the {what} ended after {self.n_tokens:,} of n_tokens = {self.job.config.n_tokens:,} activations;"
                f" the run ends here{more}"
            )
            self.log("warning", "", {"message": message})


def crossed(n: int, n_new: int, every: int | None) -> bool:
    """Whether a multiple of `every` lies among the last `n_new` of `n`."""
    return every is not None and n // every > (n - n_new) // every


def _with_compiled_blocks(job: Job) -> Job:
    """Its config says whether the source model's blocks are compiled, as they are from here on."""
    config, done = job.config, 0 if job.checkpoint is None else job.checkpoint.state["n_tokens"]
    if job.source is None:
        return job
    n_left = config.n_tokens - done
    return replace(job, config=with_compiled_blocks(config, job.source, n_left, config.model.compile))


def _ring(job: Job) -> RingBuffer:
    config = job.config
    with refused_if_too_large(f"ring.capacity = {config.ring.capacity}"):
        return RingBuffer(
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


def _steps(job: Job, ring: RingBuffer) -> dict[str, TrainStep]:
    """A step per SAE, whose scale and start follow from the first fill, or as the checkpoint has it."""
    for key, sae in job.saes.items() if job.checkpoint is None else ():
        initialise(sae, lambda hook=job.hook_of[key]: ring.chunks(hook, CHUNK_ROWS))  # type: ignore[misc]
        if key in job.initial:
            sae.load_folded(job.initial[key])
    dead = job.config.dead
    steps = {
        key: TrainStep(
            sae,
            job.steps[key],
            job.n_steps,
            resample=dead if dead.method == "resample" else None,
            seed=job.config.seed,
        )
        for key, sae in job.saes.items()
    }
    if job.checkpoint is not None:
        for key, step in steps.items():
            job.checkpoint.restore(key, step)
    return steps


def _feeder(job: Job, ring: RingBuffer, timeline: Timeline) -> Feeder | None:
    """What can bring the same rows again: the source model, or activations on disk. None for those of an iterable."""
    config = job.config
    if job.shards is not None:
        return DiskFeeder(
            job.shards,
            list(job.widths),
            ring,
            size=job.max_write,
            seed=config.seed,
            repeat=config.data.on_exhausted == "repeat",
            timeline=timeline,
        )
    if job.source is None or job.tokens is None:
        return None
    return Harvester(job.source, job.tokens.train, ring, config.model.batch_size, timeline)


def _fill_again(checkpoint: Checkpoint, ring: RingBuffer, feeder: Feeder, stop: threading.Event) -> None:
    """The ring as the checkpoint has it: by its rows where they were saved, else by the forwards that brought them."""
    state = checkpoint.state
    if checkpoint.ring is not None:
        ring.put_back(state["ring"], checkpoint.ring)
        feeder.skip(state["forwards"], checkpoint.forwards)
        checkpoint.ring = None  # its memory
    else:
        again = feeder.replay(state["forwards"], checkpoint.forwards)
        ring.restore(state["ring"], until(stop, again))


def _pieces(job: Job, ring: RingBuffer) -> Callable[[], bool]:
    assert job.rows is not None
    pieces = (piece for chunk in job.rows for piece in chunk.split(job.max_write))

    def write_one() -> bool:
        piece = next(pieces, None)
        if piece is None:
            return False
        with ring.writing(torch.arange(len(piece))) as write:
            write(ACTIVATIONS, piece.to(ring.device))
        return True

    return write_one


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
