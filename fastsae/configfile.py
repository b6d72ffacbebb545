"""The config as TOML: file, then flags over it; and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from tomlkit.exceptions import TOMLKitError

from fastsae.config import RunConfig
from fastsae.errors import ConfigError, reason
from fastsae.explain import explain


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The config in the TOML file at `path`, with `overrides` (nested like the file) over it.

    Raises ConfigError in one line for an unreadable file, an unknown key, or a value out of range.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomlkit.parse(path.read_text(encoding="utf-8-sig")).unwrap()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {reason(error)}") from None
        except TOMLKitError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if "saes" in data and "saes" in (overrides or {}):
        raise ConfigError(
            f"saes, or several values of a flag, are given, but {path} has [[saes]] of its own; change those"
        )
    merged = _merge(data, overrides or {})
    _refuse_hidden(merged.get("saes"), overrides or {})
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None


def parse_assignment(text: str) -> dict[str, Any]:
    """`section.field=value` as a nested dict; the value is TOML, or else a plain string."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: must look like section.field=value")
    try:
        leaf: Any = tomlkit.value(value.strip()).unwrap()
    except (TOMLKitError, ValueError):
        leaf = value.strip()
    for part in reversed(path):
        leaf = {part: leaf}
    return dict(leaf)


def to_toml(config: RunConfig) -> str:
    """The config as TOML text that `load_config` reads back to an equal one."""
    entries = [entry.model_dump(mode="json", exclude_unset=True, exclude_none=True) for entry in config.saes]
    data = config.model_dump(mode="json", exclude_none=True, exclude={"saes"})
    if config.step.grad_clip is None:
        data["step"]["grad_clip"] = False
    for entry, dumped in zip(config.saes, entries, strict=True):
        for field in ("grad_clip", "ema_decay"):
            if field in entry.step.model_fields_set and getattr(entry.step, field) is None:
                dumped["step"][field] = False
    return tomlkit.dumps({**data, **({"saes": entries} if entries else {})})


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _refuse_hidden(entries: Any, overrides: Mapping[str, Any]) -> None:
    """An override of [sae] or [step] would do nothing where an entry of [[saes]] sets that field itself."""
    for i, entry in enumerate(entries if isinstance(entries, list) and "saes" not in overrides else []):
        step = entry.get("step") if isinstance(entry, Mapping) else None
        for section, own in (("sae", entry), ("step", step)):
            if both := _keys(overrides.get(section)) & _keys(own):
                field = min(both)
                raise ConfigError(
                    f"{section}.{field} is given, but saes[{i}] of the file sets its own {field}; change it there"
                )


def _keys(value: Any) -> set[str]:
    """Of a table; none of a value of another kind, which is refused later."""
    return set(value) if isinstance(value, Mapping) else set()
