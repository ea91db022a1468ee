"""From a composed configuration to typed settings: every key known, every value one that its setting takes.

Hydra composes without types, so that everything arrives here as it was written: an option that YAML took for `true`, a
key that was added with `+`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lalm_patch.config.explaining import chain, looked_up
from lalm_patch.config.words import GROUPS, in_quotes, nearest, no_such_setting
from lalm_patch.errors import ConfigError
from lalm_patch.settings import ALLOWED, MISSING, RunSettings
from lalm_patch.settings.ranges import Listed, Refused, shown

ABSENT = object()
"""Stands for a value that is not there."""

_Made = TypeVar("_Made")


def defaults() -> dict[str, Any]:
    """All settings with their defaults, without types; `???` where a value has to be given."""
    return {field.name: _default(field) for field in fields(RunSettings)}


def _default(field: Any) -> Any:
    value = field.default_factory() if field.default is NO_DEFAULT else field.default
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def read(config: DictConfig, leave_out: tuple[str, ...] = ()) -> RunSettings:
    """Typed settings of a composed configuration; Hydra's own part of it is left alone.

    Args:
        config: as Hydra composed it.
        leave_out: settings that keep their default.

    Raises:
        ConfigError: a key that is no setting, a value that is missing, or one that its setting does not take.
    """
    check_keys(config)
    paths = (path for path in ALLOWED if path not in leave_out)
    return _make(RunSettings, {path: check_value(path, resolved(config, path)) for path in paths})


def check_keys(config: DictConfig) -> None:
    """Raises ConfigError for a key that is no setting, however it came there, and names the nearest one."""
    written: Any = OmegaConf.to_container(config, resolve=False)
    for key, value in written.items():
        if key == "hydra":
            _check_hydra(config._get_node("hydra"), "hydra")
            continue
        if key == "experiment" and isinstance(value, Mapping):
            raise ConfigError(
                f"experiment: the file's settings ({', '.join(map(str, value))}) are not at the top, where they would "
                "do something; expected '# @package _global_' as the file's first line"
            )
        if key in GROUPS:
            if not isinstance(value, Mapping):
                own = ", ".join(path for path in ALLOWED if path.startswith(f"{key}."))
                raise ConfigError(f"{key}={shown(value)}: expected a group of settings ({own}); choose one by its name")
            for inner in value:
                if f"{key}.{inner}" not in ALLOWED:
                    raise ConfigError(no_such_setting(f"{key}.{inner}"))
        elif key not in ALLOWED:
            raise ConfigError(no_such_setting(str(key)))


def _check_hydra(node: Any, path: str) -> None:
    """Keys of Hydra's own settings, where it says which there are."""
    if not OmegaConf.is_dict(node) or node._is_none() or node._is_missing() or node._is_interpolation():
        return
    kind = OmegaConf.get_type(node)
    own = [*(field.name for field in fields(kind)), "env"] if is_dataclass(kind) else None  # env: Hydra's, undeclared
    for key in node:
        if own is not None and key not in own:
            known = [f"{path}.{name}" for name in own]
            raise ConfigError(
                f"{path}.{key}: Hydra has no such setting; the nearest is {nearest(f'{path}.{key}', known)}"
            )
        _check_hydra(node._get_node(key), f"{path}.{key}")


def check_value(path: str, value: Any) -> Any:
    """The value as the setting has it. Raises ConfigError, with what it takes, for one that it does not take."""
    entry = ALLOWED[path]
    if value == MISSING:
        group = path.partition(".")[0]
        own = [name for name in ALLOWED if name.startswith(f"{group}.")]
        needed = [name for name in own if default_of(name) == MISSING]
        raise ConfigError(
            f"{path}: expected {entry}, got nothing; choose {group} by its name ({group}=NAME), or put "
            f"{path.partition('.')[2]} into its YAML file, which needs {', '.join(n.partition('.')[2] for n in needed)}"
        )
    try:
        return entry.read(value)
    except Refused as reason:
        raise ConfigError(_refusal(path, value, str(reason))) from None


def check_choices(settings: RunSettings) -> None:
    """Raises ConfigError for a value that its setting does not take, in settings that were made in Python."""
    for path in ALLOWED:
        value: Any = settings
        for part in path.split("."):
            value = getattr(value, part)
        if path != "run_name":
            check_value(path, value)


def default_of(path: str) -> Any:
    """A setting's default."""
    value: Any = defaults()
    for part in path.split("."):
        value = value[part]
    return value


def _refusal(path: str, value: Any, reason: str) -> str:
    entry = ALLOWED[path]
    told = f"{path}={shown(value)}: expected {entry}" + (f"; {reason}" if reason else "")
    if entry.words and isinstance(value, str):
        return f"{told}; the nearest is {nearest(value, [word for word in entry.words if word])}"
    items = value if isinstance(value, list | tuple) and isinstance(entry.range, Listed) else [value]
    if entry.is_text and not reason and any(not isinstance(item, str) for item in items):
        return f"{told}; {in_quotes(path, value)}"
    return told


def resolved(config: DictConfig, path: str) -> Any:
    """A value with the settings it refers to put in. Raises ConfigError where there are none."""
    outside = sys.exception()
    try:
        value = OmegaConf.select(config, path, default=ABSENT, throw_on_resolution_failure=True)
        if value is ABSENT:  # `???`, or taken out with `~`
            return default_of(path) if _removed(config, path) else MISSING
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, RecursionError) as error:
        for link in chain(error, outside):
            if isinstance(link, ConfigError):
                raise link from None
        if any(isinstance(link, RecursionError) for link in chain(error, outside)):
            raise ConfigError(
                f"{path}={_written(config, path)}: expected a value, got one that refers to itself"
            ) from None
        raise ConfigError(f"{path}={_written(config, path)}: {looked_up(error)}") from error


def _written(config: DictConfig, path: str) -> str:
    written: Any = OmegaConf.to_container(config, resolve=False)
    for part in path.split("."):
        written = written[part]
    return shown(written)


def _removed(config: DictConfig, path: str) -> bool:
    group, _, key = path.rpartition(".")
    holder = config.get(group) if group else config
    return holder is None or key not in holder


def _make(kind: type[_Made], values: Mapping[str, Any], prefix: str = "") -> _Made:
    made: dict[str, Any] = {}
    for name, hint in _hints(kind).items():  # type: ignore[arg-type]  # a class is hashable
        path = f"{prefix}{name}"
        if is_dataclass(hint) and isinstance(hint, type):
            made[name] = _make(hint, values, f"{path}.")
        elif path in values:
            made[name] = values[path]
    return kind(**made)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Types of a section's settings; they are written as text, which takes compiling."""
    return get_type_hints(kind)
