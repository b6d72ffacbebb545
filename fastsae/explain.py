"""Validation errors of pydantic in one line: the field by name, what was got, what is allowed."""

from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A pydantic error in one line: each field by name, what was got, what is allowed."""
    by_place: dict[str, list[str]] = {}
    for item in error.errors():
        place, message = _explain_one(item, model)
        by_place.setdefault(place, []).append(message)
    return "; ".join(place + ", or ".join(messages) for place, messages in by_place.items())


def _explain_one(item: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    """("where = got: ", "what is allowed"); the members of a union share their place."""
    unknown = item["type"] == "extra_forbidden"
    *path, last = item["loc"] or ("",)
    loc = [part for part in path if isinstance(part, int) or part.isidentifier()]
    if unknown or isinstance(last, int) or last in _fields_at(model, loc):  # else it names a union's member
        loc.append(last)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if unknown:
        known = _fields_at(model, loc[:-1])
        near = get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(known)}"
        return "", f'unknown config key "{where}"; {hint}'
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message[0].lower() + message[1:]
    return (f"{where} = {item['input']!r}: " if where else ""), message


def _fields_at(model: type[BaseModel], loc: list[str | int]) -> list[str]:
    """Names of the fields of the section that `loc` leads to; none where it leads to a field."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
