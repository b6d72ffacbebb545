"""Where figures go: a file, wandb, the console (report.py). The loop talks to one sink and asks nothing."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastsae.errors import RunError, reason
from fastsae.metrics import to_json

Row = Mapping[str, Any]

WANDB_ID_FILE = ".wandb-id"


class Sink:
    """Takes everything and does nothing; what a run without outputs writes to."""

    def advance(self, n_tokens: int) -> None:
        """`n_tokens` more activations were trained on."""

    def row(self, row: Row) -> None:
        """One row of figures: kind ("train" | "validation" | ...), n_tokens, step, sae, and the figures."""

    def close(self) -> None:
        """The run is over."""


class JsonlSink(Sink):
    """One JSON object a line, each flushed, so that a stopped run has all of them."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def row(self, row: Row) -> None:
        try:
            self._file.write(to_json(dict(row)) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self._file.name}: {reason(error)}") from None

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said already
            self._file.close()


class WandbSink(Sink):
    """Rows as wandb metrics named <kind>/<figure>/<sae>, with n_tokens as the x axis.

    A resumed run goes on in wandb's run of the same id, kept in `folder`; what that has from behind the checkpoint stays.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        known = folder / WANDB_ID_FILE
        own = known.read_text(encoding="utf-8") if known.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                config=dict(config),
                dir=str(folder),
                id=own,
                resume="allow" if own else None,
            )
        except wandb.errors.Error as error:
            raise RunError(f"wandb cannot log to {project}: {reason(error)}") from None
        known.write_text(self._run.id, encoding="utf-8")
        self._run.define_metric("n_tokens")
        self._run.define_metric("*", step_metric="n_tokens")

    def row(self, row: Row) -> None:
        figures = {
            f"{row['kind']}/{name}/{row['sae']}": value
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("n_tokens", "step")
        }
        if figures:
            self._run.log({**figures, "n_tokens": row["n_tokens"]})

    def close(self) -> None:
        self._run.finish()


class WarningSink(Sink):
    """Python's warnings for rows with a message: for runs that no console follows."""

    def row(self, row: Row) -> None:
        if "message" in row:
            warnings.warn(row["message"], stacklevel=2)


class Sinks(Sink):
    """Several sinks as one; closes all of them at the end of its block."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def advance(self, n_tokens: int) -> None:
        for sink in self._sinks:
            sink.advance(n_tokens)

    def row(self, row: Row) -> None:
        for sink in self._sinks:
            sink.row(row)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
