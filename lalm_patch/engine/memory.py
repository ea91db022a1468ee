"""How large a pack may be: a budget becomes a number of suffix positions; running out of memory is recognised."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from lalm_patch.engine.suffix_attention import fused_kernel
from lalm_patch.models import LALM

GIB = 2**30
GPU_SHARE, CPU_SHARE = 0.5, 0.25
"""Parts of the free memory that packs take: on a CPU other programs want some too."""
PACK_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Positions that go through a layer together where nothing else is set: a CPU's caches are small, a GPU wants more."""
ROW_TOKENS = 2048
"""Positions of the rows that go through the model together on a server, likewise."""
PACK_SHARE, STATES_SHARE, KEPT_SHARE = 0.5, 0.25, 0.25
"""Parts of a budget: what happens inside a layer, the states of the cells on their way, base runs that are kept."""
MOST_CLIPS = 32
"""Clips that share passes, where nothing else is set: they are stored together, when all are done."""
MOST_ROWS = 64
"""Cells whose logits over the whole vocabulary are in memory at once."""
ALLOCATOR_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")


def tokens_within(budget: float, lalm: LALM, positions: int) -> int:
    """Suffix positions of one pack whose activations inside a layer fit into a pass's budget, at least 1.

    Args:
        budget: bytes of the whole pass.
        lalm: the model.
        positions: length of a whole run, which attention scores grow with.
    """
    return max(1, int(PACK_SHARE * budget // bytes_per_token(lalm, positions)))


def states_within(budget: float, lalm: LALM) -> int:
    """Suffix positions whose states fit into a pass's budget of so many bytes, at least 1."""
    return max(1, int(STATES_SHARE * budget // (lalm.state_dtype.itemsize * _config(lalm).hidden_size)))


def rows_within(budget: float, lalm: LALM) -> int:
    """Cells whose logits (with copies) fit into a pass's budget of so many bytes, at least 1."""
    return max(1, min(MOST_ROWS, int(PACK_SHARE * budget // (3 * 4 * _config(lalm).vocab_size))))


def bytes_per_token(lalm: LALM, positions: int) -> int:
    """What one suffix position takes inside a layer at most, an upper bound read off the decoder's shapes.

    Counted are the residual stream and its copies around a layer, the queries and what attention makes of them, the
    inside of the MLP, and scores where they are written out.
    """
    config = _config(lalm)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inside = max(
        getattr(config, "intermediate_size", None) or 0,
        (getattr(config, "moe_intermediate_size", None) or 0) * (getattr(config, "num_experts_per_tok", None) or 1),
    )
    states = lalm.state_dtype.itemsize * (8 * config.hidden_size + 8 * heads * head_size + 4 * inside)
    scores = 0 if fused_kernel(lalm.device.type, lalm.state_dtype) else 3 * 4 * heads * positions
    return int(states + scores)


def base_run_bytes(lalm: LALM, positions: int, first: int, sites: int, keys: bool) -> int:
    """What a base run takes whose states are kept.

    Args:
        lalm: the model.
        positions: of the run.
        first: position from which on states are kept.
        sites: sites inside each layer.
        keys: whether keys and values are kept.
    """
    config = _config(lalm)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = (positions - first) * config.hidden_size * (1 + sites)
    return int(lalm.num_layers * lalm.state_dtype.itemsize * (states + keys * 2 * heads * head_size * positions))


def _config(lalm: LALM) -> Any:
    return lalm.decoder_module.config


def free_budget(decoder: nn.Module) -> float:
    """Bytes a pack may take when no budget is set: a share of what is free on the decoder's fullest device."""
    devices = {parameter.device for parameter in decoder.parameters()}
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        return GPU_SHARE * min(torch.cuda.mem_get_info(device)[0] for device in gpus)
    return CPU_SHARE * _available_memory()


def give_back_holes() -> None:
    """Let the C library give memory back to the system that lies free between blocks in use.

    Each layer makes and frees large blocks of many sizes among few that stay; glibc keeps what is freed, and the
    process would grow to a multiple of what it needs. Elsewhere than with glibc nothing happens.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], object] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (torch has no type of its own for the latter)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATOR_MESSAGES)


def _available_memory() -> float:
    """Bytes of main memory that can be had: what the kernel says, or all of it where it does not say."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return float(available.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return float(os.sysconf("SC_PHYS_PAGES") * page)
