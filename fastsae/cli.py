"""The command line: flags become overrides of the config, the config becomes one call."""

import math
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastsae import __version__
from fastsae.configfile import load_config, parse_assignment, to_toml
from fastsae.errors import ConfigError, FastSAEError
from fastsae.metrics import size_text, to_json

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path | None,
    typer.Argument(help="TOML file; without one and without --model, the built-in demo.", show_default=False),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other field: section.field=value.", metavar="FIELD=VALUE"),
]
INTEGERS, NUMBERS = "INTEGER[,...]", "NUMBER[,...]"
Json = Annotated[bool, typer.Option("--json", help="Last line of standard output is one JSON object.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train sparse autoencoders on the activations of language models."""


@app.command()
def train(
    config: Config = None,
    model: Annotated[str | None, typer.Option(help="Hub name or folder of the source model.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="Hook point; may be repeated, and hold a *.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub name, file or folder of the text.")] = None,
    activations: Annotated[
        Path | None,
        typer.Option(help="Folder of `fastsae harvest`, in place of --model and --dataset.", metavar="DIR"),
    ] = None,
    activation: Annotated[str | None, typer.Option(help="relu, topk, batchtopk or jumprelu.")] = None,
    d_sae: Annotated[str | None, typer.Option(help="Latents.", metavar=INTEGERS)] = None,
    k: Annotated[
        str | None, typer.Option(help="Active latents per token, for topk and batchtopk.", metavar=INTEGERS)
    ] = None,
    l1: Annotated[str | None, typer.Option(help="Weight of the L1 term, for relu.", metavar=NUMBERS)] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate.", metavar=NUMBERS)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Activations per step.")] = None,
    context_size: Annotated[int | None, typer.Option(help="Tokens per context.")] = None,
    n_tokens: Annotated[str | None, typer.Option(help="Activations to train on.", metavar="INTEGER")] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of everything random.", metavar=INTEGERS)] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu or auto.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The source model's: float32, bfloat16 or float16.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="The step's: fp32, tf32 or bf16.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; a fresh one by default.")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Folder of all runs.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="SAE, checkpoint or run to start from.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run to go on with, from its newest checkpoint.", metavar="RUN")
    ] = None,
    save_ring: Annotated[
        bool, typer.Option("--save-ring", help="Checkpoints hold the ring: a resume runs no forward again.")
    ] = False,
    wandb: Annotated[str | None, typer.Option(help="Project on Weights & Biases.", metavar="PROJECT")] = None,
    set_: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the config, train nothing.")
    ] = False,
    json_: Json = False,
) -> None:
    """Train the SAEs of a config. Without arguments: the built-in demo, offline, in a few minutes.

    Several values with commas between them (--d-sae 4096,16384 --k 16,32) are an SAE each, every combination, from the same forwards.
    """
    lists = {
        "d_sae": _values("--d-sae", d_sae, int),
        "k": _values("--k", k, int),
        "l1_coefficient": _values("--l1", l1, float),
        "lr": _values("--lr", lr, float),
        "seed": _values("--seed", seed, int),
    }
    one = {name: values[0] if len(values) == 1 else None for name, values in lists.items()}
    fields = {
        "n_tokens": _whole("--n-tokens", n_tokens),
        "seed": lists["seed"][0] if lists["seed"] else None,
        "saes": grid({name: values for name, values in lists.items() if len(values) > 1}),
        "device": device,
        "name": name,
        "runs_dir": runs_dir and str(runs_dir),
        "init_from": init_from and str(init_from),
        "model": {"name": model, "hook": hook or None, "dtype": dtype},
        "data": {
            "dataset": dataset,
            "context_size": context_size,
            "activations": activations and str(activations.absolute()),
        },
        "sae": {"activation": activation, "d_sae": one["d_sae"], "k": one["k"]},
        "step": {
            "l1_coefficient": one["l1_coefficient"],
            "lr": one["lr"],
            "batch_size": batch_size,
            "precision": precision,
        },
        "save": {"ring": save_ring or None},
        "log": {"wandb": wandb},
    }
    overrides = merged(fields, set_)
    if resume is not None and config is not None:
        raise ConfigError(f"--resume {resume} goes on with that run's own config; drop {config}")
    if resume is not None and overrides.get("saes"):
        raise ConfigError(f"--resume {resume} goes on with that run's own SAEs; drop the lists of values")
    if config is None and model is None and activations is None and resume is None:
        config = _demo(overrides)
    console = Console(stderr=json_)

    from fastsae.prepare import prepare
    from fastsae.report import ConsoleSink, closing_table, memory_table, summary
    from fastsae.resume import config_of, is_finished, newest
    from fastsae.train import run

    if resume is None:
        job = prepare(load_config(config, overrides))
    else:
        resume = resume.resolve()
        checkpoint, resolved = newest(resume), config_of(resume, overrides)
        if is_finished(resume, checkpoint, resolved):
            console.print(
                f"{resume} is finished: {resolved.n_tokens:,} activations", highlight=False, soft_wrap=True
            )
            if json_:
                print(to_json({"run_dir": str(resume), "n_tokens": resolved.n_tokens, "interrupted": False}))
            return
        job = prepare(resolved, checkpoint=checkpoint)
    if dry_run:
        job.close()
        if json_:
            print(to_json({"config": job.config.model_dump(mode="json"), "mem_bytes": job.mem_bytes}))
        else:
            print(to_toml(job.config), flush=True)
            console.print(memory_table(job.mem_bytes))
        return
    text = job.config.data.activations or job.config.data.dataset
    console.print(
        f"{job.config.model.name} on {text} -> {', '.join(job.saes)} -> {job.run_dir}",
        highlight=False,
        soft_wrap=True,
    )
    sink = ConsoleSink(job.config.n_tokens, console)
    try:
        result = run(job, [sink])
    except KeyboardInterrupt:
        print("interrupted at once: nothing more is saved", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        sink.close()
    console.print(closing_table(result.metrics))
    console.print(
        f"{result.n_tokens:,} activations, SAEs in {result.run_dir}/saes", highlight=False, soft_wrap=True
    )
    if job.shards is not None and not result.interrupted:
        console.print(
            f"fastsae eval {result.run_dir} validates with the model", highlight=False, soft_wrap=True
        )
    if result.interrupted:
        console.print(
            f"interrupted; fastsae train --resume {result.run_dir} goes on, fastsae eval {result.run_dir} validates it",
            highlight=False,
            soft_wrap=True,
        )
    if json_:
        print(to_json(summary(result, job.device)))
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
def harvest(
    out: Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")],
    config: Config = None,
    model: Annotated[str | None, typer.Option(help="Hub name or folder of the source model.")] = None,
    hook: Annotated[list[str] | None, typer.Option(help="Hook point; may be repeated, and hold a *.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub name, file or folder of the text.")] = None,
    context_size: Annotated[int | None, typer.Option(help="Tokens per context.")] = None,
    n_tokens: Annotated[str | None, typer.Option(help="Activations to write.", metavar="INTEGER")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the text.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu or auto.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The source model's: float32, bfloat16 or float16.")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Write activations to disk, for `fastsae train --activations DIR`. The same command goes on where it was interrupted."""
    fields = {
        "n_tokens": _whole("--n-tokens", n_tokens),
        "seed": seed,
        "device": device,
        "model": {"name": model, "hook": hook or None, "dtype": dtype},
        "data": {"dataset": dataset, "context_size": context_size},
    }
    overrides = merged(fields, set_)
    if config is None and model is None:
        config = _demo(overrides)
    resolved = load_config(config, overrides)

    from fastsae.collect import harvest as run
    from fastsae.report import ConsoleSink

    console = Console(stderr=json_)
    sink = ConsoleSink(resolved.n_tokens, console, "reading")
    try:
        done = run(resolved, out, advance=sink.advance)
    finally:
        sink.close()
    left = (
        f"; interrupted: the same command goes on to {resolved.n_tokens:,}, and begins the shard that had begun again"
        if done.interrupted
        else ""
    )
    if done.n_rows < resolved.n_tokens and not done.interrupted:
        left = f"; the dataset ended before {resolved.n_tokens:,}"
    console.print(
        f"{done.n_rows:,} activations per hook point in {done.folder}, {size_text(done.n_bytes)} to write{left}",
        highlight=False,
        soft_wrap=True,
    )
    if json_:
        print(to_json({"folder": str(done.folder), "n_rows": done.n_rows, "interrupted": done.interrupted}))
    if done.interrupted:
        raise typer.Exit(130)


def _demo(overrides: dict[str, Any]) -> Path:
    from fastsae.demo import config_path

    sae = overrides.get("sae")
    activation = sae.get("activation") if isinstance(sae, dict) else None
    return config_path(activation or "relu")


@app.command("eval")
def eval_(
    path: Annotated[
        Path, typer.Argument(help="Run folder, checkpoint, or SAE folder in one.", metavar="RUN")
    ],
    device: Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu or auto.")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Validate the SAEs of a run on its held-out tokens."""
    from fastsae.report import closing_table, figures_json
    from fastsae.revisit import evaluate_run

    overrides = {"device": "auto", **merged({"device": device}, set_)}
    metrics = evaluate_run(path, lambda file: load_config(file, overrides))
    Console(stderr=json_).print(closing_table(metrics))
    if json_:
        print(to_json(figures_json(metrics)))


@app.command()
def info(config: Config = None, set_: Set = None, json_: Json = False) -> None:
    """Versions, device and backend; with a config, the memory that its run will take."""
    from fastsae.prepare import pick_device, prepare
    from fastsae.report import device_name, info_table, memory_table, versions
    from fastsae_kernels import backend_name

    device = pick_device("auto")
    facts = {**versions(), "device": device_name(device), "backend": backend_name(device)}
    mem_bytes = None
    if config is not None:
        config = config / "config.toml" if config.is_dir() else config  # a run's
        unnamed = load_config(config, merged({}, set_)).model_copy(update={"name": None})  # it is no new run
        job = prepare(unnamed)
        job.close()
        mem_bytes = job.mem_bytes
    if json_:
        print(to_json({**facts, **({"mem_bytes": mem_bytes} if mem_bytes else {})}))
        return
    console = Console()
    console.print(info_table(facts))
    if mem_bytes:
        console.print(memory_table(mem_bytes))


def _values(flag: str, text: str | None, kind: type[int] | type[float]) -> list[Any]:
    """What stands between the commas."""
    try:
        return [kind(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"{flag} {text}: must be {what}, or several with commas between them") from None


def _whole(flag: str, text: str | None) -> int | None:
    """300000000, 300_000_000 or 3e8."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ConfigError(f"{flag} {text}: must be a whole number")
    return int(number)


def grid(lists: dict[str, list[Any]]) -> list[dict[str, Any]] | None:
    """Entries of [[saes]], one for every combination; None where there is nothing to combine."""
    entries = []
    for values in product(*lists.values()) if lists else ():
        entry = dict(zip(lists, values, strict=True))
        step = {name: entry.pop(name) for name in ("l1_coefficient", "lr") if name in entry}
        entries.append({**entry, **({"step": step} if step else {})})
    return entries or None


def merged(flags: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """Flags that were given, and --set, nested like the file; a field that is set twice is refused."""
    overrides = _without_none(flags)
    for text in assignments or []:
        _add(overrides, parse_assignment(text), text)
    return overrides


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    kept = {k: _without_none(v) if isinstance(v, dict) else v for k, v in data.items() if v is not None}
    return {k: v for k, v in kept.items() if v != {}}


def _add(data: dict[str, Any], new: dict[str, Any], text: str) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _add(data[key], value, text)
        elif key in data:
            raise ConfigError(f"--set {text}: this field is set twice on the command line")
        else:
            data[key] = value


def main() -> None:
    """Entry point: an error that the user can mend is one line and exit code 2."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except FastSAEError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
