"""Where a model computes, and in which type: settings become `from_pretrained`'s keywords and a device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lalm_patch.errors import ConfigError
from lalm_patch.settings import ModelSettings


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """What the model computes with.

    Raises:
        ConfigError: no floating-point type of torch.
    """
    dtype = getattr(torch, settings.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"model.dtype={settings.dtype!r}: expected float32, bfloat16 or float16")
    return dtype


def device_name(settings: ModelSettings) -> str:
    """The device that `auto` means on this machine, or the one that is set."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def refuse_files_to_unpack(settings: ModelSettings, places: Iterable[Path]) -> None:
    """GGUF weights are unpacked into one memory: they can neither stay on the disk nor be dealt to several devices.

    Args:
        settings: where the model computes.
        places: folders of the checkpoint and its parts; a GGUF file in place of one.

    Raises:
        ConfigError: there is a GGUF file, and the settings ask for that.
    """
    asked = "model.offload=disk" if settings.offload == "disk" else f"model.device_map={settings.device_map}"
    for place in places:
        if place.is_file() and (settings.offload == "disk" or settings.device_map is not None):
            raise ConfigError(
                f"{asked}: the weights of {place} are unpacked into the memory of one device; leave it out, or give a "
                "folder in place of the GGUF file"
            )


def placement(settings: ModelSettings) -> tuple[dict[str, Any], torch.device | None]:
    """`from_pretrained`'s keywords, and the device to move to afterwards (None: the device map decides)."""
    dtype = dtype_of(settings)
    if settings.device_map is not None and settings.offload != "none":
        raise ConfigError(
            f"model.offload={settings.offload} and model.device_map={settings.device_map} both place the weights; "
            "leave one of them out"
        )
    if settings.device_map is not None:
        try:
            import accelerate  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"model.device_map={settings.device_map} needs the package accelerate: pip install 'lalm_patch[gpu]'"
            ) from None
        return {"dtype": dtype, "device_map": settings.device_map}, None
    name = device_name(settings)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"model.device={name!r}: expected auto, cpu, cuda or cuda:<number>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={name}: this machine has no usable GPU; set model.device=cpu")
    if settings.offload == "cpu" and device.type == "cpu":
        raise ConfigError(
            "model.offload=cpu keeps a GPU's layers in the CPU's memory, and this model runs on the CPU; set "
            "model.offload=disk for one that is larger than the memory"
        )
    # Offloaded weights stay as they are in their files, and take their type when they are brought in.
    return {"dtype": dtype if settings.offload == "none" else "auto"}, device
