"""Figures under the keys of that library's dashboards, and checkpoints as artifacts, on wandb."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastsae.errors import first_line
from fastsae.evaluate import Validation


def training_row(figures: dict[str, float], d_in: int, d_sae: int) -> dict[str, float]:
    """What `TrainStep.read` returned, in that library's scale."""
    dead = next(value for key, value in figures.items() if key.startswith("dead_fraction_"))
    row = {
        "loss/total": figures["loss"] / d_in,
        "loss/l1_learned_activations": figures["l1"],
        "loss/l2_reconstruction": figures["mse"] / d_in,
        "train/l0_norm": figures["l0"],
        "train/neuron_activity": dead * d_sae,
    }
    if "resampled_latents" in figures:
        row["resample/dead_neurons"] = figures["resampled_latents"]
    return row


def with_means(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """{component: {figure: value}} as {"<figure>/<component>": value}, and "<figure>/mean"."""
    flat = {f"{figure}/{name}": value for name, row in rows.items() for figure, value in row.items()}
    for figure in next(iter(rows.values())):
        flat[f"{figure}/mean"] = sum(row[figure] for row in rows.values()) / len(rows)
    return flat


def validation_row(found: dict[str, Validation]) -> dict[str, float]:
    """Per component the source model's losses and the reconstruction score, and the mean of the latter."""
    losses = "validation/source_model_losses"
    row: dict[str, float | None] = {}
    for name, v in found.items():
        row |= {
            f"{losses}/{name}": v.ce_clean,
            f"{losses}_with_reconstruction/{name}": v.ce_spliced,
            f"{losses}_with_zero_ablation/{name}": v.ce_zero,
            f"validation/reconstruction_score/{name}": v.reconstruction_score,
        }
    scores = [v.reconstruction_score for v in found.values() if v.reconstruction_score is not None]
    if scores:
        row["validation/reconstruction_score/mean"] = sum(scores) / len(scores)
    return {key: value for key, value in row.items() if value is not None}


def _wandb_run() -> Any:
    """The active run of wandb, where it was imported and has one."""
    return getattr(sys.modules.get("wandb"), "run", None)


def log(row: dict[str, float]) -> None:
    """To wandb, where a run of it is active; a failure is a warning."""
    run = _wandb_run()
    if run is not None:
        with _warned("wandb did not take the figures"):
            run.log(row)


def upload(folder: Path) -> None:
    """As an artifact of wandb's active run, where there is one. A failure is a warning: what is on disk is there."""
    run = _wandb_run()
    if run is None:
        return
    with _warned(f"{folder} was saved and not uploaded"):
        import wandb

        artifact = wandb.Artifact(folder.name, type="model")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """An error in this block is a warning."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever a network and wandb raise
        warnings.warn(f"{what}: {first_line(error)}", stacklevel=5)  # of the caller's caller
