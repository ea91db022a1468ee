"""What made a result: versions, revision, settings; and what makes two runs the same."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lalm_patch.settings import RunSettings
from lalm_patch.settings.of_a_run import ADDED_LATER, NOT_PART_OF_A_RUN

_PLACES = ("data.root", "data.audio", "data.path", "model.id", "model.decoder", "model.encoder")
LIBRARIES = ("torch", "transformers", "nnsight", "numpy", "xarray", "soundfile", "soxr")


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: version(name) for name in LIBRARIES}


def package_version() -> str:
    """This package's version."""
    return version("lalm_patch")


def git_revision() -> str:
    """Commit of the checkout the package runs from, with `-dirty` if it was changed; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in commands
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout git refuses to read: then it is unknown
        return ""
    return commit.strip() + ("-dirty" if changes.strip() else "")


def flat_settings(settings: RunSettings) -> dict[str, str]:
    """The settings a run's numbers depend on, as `group.name` -> text; local paths are made absolute."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix not in NOT_PART_OF_A_RUN and (prefix not in ADDED_LATER or value != ADDED_LATER[prefix]):
            flat[prefix] = json.dumps(_absolute(value) if prefix in _PLACES else value)

    walk("", asdict(settings))
    # Weights in float32 leave no choice. Runs that were made before there was one had computed as the weights are.
    precision = settings.engine.precision or ("as_loaded" if settings.backend.name == "ndif" else "float32")
    flat.pop("engine.precision", None)
    if settings.model.dtype != "float32" and precision != "as_loaded":
        flat["engine.precision"] = json.dumps(precision)
    # What becomes of clips that cannot be used is no part of what is computed of the others. The key stays, so that
    # runs made when it was one are still found.
    flat["data.bad_clips"] = json.dumps("stop")
    return flat


def readable(value: str) -> str:
    """A setting of a run's identity as one would write it: text as it is, anything else as JSON.

    Args:
        value: JSON text as in `flat_settings`; what is no JSON (a checksum, a version) stays.
    """
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def _absolute(value: Any) -> Any:
    if isinstance(value, str) and Path(value).expanduser().exists():
        return str(Path(value).expanduser().resolve())
    return value


def identity(settings: RunSettings, data: str, model: str) -> dict[str, str]:
    """What makes two runs the same: settings, clips, weights, this package's version and its libraries'."""
    versions = library_versions()
    return {
        **flat_settings(settings),
        "clips": data,
        "weights": model,
        "lalm_patch": package_version(),
        **{f"version of {name}": versions[name] for name in ("torch", "transformers", "nnsight")},
    }


def describe(settings: RunSettings, command: str) -> dict[str, Any]:
    """Attributes every result carries."""
    noising = settings.direction.name == "noising"
    into = "corrupted states into the clean run" if noising else "clean states into the corrupted run"
    run = "clean" if noising else "corrupted"
    method = {
        "back": f"back-patching, the clean run's states of one layer at the start of another of the {run} run; Biran "
        "et al., arXiv 2406.12775",
        "ablate": f"{settings.granularity.replacement or 'zero'} ablation of the clean run",
        "steer": f"activation steering of the {run} run along differences of class means",
        "path": f"path patching of the {run} run, {settings.granularity.path}; Wang et al., arXiv 2211.00593; "
        "Goldowsky-Dill et al., arXiv 2304.05969",
    }.get(settings.granularity.name, f"activation patching, {into}; Chen, Huang and Lee, arXiv 2603.13768")
    return {
        "title": f"Causal tracing of {settings.model.name} on {settings.attr.name}, {settings.granularity.name}-wise",
        "method": method,
        "site": settings.site.name,
        "window": settings.site.window,
        "direction": settings.direction.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": json.dumps(asdict(replace(settings, shard=None)), sort_keys=True, ensure_ascii=False),
        "lalm_patch_version": package_version(),
        "git_revision": git_revision(),
        "versions": json.dumps({"python": platform.python_version(), **library_versions()}),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }
