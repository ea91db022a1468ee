"""Weights into modules, with nothing left over and nothing made up.

transformers fills what a checkpoint lacks with random numbers and leaves out what it does not know, with no more than a
line in a log. Here every family's weights go through one comparison: a missing, unexpected or misshapen tensor is
refused by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from lalm_patch.errors import ModelError
from lalm_patch.models.files import ADAPTER_CONFIG, opening, read_config, shard_of_keys, weights_entry

SHOWN_KEYS = 10
RECOMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Ends of names of buffers that old checkpoints hold; modules make them anew from the configuration."""
_WRAPPERS = {
    "base_model.model.": "a PEFT (LoRA) save: merge the adapter into its base model (`merge_and_unload()`)",
    "_orig_mod.": "a save of a compiled model: take the module out of torch.compile (`._orig_mod`)",
    "module.": "a save of a wrapped (data-parallel) model: take the module out (`.module`)",
}
_SIMPLE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_pretrained(
    model_class: Any,
    folder: Path,
    *,
    setting: str = "",
    adapter: bool = False,
    left_out: tuple[str, ...] = (),
    **weights: Any,
) -> PreTrainedModel:
    """`model_class.from_pretrained(folder)`, whose report is read.

    Args:
        model_class: a model class of transformers, or an automatic one.
        folder: configuration and weights.
        setting: the setting that gave the folder, for messages.
        adapter: whether LoRA weights in the same folder belong to the published model.
        left_out: beginnings of the names of weights that the published checkpoint holds and the model does not want.
            Newer transformers know them by themselves.
        weights: `from_pretrained`'s keywords; None means its default.

    Raises:
        ModelError: missing, unexpected or misshapen weights; files that cannot be opened; a missing package.
    """
    where = f"{setting}={folder}" if setting else str(folder)
    if not adapter and (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{where}: LoRA weights ({ADAPTER_CONFIG}) lie beside the model's own, and whether they count would depend "
            "on installed packages; merge them into the model (`merge_and_unload()`), or move them away"
        )
    given = {name: value for name, value in weights.items() if value is not None}
    with opening(where + _quantised(folder)):
        module, report = model_class.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only to have them in the report, too
            **given,
        )
    refuse_gaps(
        f"{setting}={_places(folder, report)}" if setting else _places(folder, report),
        missing=report["missing_keys"],
        unexpected=[key for key in report["unexpected_keys"] if not key.startswith(left_out)],
        misshapen={key: (found, expected) for key, found, expected in report["mismatched_keys"]},
    )
    opened: PreTrainedModel = module
    return opened


