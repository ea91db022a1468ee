"""Settings of a run from YAML and overrides: composed by Hydra, read and checked here, before anything is loaded.

loading       Hydra's part: composing, without types and without its global state
reading       keys and values, against what `lalm_patch.settings` says of each
combinations  settings that are right one by one and not together
naming        names that follow from settings
explaining    what Hydra and YAML say, in a sentence
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf

from lalm_patch.config.combinations import check_combinations
from lalm_patch.config.explaining import chain, explained, told_by_libraries
from lalm_patch.config.loading import config_folder, load, one_at_a_time, store_defaults
from lalm_patch.config.naming import run_folder, run_name
from lalm_patch.config.reading import check_choices, check_value, read, resolved
from lalm_patch.config.words import at_home
from lalm_patch.settings import RunSettings

__all__ = [
    "at_home",
    "chain",
    "check_choices",
    "check_combinations",
    "compose",
    "config_folder",
    "explained",
    "load",
    "register",
    "run_name",
    "to_settings",
    "told_by_libraries",
]


def register() -> None:
    """Make the settings and the resolvers known to Hydra; calling it twice is harmless."""
    store_defaults()
    OmegaConf.register_new_resolver("lalm_patch.run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("lalm_patch.run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("lalm_patch.outputs", _outputs, replace=True)


def compose(*overrides: str) -> RunSettings:
    """Settings of a command line, for use from Python: `compose("model=demo", "attr=gender")`.

    Works in threads, and inside an application that uses Hydra itself.

    Raises:
        ConfigError: an override that names nothing, or a value that does not fit; the message says what would.
    """
    with one_at_a_time:
        register()
        return to_settings(load(overrides))


def to_settings(config: DictConfig) -> RunSettings:
    """Typed settings of a composed configuration, all of them checked.

    Raises:
        ConfigError: a key that is no setting, a value that its setting does not take, or settings that do not go
            together.
    """
    # The name last: it follows from the others, and what is wrong with them should be said of them.
    settings = _without_name(config)
    token = _being_named.set((config, settings))
    try:
        return replace(settings, run_name=check_value("run_name", resolved(config, "run_name")))
    finally:
        _being_named.reset(token)


_being_named: ContextVar[tuple[DictConfig, RunSettings] | None] = ContextVar("_being_named", default=None)
"""A configuration and its settings while their name is looked up, which follows from them: they are read once."""


def _without_name(config: DictConfig) -> RunSettings:
    settings = read(config, leave_out=("run_name",))
    check_combinations(settings)
    return settings


def _run_name(*, _root_: DictConfig) -> str:
    known = _being_named.get()
    return run_name(known[1] if known is not None and known[0] is _root_ else _without_name(_root_))


def _run_folder(*, _root_: DictConfig) -> str:
    """Where a run's process works, below `outputs`: the run's folder, or its shard's inside it."""
    return run_folder(to_settings(_root_))


def _outputs(*, _root_: DictConfig) -> str:
    return str(check_value("outputs", resolved(_root_, "outputs")))
