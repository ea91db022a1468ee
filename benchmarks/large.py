"""A model larger than memory: a random Voxtral Small (24B, bfloat16, 48 GB) in its published layout, traced from disk.

    python benchmarks/large.py make /scratch/small               # writes the checkpoint
    python benchmarks/large.py trace /scratch/small --json small.json
    python benchmarks/large.py make /scratch/four --layers 4     # the same weights, of the first layers
    python benchmarks/large.py compare /scratch/four             # offloaded against all in memory

`trace` is layer-wise, of a batch of clips, with `model.offload=disk`: it counts how often weights are read and watches
resident memory. What loads and offloads is what `model=voxtral model.offload=disk` uses; clips and prompts are random.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from common import (
    AUDIO_TOKEN,
    IDS,
    IdsOnly,
    RandomLALM,
    RandomVoxtral,
    Table,
    emit,
    published_decoder,
    published_encoder,
)
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM, VoxtralConfig, VoxtralForConditionalGeneration

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.engine.interface import Sweep
from lalm_patch.interventions.grids import layer_grid
from lalm_patch.models.offload import Offloaded, computed_dtypes
from lalm_patch.models.weights import load_pretrained

SHARD = 4 * 10**9
AUDIO, GIB = 375, 2**30


def main() -> None:
    """Make a checkpoint, trace it, or compare."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=("make", "trace", "compare"))
    made.add_argument("folder", type=Path)
    made.add_argument("--layers", type=int, default=40)
    made.add_argument("--clips", type=int, default=2)
    made.add_argument("--text", type=int, default=20)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--json", type=Path)
    options = made.parse_args()
    options.clock, options.dtype = "wall", "bfloat16"
    torch.set_num_threads(options.threads)
    {"make": make, "trace": trace, "compare": compare}[options.what](options)


def make(options: argparse.Namespace) -> None:
    """Write config.json and shards; a weight depends on its name alone."""
    decoder = published_decoder(
        "llama", layers=options.layers, hidden=5120, inside=32768, key_value_heads=8, words=131072
    )
    config = VoxtralConfig(
        audio_config=published_encoder(
            "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", False
        ),
        text_config=decoder,
        audio_token_id=AUDIO_TOKEN,
        dtype="bfloat16",
        architectures=["VoxtralForConditionalGeneration"],
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VoxtralForConditionalGeneration(config).state_dict().items()}
    options.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(options.folder)
    numbers = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if shards[-1] and held + size > SHARD:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {published(name): weight(name, shapes[name], numbers) for name in names}
        save_file(tensors, options.folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        print(f"{file}: {len(names)} tensors", flush=True)
    total = sum(2 * shape.numel() for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (options.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))


def published(name: str) -> str:
    """A weight's name in Voxtral's published files."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return re.sub(r"^model\.language_model\.", "language_model.model.", name).removeprefix("model.")


def weight(name: str, shape: torch.Size, numbers: torch.Tensor) -> torch.Tensor:
    """Random numbers of a size that keeps states from growing: cut out of one row of numbers, where by the name."""
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, dtype=torch.bfloat16)
    made = torch.empty(shape.numel(), dtype=torch.bfloat16)
    start, filled = zlib.crc32(name.encode()) % len(numbers), 0
    while filled < len(made):
        piece = numbers[start : start + len(made) - filled]
        made[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), (start + len(piece) + 1) % len(numbers)
    return made.mul_(0.02).view(shape)


def opened(folder: Path, offload: bool) -> RandomLALM:
    """The checkpoint as `LALM.load` opens it, without a processor."""
    module = load_pretrained(AutoModelForMultimodalLM, folder, dtype="auto", attn_implementation="sdpa")
    offloaded = None
    if offload:
        dtypes = computed_dtypes(module, torch.bfloat16)
        offloaded = Offloaded(module, torch.device("cpu"), dtypes, on_disk=True, where=str(folder))
    lalm = RandomVoxtral.__new__(RandomVoxtral)
    RandomLALM.__init__(lalm, module, IdsOnly(None))
    lalm.offloaded = offloaded
    return lalm


def sweeps(lalm: RandomLALM, options: argparse.Namespace) -> list[Sweep]:
    """Clips with one corrupted run in common, as with silence."""
    *clips, silent = (lalm.random_encoding(options.text, AUDIO, seed) for seed in range(options.clips + 1))
    grid = layer_grid(silent.tokens, range(lalm.num_layers))
    return [Sweep(clip, silent, grid, IDS) for clip in clips]


def trace(options: argparse.Namespace) -> None:
    """Base runs and all cells of a batch of clips."""
    started = time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")
    lalm = opened(options.folder, offload=True)
    assert lalm.offloaded is not None
    print(f"opened after {time.monotonic() - started:.0f} s", flush=True)
    chosen = sweeps(lalm, options)
    reads, encoded = list(lalm.offloaded.reads), time.monotonic()
    print(f"{options.clips + 1} encodings after {encoded - started:.0f} s", flush=True)
    engine = ReplayEngine(lalm, memory_budget=2)
    engine.bases([(sweep.source, sweep.target, IDS) for sweep in chosen])
    based = time.monotonic()
    print(f"base runs after {based - started:.0f} s", flush=True)
    found = engine.sweeps(chosen)
    done = time.monotonic()
    assert all(np.isfinite(readout.option_logits).all() for readout in found)
    of_decoder = [now - before for now, before in zip(lalm.offloaded.reads, reads, strict=True)][-lalm.num_layers :]
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    rows: list[list[str | int | float]] = [
        ["weights on disk, GB", size / 1e9],
        ["clips", options.clips],
        ["cells", sum(len(sweep.grid.cells) for sweep in chosen)],
        ["times each decoder layer was read", f"{min(of_decoder)} to {max(of_decoder)}"],
        ["encodings, s", encoded - started],
        ["base runs, s", based - encoded],
        ["all cells, s", done - based],
        ["largest layer, GiB", max(lalm.offloaded.layer_bytes) / GIB],
        ["peak resident memory, GiB", _peak() / GIB],
    ]
    emit([Table(f"{options.folder.name}: traced layer-wise from disk", ["", ""], rows)], options)


def compare(options: argparse.Namespace) -> None:
    """The same checkpoint offloaded and in memory: replay of all cells, and the direct engine of one."""
    found = {}
    for offload in (True, False):
        lalm = opened(options.folder, offload)
        sweep = sweeps(lalm, options)[0]
        found[offload] = ReplayEngine(lalm).sweep(sweep.source, sweep.target, sweep.grid, IDS)
        cells = sweep.grid.cells[1:2]
        direct = DirectEngine(lalm).cells(sweep.source, sweep.target, cells, IDS)
        difference = float(np.abs(direct.probabilities - found[offload].probabilities[1:2]).max())
        print(f"offload={offload}: replay and direct differ by {difference:.2g} in probability", flush=True)
    worst = float(np.abs(found[True].option_logits - found[False].option_logits).max())
    spread = float(np.ptp(found[False].option_logits, axis=0).max())
    print(f"offloaded and in memory: a logit differs by {worst:.2g} at most; the cells spread over {spread:.2g}")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
