"""Validate what a run left, with the model and the tokens of that run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsae.checkpoint import CONFIG_FILE, load_all
from fastsae.config import DataConfig, RunConfig
from fastsae.configfile import load_config
from fastsae.errors import ConfigError, RunError
from fastsae.evaluate import evaluate
from fastsae.prepare import pick_device
from fastsae.source import load_source
from fastsae.tokens import may_overlap, open_tokens, validation_split_of


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
        _check_held_out(trained.data, config.data, before.train.n_held_out, tokens.train.n_held_out)
    pairs = {name: (hooks[name], sae) for name, sae in saes.items()}
    results = evaluate(
        source, pairs, tokens.validation, batch_size=config.model.batch_size, baselines=config.save.baselines
    )
    return {name: result.row() for name, result in results.items()}


def _check_held_out(trained: DataConfig, now: DataConfig, held_out: int, taken: int) -> None:
    """Raise ConfigError where what is validated on now may have been trained on: other documents of the same text than were held out."""
    if trained.subset != now.subset or not _may_share(trained.dataset, now.dataset):
        return
    split = validation_split_of(now)
    if split is None and (trained.dataset, trained.split) == (now.dataset, now.split):
        if taken > held_out:
            raise ConfigError(
                f"the run held out {held_out} documents, and this would validate on {taken} of them, so on what it was trained on; "
                "lower data.n_validation_tokens, or name a data.validation_split"
            )
    elif may_overlap(split or now.split, trained.split):
        raise ConfigError(
            f'"{split or now.split}" of {now.dataset} may hold what the run was trained on: "{trained.split}" of {trained.dataset}; name '
            "another data.validation_split"
        )


def _may_share(a: str, b: str) -> bool:
    """Whether two datasets are one, or one lies in the other."""
    one, other = Path(a).absolute(), Path(b).absolute()
    return a == b or (one.exists() and other.exists() and (one in other.parents or other in one.parents))
