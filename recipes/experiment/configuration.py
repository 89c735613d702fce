"""Reading, merging, checking and comparing the configurations of any recipe."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ConfigError

C = TypeVar("C", bound=BaseModel)


class Section(BaseModel):
    """A configuration or a part of one; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_config_file(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON config file.

    Raises:
        ConfigError: the file is missing, unreadable, or not a table of fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path}: cannot be read ({error})") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path}: nested too deeply to be a config; give a table of fields") from error
    except ValueError as error:
        raise ConfigError(f"config file {path}: not valid {path.suffix.lstrip('.') or 'JSON'} ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path}: must hold a table of fields, got {type(values).__name__}")
    return values


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `override`, nested tables field by field."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def validated(kind: type[C], values: Mapping[str, Any]) -> C:
    """The configuration of that kind with these values.

    Raises:
        ConfigError: naming every field that is unknown or has a bad value.
    """
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from error
    check_values(config.model_dump())
    return config


def explain(error: ValidationError, prefix: str = "") -> list[str]:
    """One line for each problem that pydantic found: field, what is wrong, what came."""
    lines = []
    for item in error.errors():
        field = prefix + ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown field; --help lists all fields")
        elif item["type"] == "value_error":
            lines.append(f"{field}: {message}" if field else message)
        else:
            lines.append(f"{field}: {message}, got {item['input']!r}")
    return lines


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``field: old -> new`` for every field in which two dumped configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def check_values(values: Any, field: str = "") -> None:
    """Refuse what can be neither saved nor computed with: null characters, halves of surrogate pairs, huge integers."""
    if isinstance(values, int) and abs(values) >= 2**63:
        raise ConfigError(f"{field}: must be an integer of 64 bits, got one of {values.bit_length()} bits")
    if isinstance(values, str) and re.search("[\0\ud800-\udfff]", values):
        raise ConfigError(f"{field or 'a name of a field'}: must be text without null characters, got {values[:80]!r}")
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_values(key, field)
            check_values(value, f"{field}.{key}".lstrip("."))
    elif isinstance(values, list | tuple):
        for value in values:
            check_values(value, field)
