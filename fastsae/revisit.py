"""Validate what a run left, with the model and the tokens of that run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsae.checkpoint import CONFIG_FILE, load_all
from fastsae.config import RunConfig
from fastsae.configfile import load_config
from fastsae.errors import ConfigError, RunError
from fastsae.evaluate import evaluate
from fastsae.prepare import pick_device
from fastsae.source import load_source
from fastsae.tokens import open_tokens


def evaluate_run(path: Path, read: Callable[[Path], RunConfig]) -> dict[str, dict[str, Any]]:
    """Figures per SAE of a run folder, a checkpoint, or an SAE folder in one.

    `read` makes the config from the run's file. Raises RunError where no run is found around `path`, ConfigError where it makes the
    validation set reach into what was trained on.
    """
    run_dir = next((p for p in [path, *path.absolute().parents] if (p / CONFIG_FILE).is_file()), None)
    if run_dir is None:
        raise RunError(f"{path} is not in a run folder: no {CONFIG_FILE} there or above")
    config = read(run_dir / CONFIG_FILE)
    device = pick_device(config.device)
    saes = load_all(path, device=device)
    hooks = {name: str(sae.metadata.get("hook_name", "")) for name, sae in saes.items()}
    if "" in hooks.values():
        raise RunError(
            f"{path} was trained on given activations: there is no source model to validate it with"
        )
    if any(sae.metadata.get("model_given") for sae in saes.values()):
        raise RunError(
            f"{path} was trained on a model object, which its name may not lead back to; call fastsae.evaluate with it"
        )
    used = config.model.model_copy(update={"hook": tuple(dict.fromkeys(hooks.values()))})
    source = load_source(used, device)
    source.check_context_size(config.data.context_size)
    tokens = open_tokens(config.data, source.tokenizer, seed=config.seed, d_vocab=source.d_vocab)
    tokens.train.close()
    trained = load_config(run_dir / CONFIG_FILE)
    if trained.data != config.data:
        before = open_tokens(trained.data, source.tokenizer, seed=config.seed, d_vocab=source.d_vocab)
        before.train.close()
        _check_held_out(before.train.state_dict()["of"], tokens.train.state_dict()["of"])
    pairs = {name: (hooks[name], sae) for name, sae in saes.items()}
    results = evaluate(
        source, pairs, tokens.validation, batch_size=config.model.batch_size, baselines=config.save.baselines
    )
    return {name: result.row() for name, result in results.items()}


def _check_held_out(before: dict[str, Any], now: dict[str, Any]) -> None:
    """By what two token streams say of themselves."""
    held_out, taken = before["n_held_out_documents"], now["n_held_out_documents"]
    if now["dataset"] == before["dataset"] and taken > held_out:
        raise ConfigError(
            f"the run held out {held_out} documents, and this would validate on {taken} of them, so on what it was trained on; "
            "lower data.n_validation_tokens, or name a data.validation_split"
        )
