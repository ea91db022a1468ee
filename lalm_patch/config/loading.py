"""Hydra's side: where the YAML lies, and composing it without Hydra's global state."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.structured_config_source import StructuredConfigSource as HydraSchemas
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig

from lalm_patch.config.explaining import Unnamed, explained
from lalm_patch.config.reading import defaults
from lalm_patch.config.words import at_home
from lalm_patch.errors import ConfigError

SCHEMA = "run_schema"
VERSION = "1.3"

one_at_a_time = threading.RLock()
"""Hydra and OmegaConf keep resolvers, plugins and parsers in tables of the process, without locks of their own."""


def config_folder() -> Path:
    """Where `config.yaml` lies: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml beside or inside {package}; reinstall lalm_patch")


def store_defaults() -> None:
    """Make the settings' defaults known to Hydra: untyped, so that values arrive in `reading` as they were written."""
    ConfigStore.instance().store(name=SCHEMA, node=defaults())


def load(
    overrides: Sequence[str],
    *,
    folder: str | None = None,
    name: str | None = None,
    extra: str | None = None,
    several: bool = False,
    in_shell: bool = False,
) -> DictConfig:
    """Compose a configuration, Hydra's own part in it.

    A loader of its own: a Hydra application around this one, another thread that composes, and what such an
    application has in Hydra's store under names like ours (`config`, `model/demo`) stay as they are, and do not matter.

    Args:
        overrides: as on the command line.
        folder: where `config.yaml` is; the package's own unless given.
        name: the file's name, without its ending.
        extra: a further folder that is searched (`--config-dir`).
        several: whether values of several runs are let through (`--multirun`).
        in_shell: whether the overrides came from a shell, for what the message says.

    Raises:
        ConfigError: it cannot be composed.
    """
    setup_globals()
    outside = sys.exception()
    given = [at_home(override) for override in overrides]

    def compose(some: Sequence[str]) -> DictConfig:
        with _version_base():
            config: DictConfig = _loader(folder, extra).load_configuration(
                name or "config",
                list(some),
                RunMode.MULTIRUN if several else RunMode.RUN,
                from_shell=in_shell,
                validate_sweep_overrides=not several,
            )
        return config

    try:
        return compose(given)
    except Exception as error:  # of any type: Hydra answers odd input also with AssertionError, TypeError, IndexError
        told = explained(error, in_shell=in_shell, outside=outside)
        if isinstance(told, Unnamed) and (culprit := _culprit(given, compose)) is not None:
            told = ConfigError(f"{culprit}: {told}")
        raise told from error


def _culprit(overrides: Sequence[str], compose: Callable[[Sequence[str]], DictConfig]) -> str | None:
    """The first override without which the ones up to it could be composed."""
    for count in range(len(overrides) + 1):
        try:
            compose(overrides[:count])
        except Exception:  # the error is known already; where it begins is what is looked for
            return overrides[count - 1] if count else None
    return None


def _loader(folder: str | None, extra: str | None) -> ConfigLoaderImpl:
    search_path = create_config_search_path(folder or str(config_folder()))
    if extra is not None:
        schema = search_path.get_path().pop()
        search_path.append("command-line", f"file://{Path(extra).absolute()}")
        search_path.append(schema.provider, schema.path)
    loader = ConfigLoaderImpl(search_path)
    sources = loader.repository.sources
    sources[:] = [_Files(one.provider, one.path) if one.scheme() == "file" else one for one in sources]
    loader.repository.sources[-1] = StructuredConfigSource("schema", "structured://")
    return loader


class _NotCopied:
    """A source of configurations that Hydra shares where it would copy it for each composition: it is a place, and a
    copy of one took all schemas of Hydra's store along."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _Files(_NotCopied, FileConfigSource):  # type: ignore[misc]
    """A folder of YAML files, each parsed once for as long as it stays as it is: compositions share most of theirs."""

    def load_config(self, config_path: str) -> Any:
        """See `ConfigSource`."""
        file = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        try:
            stat = os.stat(file)
        except OSError:
            return super().load_config(config_path)
        key = (self.provider, self.path, file, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size)
        found = _parsed.get(key)
        if found is None:
            found = super().load_config(config_path)
            if len(_parsed) == MOST_PARSED:
                _parsed.clear()
            _parsed[key] = found
        return copy.deepcopy(found)  # Hydra takes defaults out of what it gets, and puts the rest into its own


_parsed: dict[tuple[Any, ...], Any] = {}
MOST_PARSED = 256


class StructuredConfigSource(_NotCopied, HydraSchemas):  # type: ignore[misc]  # Hydra looks for this name
    """Of Hydra's store only what is Hydra's or ours: an application around us keeps its own schemas there."""

    def load_config(self, config_path: str) -> Any:
        """See `ConfigSource`; raises ConfigLoadError for what is another application's."""
        return super().load_config(config_path if self._is_ours(config_path) else "not-ours-and-not-there")

    def is_group(self, config_path: str) -> bool:
        """See `ConfigSource`."""
        return self._is_ours(config_path) and bool(super().is_group(config_path))

    def is_config(self, config_path: str) -> bool:
        """See `ConfigSource`."""
        return self._is_ours(config_path) and bool(super().is_config(config_path))

    def list(self, config_path: str, results_filter: Any) -> list[str]:
        """See `ConfigSource`."""
        return list(super().list(config_path, results_filter)) if self._is_ours(config_path) else []

    @staticmethod
    def _is_ours(config_path: str) -> bool:
        plain = config_path.strip("/").removesuffix(".yaml")
        return plain in ("", SCHEMA, "hydra", "_dummy_empty_config_") or plain.startswith("hydra/")


@contextmanager
def _version_base() -> Iterator[None]:
    """Hydra 1.3's rules, while this composes; those of an application around us come back."""
    instance = version.VersionBase.instance()
    before = instance.version_base
    version.setbase(VERSION)
    try:
        yield
    finally:
        instance.version_base = before
