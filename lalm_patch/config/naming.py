"""Names that follow from the settings: the same command finds its own run, and different ones never share a folder."""

from __future__ import annotations

import hashlib
import json

from lalm_patch.settings import RunSettings
from lalm_patch.storage.provenance import flat_settings
from lalm_patch.storage.shards import Shard


def run_name(settings: RunSettings) -> str:
    """Name of a run's folder: readable, and different for different settings."""
    flat = json.dumps(flat_settings(settings), sort_keys=True)
    short = hashlib.sha256(flat.encode()).hexdigest()[:10]
    parts = [settings.model.name, settings.attr.name, settings.granularity.name]
    parts += [name for name in (settings.site.name, settings.direction.name) if name not in ("resid", "denoising")]
    return "-".join([*parts, short])


def run_folder(settings: RunSettings) -> str:
    """Where a run's process works, below `outputs`: the run's folder, or its shard's inside it."""
    name = settings.run_name
    return name if settings.shard is None else f"{name}/{Shard.parse(settings.shard).name}"
