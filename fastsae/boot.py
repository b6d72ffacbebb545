"""Load a Hugging Face model into a TransformerBridge: a hub name, a local folder, or the demo."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fastsae.config import ModelConfig
from fastsae.errors import SourceError, first_line

LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def boot(cfg: ModelConfig, device: torch.device) -> tuple[Any, Any, tuple[str, ...]]:
    """Load the model that `cfg` names: (bridge, tokenizer or None, parameters of the head that the weights lack).

    Raises SourceError, in one line, for a folder or a hub name that cannot be read or is not supported.
    """
    from transformer_lens.model_bridge import TransformerBridge

    where = _location(cfg.name)
    options: dict[str, Any] = {"revision": cfg.revision} if cfg.revision is not None else {}
    if cfg.trust_remote_code:
        options["trust_remote_code"] = True
    tokenizer = _tokenizer(where, options)
    try:
        bridge = TransformerBridge.boot_transformers(
            where,
            device=str(device),
            dtype=getattr(torch, cfg.dtype),
            tokenizer=_stand_in_tokenizer() if tokenizer is None else copy.deepcopy(tokenizer),
            **options,
        )
        head = _missing_head(bridge.original_model, where, options)
        if cfg.weights == "processed":
            bridge.enable_compatibility_mode(disable_warnings=True)
    except LOAD_ERRORS as error:
        absent = "" if Path(where).is_dir() else "there is no such folder, and as a hub name: "
        raise SourceError(f"cannot load the model {cfg.name}: {absent}{first_line(error)}") from error
    return bridge, tokenizer, head


def _location(name: str) -> str:
    """The folder or hub name that `model.name` stands for; a folder is checked for what it must hold."""
    if name == "demo":
        from fastsae.demo import MODEL_DIR

        name = str(MODEL_DIR)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
            raise SourceError(f"model.name = {name}: there is no such folder")
        return name
    if not (folder / "config.json").is_file():
        raise SourceError(f"model.name = {name}: the folder has no config.json")
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise SourceError(f"model.name = {name}: the folder has no weights (model.safetensors)")
    return str(folder)


def _tokenizer(where: str, options: dict[str, Any]) -> Any:
    """The model's own tokenizer, untouched by TransformerLens; None where it has none.

    transformers makes up an empty one for a folder without tokenizer files: special tokens and no others.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except LOAD_ERRORS:
        return None  # a model that cannot be reached fails on its weights, with the better message
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


def _stand_in_tokenizer() -> Any:
    """`boot_transformers` insists on a tokenizer, and cannot go without where there is none."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    empty = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    return fast(tokenizer_object=empty, eos_token="<eos>", unk_token="<eos>")


def _missing_head(model: Any, where: str, options: dict[str, Any]) -> tuple[str, ...]:
    """Parameters of the language-model head that the weights lack, and that are random therefore.

    transformers reports them only to whoever loads, so the names alone are loaded once more, on the meta
    device: no data is read. Tied heads are not missing. Warns where a few parameters of the body are, and raises
    SourceError where most are.
    """
    from transformers.utils import logging as hf_logging

    logging: Any = hf_logging

    if getattr(model.config, "quantization_config", None) is not None:
        return ()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        _, info = type(model).from_pretrained(
            where, config=model.config, device_map="meta", output_loading_info=True, **options
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    body = [name for name in info["missing_keys"] if name.startswith(f"{model.base_model_prefix}.")]
    if 2 * len(body) > len(list(model.base_model.parameters())):
        raise SourceError(
            f"the weights of {where} lack {len(body)} parameters of its model, {min(body)} for one: are they another model's?"
        )
    if body:
        warnings.warn(
            f"{len(body)} parameters are not in the weights and stay random, {min(body)} for one",
            stacklevel=4,
        )
    return tuple(name for name in info["missing_keys"] if name not in body)


def weights_of(model: Any) -> str:
    """Whether TransformerLens has folded the weights of a model that was given to us."""
    folded = str(getattr(model.cfg, "normalization_type", None)).endswith("Pre")
    return "processed" if folded or getattr(model, "_weights_processed", False) else "raw"
