"""What a person sees: the live bar, the closing table, and the same figures as JSON."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastsae import __version__
from fastsae.log import Row, Sink
from fastsae.metrics import short_count, size_text
from fastsae.train import Result

Metrics = Mapping[str, Mapping[str, Any]]

SUMMARY = ("l0", "fvu", "dead_fraction", "reconstruction_score", "ce_clean", "ce_spliced", "ce_zero")
BASELINES = {
    "mean_ablation": "mean ablation",
    "pca": "k principal components",
    "random_dictionary": "random dictionary",
}


class ConsoleSink(Sink):
    """A live bar that advances per batch; its figures refresh with each row of kind "train"."""

    SHOWN = ("loss", "l0", "fvu")

    def __init__(self, n_tokens: int, console: Console, figures: str = "filling the ring") -> None:
        self._figures: dict[str, str] = {}
        self._time = ""
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self._n, self._total, self._tenth = 0, n_tokens, 0
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("train", total=n_tokens, count=self._count(), figures=figures)
        self._bar.start()

    def _count(self) -> str:
        return f"{short_count(self._n)}/{short_count(self._total)}"

    def advance(self, n_tokens: int) -> None:
        self._n += n_tokens
        self._bar.update(self._task, advance=n_tokens, count=self._count())

    def row(self, row: Row) -> None:
        if row["kind"] == "train":
            shown = [f"{name} {row[name]:.3g}" for name in self.SHOWN]
            dead = next((f"{k.split('_')[0]} {v:.1%}" for k, v in row.items() if k.startswith("dead_")), "")
            speed = f"{short_count(round(row['tokens_per_second']))} tok/s"
            self._figures[row["sae"]] = " ".join([*shown, dead, speed])
            self._show()
            tenth = 10 * self._n // self._total
            if not self._bar.console.is_terminal and tenth > self._tenth:  # in a file: a line now and then
                self._tenth = tenth
                self._bar.console.print(f"{self._count()} {self._figures[row['sae']]}", soft_wrap=True)
        elif row["kind"] == "time":
            self._time = shares(row)
            self._show()
        elif "message" in row:
            self._bar.console.print(row["message"], highlight=False)

    def _show(self) -> None:
        if not self._figures:
            return
        more = f" (+{len(self._figures) - 1} more)" if len(self._figures) > 1 else ""
        self._bar.update(
            self._task, figures=f"{next(iter(self._figures.values()))}{more} {self._time}".rstrip()
        )

    def close(self) -> None:
        self._bar.stop()


def shares(row: Row) -> str:
    """The parts that took most of the time of a row of kind "time": "forward 61% step 34%"."""
    seconds = {k.removeprefix("seconds_"): v for k, v in row.items() if k.startswith("seconds_")}
    total = sum(seconds.values()) or 1.0
    large = sorted(((s / total, part) for part, s in seconds.items()), reverse=True)[:3]
    return " ".join(f"{part} {share:.0%}" for share, part in large if share >= 0.05)


def figures_json(metrics: Metrics) -> dict[str, Any]:
    """The closing figures: plain values for one SAE, maps by name for several.

    dead_fraction is the share of latents that never fired on the validation tokens.
    """
    rows = {key: {**row, "dead_fraction": row.get("silent_fraction")} for key, row in metrics.items()}
    names = (
        *SUMMARY,
        "mse",
        "kl",
        "reconstruction_score_se",
        "n_validation_tokens",
        "ce_reason",
        "baselines",
    )
    by_name = {name: {key: row.get(name) for key, row in rows.items()} for name in names}
    if len(rows) == 1:
        return {name: next(iter(values.values())) for name, values in by_name.items()}
    return by_name


def versions() -> dict[str, str]:
    """Python, and the packages that decide what a run computes."""
    found = {"python": platform.python_version(), "fastsae": __version__}
    for package in ("torch", "triton", "transformer-lens", "transformers", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def summary(result: Result, device: torch.device) -> dict[str, Any]:
    """What `fastsae train --json` prints as its last line."""
    return {
        "run_dir": str(result.run_dir),
        "n_tokens": result.n_tokens,
        "tokens_per_second": result.tokens_per_second,
        "interrupted": result.interrupted,
        **figures_json(result.metrics),
        "device": device_name(device),
        "versions": versions(),
    }


def closing_table(metrics: Metrics) -> Table:
    """Per SAE its figures on the held-out tokens, and under it the baselines at the same l0; those of the last steps where nothing was validated."""
    validated = any("n_validation_tokens" in row for row in metrics.values())
    title = "on held-out tokens" if validated else "of the last training steps, not validated"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("", overflow="fold")
    for name in ("score", "fvu", "l0", "silent", "CE", "CE clean", "CE zero"):
        table.add_column(name, justify="right", no_wrap=True)
    reasons = []
    for key, row in metrics.items():
        figures = [row.get("reconstruction_score"), row.get("fvu"), row.get("l0")]
        silent = row.get("silent_fraction")
        ce = [_figure(row.get(name)) for name in ("ce_spliced", "ce_clean", "ce_zero")]
        table.add_row(key, *map(_figure, figures), "-" if silent is None else f"{silent:.1%}", *ce)
        for name, title in BASELINES.items():
            base = (row.get("baselines") or {}).get(name)
            if base is not None:
                table.add_row(
                    f"  {title}", *(_figure(base.get(n)) for n in ("score", "fvu", "l0")), style="dim"
                )
        if row.get("ce_reason"):
            reasons.append(f"{key}: no cross-entropy, {row['ce_reason']}")
    table.caption = "\n".join(reasons) or None
    return table


def memory_table(mem_bytes: Mapping[str, int]) -> Table:
    """Predicted memory per part; the source model and its forward come on top."""
    table = Table("part", "predicted memory", title="without the source model", title_justify="left")
    on_device = {part: n_bytes for part, n_bytes in mem_bytes.items() if part != "host"}
    for part, n_bytes in {**on_device, "total": sum(on_device.values())}.items():
        table.add_row(part, size_text(n_bytes))
    if "host" in mem_bytes:
        table.add_row("ring, in host memory", size_text(mem_bytes["host"]))
    return table


def info_table(facts: Mapping[str, str]) -> Table:
    """Names and versions, two columns."""
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