def check_keys(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Exactly the expected keys, apart from `RECOMPUTED` ones.

    Raises:
        ModelError: names what is missing and what is too much.
    """
    expected, found = set(expected), set(found)
    refuse_gaps(where, missing=expected - found, unexpected=found - expected)


def check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Every tensor has the shape the model needs.

    Raises:
        ModelError: names those that have not.
    """
    shapes = {key: (tuple(found[key].shape), tuple(tensor.shape)) for key, tensor in expected.items()}
    refuse_gaps(where, misshapen={key: pair for key, pair in shapes.items() if pair[0] != pair[1]})


def refuse_gaps(
    where: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshapen: Mapping[str, tuple[Iterable[int], Iterable[int]]] | None = None,
) -> None:
    """The one rule for what a checkpoint's weights may lack or have too much: nothing.

    Args:
        where: file or folder, for the message.
        missing: names the model has and the checkpoint has not; tied weights do not count.
        unexpected: names the checkpoint has and the model has not; `RECOMPUTED` ones do not count.
        misshapen: shape in the checkpoint and in the model, by name.

    Raises:
        ModelError: if there is one; names the first of each kind and says what kind of file has such names.
    """
    lacking = set(missing)
    surplus = {key for key in unexpected if not key.endswith(RECOMPUTED)}
    wrong = [
        f"{key} is {list(found)}, expected {list(expected)}"
        for key, (found, expected) in sorted((misshapen or {}).items())
    ]
    complaints = []
    if lacking:
        complaints.append(f"{len(lacking)} missing keys: {_listed(sorted(lacking))}")
    if surplus:
        complaints.append(f"{len(surplus)} unexpected keys: {_listed(sorted(surplus))}")
    if wrong:
        complaints.append(f"{len(wrong)} tensors of another shape: {_listed(wrong)}")
    if complaints:
        raise ModelError(
            f"{where}: not a checkpoint of this architecture and size: {'; '.join(complaints)}; "
            f"{_advice(lacking, surplus)}"
        )


def check_finite(module: nn.Module, where: str) -> None:
    """No weight is infinite or not a number: one that is makes every state after it meaningless.

    Weights that are not in memory (offloaded) or quantised are not looked at.

    Raises:
        ModelError: names the first few.
    """
    refuse_not_finite(module.named_parameters(), where)


def refuse_not_finite(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """As `check_finite`, of weights with their names."""
    bad = [name for name, weight in weights if not _finite(weight)]
    if bad:
        raise ModelError(
            f"{where}: {len(bad)} weights hold infinite numbers or none at all: {_listed(bad)}; the file is damaged "
            "(download it again), or its numbers do not fit the type (set model.dtype=bfloat16 or float32)"
        )


def _finite(weight: Tensor) -> bool:
    if weight.dtype not in _SIMPLE_TYPES or weight.device.type == "meta" or not weight.numel():
        return True
    low, high = weight.detach().aminmax()  # both are nan if one number is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _quantised(folder: Path) -> str:
    """How a checkpoint is quantised, for messages; "" for not at all.

    Raises:
        ModelError: a way transformers does not know, which it would leave out with a line in its log.
    """
    settings = read_config(folder).get("quantization_config")
    if settings is None:
        return ""
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZER_MAPPING}:
        raise ModelError(
            f"{folder / 'config.json'}: quantised in a way transformers does not know ({method!r}); give a checkpoint "
            "in bfloat16, float16 or float32"
        )
    return f": quantised with {method}"


def _advice(missing: set[str], unexpected: set[str]) -> str:
    for prefix, kind in _WRAPPERS.items():
        if unexpected and all(key.startswith(prefix) for key in unexpected):
            return f"their names begin with {prefix!r}: {kind}, save that with `save_pretrained`, and give its folder"
    if any("lora_" in key for key in unexpected):
        return f"it holds LoRA weights: {_WRAPPERS['base_model.model.']}, save that and give its folder"
    begins = {key.partition(".")[0] for key in unexpected}
    if len(begins) == 1 and len(unexpected) > 1 and not begins & {key.partition(".")[0] for key in missing}:
        return f"their names begin with {begins.pop() + '.'!r}: save the model itself, without what is around it"
    return "download it again, or give the folder of a complete checkpoint in its published layout"


def _places(folder: Path, report: Mapping[str, Any]) -> str:
    """The file, or the index and those of its shards that the report is about."""
    entry = weights_entry(folder)
    if entry is None or not entry.name.endswith(".index.json"):
        return str(entry or folder)
    shards = {"": ""} | shard_of_keys(entry)
    keys = {*report["missing_keys"], *report["unexpected_keys"], *(key for key, *_ in report["mismatched_keys"])}
    concerned = sorted({shards[_published_name(key, shards)] for key in keys} - {""})
    return f"{entry} ({', '.join(concerned)})" if concerned else str(entry)


def _published_name(key: str, published: Iterable[str]) -> str:
    """The name in a file that a name in the model came from: transformers renames the front parts. "" for none."""

    def shared(other: str) -> int:
        pairs = zip(reversed(key.split(".")), reversed(other.split(".")), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    found = max(published, key=shared)
    return found if shared(found) >= min(3, key.count(".") + 1) else ""


def _listed(items: list[str]) -> str:
    return ", ".join(items[:SHOWN_KEYS]) + (", ..." if len(items) > SHOWN_KEYS else "")
