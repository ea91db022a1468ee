"""Hydra's side of the settings: where the YAML lies, the schema it is checked against, names that follow from it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lalm_patch.errors import ConfigError
from lalm_patch.interventions.segments import KNOCKOUTS, check_edges
from lalm_patch.interventions.spans import Spans, check_spans
from lalm_patch.settings import APPROXIMATE, CHOICES, ON_EMBEDDINGS, WHOLE_VOCABULARY, RunSettings
from lalm_patch.storage.provenance import flat_settings
from lalm_patch.storage.shards import Shard


def config_folder() -> Path:
    """Where `config.yaml` lies: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/config.yaml beside or inside {package}; reinstall lalm_patch")


def register() -> None:
    """Make the schema and the resolvers known to Hydra; calling it twice is harmless."""
    ConfigStore.instance().store(name="run_schema", node=RunSettings)
    OmegaConf.register_new_resolver("lalm_patch.run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("lalm_patch.run_folder", _run_folder, replace=True)


def compose(*overrides: str) -> RunSettings:
    """Settings of a command line, for use from Python: `compose("model=demo", "attr=gender")`.

    Raises:
        ConfigError: an override that names nothing, or a value that does not fit; the message lists what there is.
    """
    register()
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        because = f": {error.__cause__}" if error.__cause__ else ""
        raise ConfigError(f"{error}{because}") from error
    return to_settings(config)


def to_settings(config: DictConfig) -> RunSettings:
    """Typed settings of a composed configuration.

    Raises:
        ConfigError: a setting that takes one of a few words has another one.
    """
    settings = _typed(config)
    check_choices(settings)
    check_combinations(settings)
    return settings


def check_choices(settings: RunSettings) -> None:
    """Raises ConfigError for a word that a setting does not know; names the ones it knows."""
    for path, choices in CHOICES.items():
        value: Any = settings
        for part in path.split("."):
            value = getattr(value, part)
        if value not in choices:
            known = ", ".join("null" if choice is None else str(choice) for choice in choices)
            raise ConfigError(f"{path}={value}: expected one of {known}")


def check_combinations(settings: RunSettings) -> None:
    """Raises ConfigError for settings that are right one by one and not together, before anything is loaded."""
    site, direction = settings.site, settings.direction.name
    if site.window < 1:
        raise ConfigError(f"site.window={site.window}: expected a number of layers, at least 1")
    _check_knockout(settings)
    _check_corruption(settings)
    if settings.backend.name == "ndif" and (settings.observe.lens or settings.observe.attention):
        raise ConfigError(
            f"observe={settings.observe.name} looks at states and attention that a server does not send back: use "
            "backend=local, or observe=nothing"
        )
    if settings.backend.name == "ndif" and settings.metric.name in WHOLE_VOCABULARY:
        raise ConfigError(
            f"metric={settings.metric.name} needs the whole vocabulary's logits, which a server does not send back: "
            "use another metric, or backend=local"
        )
    _check_audio(settings)
    _check_approximation(settings)
    if site.name == "head" and settings.granularity.name not in ("layer", "edge"):
        raise ConfigError(
            f"site=head with granularity={settings.granularity.name}: heads times tokens times layers are more cells "
            "than one can look at; use granularity=layer, or site=attn for single tokens"
        )
    standard = (site.name, site.window, direction) == ("resid", 1, "denoising")
    if settings.backend.name == "ndif" and not standard:
        raise ConfigError(
            f"backend=ndif exchanges the residual stream after single layers, denoising; got site={site.name}, "
            f"site.window={site.window}, direction={direction}: use backend=local for these"
        )


def _check_approximation(settings: RunSettings) -> None:
    """What a first-order approximation of single patches cannot be asked."""
    engine, site = settings.engine, settings.site
    if engine.licence_cells < 1 or engine.steps < 1:
        raise ConfigError(
            f"engine.licence_cells={engine.licence_cells}, engine.steps={engine.steps}: expected numbers from 1"
        )
    if engine.name not in APPROXIMATE:
        return
    asked = {
        f"granularity={settings.granularity.name}": settings.granularity.name in KNOCKOUTS,
        f"site.window={site.window}": site.window != 1,
        "site=tower": site.name == "tower",
        "backend=ndif": settings.backend.name == "ndif",
        f"metric={settings.metric.name}": settings.metric.name in WHOLE_VOCABULARY,
    }
    if refused := [setting for setting, is_asked in asked.items() if is_asked]:
        raise ConfigError(
            f"engine={engine.name} approximates what single patches in the decoder do to the options' probabilities, "
            f"not {', '.join(refused)}: use engine=auto for that"
        )


def _check_audio(settings: RunSettings) -> None:
    """Windows of the audio, and the sites before the decoder that only they reach."""
    granularity, site = settings.granularity, settings.site
    if granularity.name != "audio":
        if granularity.seconds is not None or granularity.positions is not None:
            raise ConfigError(
                f"granularity.seconds and granularity.positions go with granularity=audio, not {granularity.name}"
            )
        if site.name in ("embed", "tower"):
            raise ConfigError(
                f"site={site.name} is before the text hears anything: expected granularity=audio, got "
                f"granularity={granularity.name}"
            )
        return
    check_spans(Spans(granularity.seconds, granularity.positions))
    if settings.backend.name == "ndif":
        raise ConfigError("granularity=audio is not sent to servers: use backend=local")
    if site.name == "embed" and (site.window != 1 or granularity.layers is not None):
        raise ConfigError("site=embed is one place, not one per layer: expected site.window=1, granularity.layers=null")
    if site.name == "tower" and granularity.seconds is None:
        raise ConfigError("site=tower has frames, not audio positions: expected granularity.seconds, got null")
    if site.name == "tower" and settings.engine.name == "replay":
        raise ConfigError(
            "site=tower with engine=replay: what changes in the audio encoder changes all it gives, so that no work is "
            "shared; use engine=auto or direct"
        )
    if site.name == "tower" and settings.corruption.name in ON_EMBEDDINGS:
        raise ConfigError(
            f"site=tower with corruption={settings.corruption.name}: both runs have the same audio encoder states; use "
            "a corruption that is sound, or site=embed"
        )


def _check_corruption(settings: RunSettings) -> None:
    corruption = settings.corruption
    if corruption.name == "gaussian" and not (corruption.scale or 0) > 0:
        raise ConfigError(f"corruption.scale={corruption.scale}: expected a positive number for corruption=gaussian")
    if corruption.name != "gaussian" and corruption.scale is not None:
        raise ConfigError(f"corruption.scale goes with corruption=gaussian, not with corruption={corruption.name}")
    if corruption.name in ON_EMBEDDINGS and settings.backend.name == "ndif":
        raise ConfigError(
            f"corruption={corruption.name} replaces audio embeddings, which only this machine can: expected one of "
            "the corruptions that are sound with backend=ndif, or backend=local"
        )


def _check_knockout(settings: RunSettings) -> None:
    """Cutting attention is something else than exchanging states: which other settings go with it."""
    granularity, site, direction = settings.granularity, settings.site, settings.direction.name
    if granularity.edges is not None and granularity.name != "edge":
        raise ConfigError(f"granularity.edges goes with granularity=edge, not with granularity={granularity.name}")
    if granularity.name not in KNOCKOUTS:
        return
    sites = ("attn", "head") if granularity.name == "edge" else ("attn",)
    if direction != "noising" or site.name not in sites:
        raise ConfigError(
            f"granularity={granularity.name} cuts attention in the clean run: expected direction=noising and "
            f"site={' or '.join(sites)}, got direction={direction}, site={site.name}"
        )
    if granularity.name == "early_text_only" and site.window != 1:
        raise ConfigError(
            f"granularity=early_text_only cuts all layers up to one; got site.window={site.window}, use 1"
        )
    check_edges(granularity.edges or ())
    if site.name == "head" and len(granularity.edges or ()) != 1:
        raise ConfigError(
            "granularity=edge with site=head cuts one edge, head by head: name it, for example "
            "granularity.edges=[audio-last]"
        )


def run_name(settings: RunSettings) -> str:
    """Name of a run's folder: readable, and different for different settings."""
    flat = json.dumps(flat_settings(settings), sort_keys=True)
    short = hashlib.sha256(flat.encode()).hexdigest()[:10]
    parts = [settings.model.name, settings.attr.name, settings.granularity.name]
    parts += [name for name in (settings.site.name, settings.direction.name) if name not in ("resid", "denoising")]
    return "-".join([*parts, short])


def _run_name(*, _root_: DictConfig) -> str:
    return run_name(_typed(_root_, leave_out=("run_name",)))


def _run_folder(*, _root_: DictConfig) -> str:
    """Where a run's process works, below `outputs`: the run's folder, or its shard's inside it."""
    name = str(_root_.run_name)
    return name if _root_.shard is None else f"{name}/{Shard.parse(str(_root_.shard)).name}"


def _typed(config: DictConfig, leave_out: tuple[str, ...] = ()) -> RunSettings:
    """The part of a composed configuration that is the run's, as the dataclass."""
    keys = [str(key) for key in config if key not in ("hydra", *leave_out)]
    # Hydra's composition keeps the schema's checks but not always its type: merging into it brings both back.
    merged = OmegaConf.merge(OmegaConf.structured(RunSettings), OmegaConf.masked_copy(config, keys))
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, RunSettings)
    return settings
