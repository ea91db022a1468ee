"""What replay does on a GPU, with models of published shapes and random weights made on the device; no download.

    python benchmarks/gpu.py --json gpu.json        # under 8 minutes on one card with 80 GB
    python benchmarks/gpu.py --device cpu --small   # the same road on a small machine

For each shape and each dtype, random cells by replay and by the direct engine. Then, in one dtype, the token-wise grid:
time per cell beside one nnsight trace per cell and plain hooks, the share of the card's own matrix-product rate that
replay reaches in the linear layers' products, and peak memory beside the model. See gpu.sh for a machine without
packages.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from common import IDS, PublishedQwen2Audio, PublishedVoxtral, RandomLALM, Table, emit
from peers import nnsight_trace, plain_hooks
from torch import nn

from lalm_patch.engine import DirectEngine, Readout, ReplayEngine
from lalm_patch.engine.interface import Sweep
from lalm_patch.interventions.grids import Grid, layer_grid, token_grid
from lalm_patch.models import Encoding
from lalm_patch.models.offload import Offloaded
from lalm_patch.models.precision import compute_with

DTYPES = ("float32", "bfloat16", "float16")
SHAPES: dict[str, tuple[Callable[..., RandomLALM], int]] = {
    "Voxtral Mini": (PublishedVoxtral, 375),
    "Qwen2-Audio 7B": (PublishedQwen2Audio, 250),
}
"""Model and audio positions (a clip of 10 s; Voxtral pads it to 30)."""
TEXT = 40
SHARED = (1, 8)
"""Clips that share passes."""


def main() -> None:
    """Measure and print."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda")
    made.add_argument("--small", action="store_true", help="models of a few layers, for a try")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the timings")
    made.add_argument("--pack-tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    made.add_argument("--checked", type=int, default=12, help="cells computed by both engines")
    made.add_argument("--cells", type=int, default=8, help="cells everything but replay computes")
    made.add_argument("--json", help="also write the tables to this file")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help=argparse.SUPPRESS)
    options = made.parse_args()
    options.clock = "wall"
    tables = [agreement(options), *speed(options), precision(options), offload(options)]
    emit(tables, options, where(options.device))


def where(device: str) -> str:
    """The card, for the table's head."""
    if torch.device(device).type != "cuda":
        return ""
    card = torch.cuda.get_device_properties(device)
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


@contextmanager
def model(shape: str, dtype: str, options: argparse.Namespace) -> Iterator[tuple[RandomLALM, Encoding, Encoding, Grid]]:
    """A model, two encodings and the token-wise grid, and its memory back afterwards."""
    say(f"{shape}, {dtype}: making the model")
    make, audio = SHAPES[shape]
    lalm = make(getattr(torch, dtype), options.device, small=options.small)
    clean, corrupted = (lalm.random_encoding(TEXT, audio, seed) for seed in (0, 1))
    try:
        yield lalm, clean, corrupted, token_grid(clean.tokens, range(lalm.num_layers))
    finally:
        del lalm, clean, corrupted
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def agreement(options: argparse.Namespace) -> Table:
    """Replay against the direct engine on random cells, by dtype."""
    rows: list[list[str | int | float]] = []
    for shape in SHAPES:
        for dtype in DTYPES:
            with model(shape, dtype, options) as (lalm, clean, corrupted, grid):
                cells = (*grid.cells, *layer_grid(clean.tokens, range(lalm.num_layers)).cells)
                # Half of them of the layer-wise grid: single tokens of a random model matter little.
                numbers = np.random.default_rng(0)
                chosen = numbers.choice(len(grid.cells), options.checked // 2, replace=False)
                chosen = np.append(chosen, numbers.choice(np.arange(len(grid.cells), len(cells)), options.checked // 2))
                some = Grid(("cell",), {"cell": chosen}, tuple(cells[index] for index in chosen))
                fast = ReplayEngine(lalm).sweep(clean, corrupted, some, IDS)
                slow = DirectEngine(lalm).sweep(clean, corrupted, some, IDS)
                spread = float(np.ptp(slow.option_logits, axis=0).max())
                difference = float(np.abs(fast.option_logits - slow.option_logits).max())
                of_p = float(np.abs(fast.probabilities - slow.probabilities).max())
                rows.append([shape, dtype, len(chosen), difference, spread, of_p])
    columns = ["", "dtype", "cells", "largest difference of a logit", "spread of the cells' logits", "of a probability"]
    return Table("Replay against the direct engine", columns, rows)


def speed(options: argparse.Namespace) -> list[Table]:
    """Time per cell and memory."""
    rate = product_rate(options)
    say(f"matrix products: {rate / 1e12:.0f} TFLOP/s")
    times: list[list[str | int | float]] = []
    shares: list[list[str | int | float]] = []
    for shape in SHAPES:
        with model(shape, options.dtype, options) as (lalm, clean, corrupted, grid):
            chosen = np.random.default_rng(0).choice(len(grid.cells), options.cells, replace=False)
            patches = [grid.cells[index].patches[0] for index in chosen]
            fastest = float("inf")
            for tokens in options.pack_tokens:
                say(f"{shape}: replay, packs of {tokens}")
                engine = ReplayEngine(lalm, tokens)
                operations = watched(lalm, lambda engine=engine: engine.sweep(clean, corrupted, grid, IDS))
                resident = memory(options)
                seconds = timed(lambda engine=engine: engine.sweep(clean, corrupted, grid, IDS), options)
                fastest = min(fastest, seconds / len(grid.cells))
                shares.append(
                    [shape, tokens, seconds, operations / 1e12, operations / seconds / rate, peak(options) - resident]
                )
            times.append([shape, "replay, fastest (base runs included)", len(grid.cells), 1000 * fastest, 1.0])
            for name, sweep in (("one nnsight trace per cell", nnsight_trace), ("plain hooks", plain_hooks)):
                say(f"{shape}: {name}")
                work = partial(sweep, lalm, clean, corrupted, patches)
                work()
                each = timed(work, options) / (len(patches) + 1)
                times.append([shape, f"{name}, from audio", len(patches), 1000 * each, each / fastest])
    return [
        Table(f"Time per cell, {options.dtype}", ["", "", "cells", "ms per cell", "times replay"], times),
        Table(
            f"Replay of the token-wise grid, {options.dtype}",
            ["", "pack_tokens", "seconds", "TFLOP in products", "share of the card's rate", "peak beside model, GiB"],
            shares,
            [f"The card's rate: {rate / 1e12:.0f} TFLOP/s in a product of 8192 x 8192 matrices."],
        ),
    ]


def precision(options: argparse.Namespace) -> Table:
    """What float32 answers cost with bfloat16 weights, and how far other ways are from them."""
    rows: list[list[str | int | float]] = []
    shape, found = "Voxtral Mini", {}
    for mode in ("float32, widened for good", "float32", "stream", "as_loaded"):
        with model(shape, "bfloat16", options) as (lalm, clean, corrupted, grid):
            encodings = clean.inputs, corrupted.inputs, clean.tokens
            if mode.endswith("for good"):
                lalm.module.float()
            elif compute_with(lalm.module, mode):
                lalm.precision = mode
            say(f"{shape}: {mode}")
            clean, corrupted = (lalm.embed(encodings[2], inputs) for inputs in encodings[:2])
            engine = ReplayEngine(lalm)
            readout = engine.sweep(clean, corrupted, grid, IDS)
            found[mode] = readout.option_logits - readout.logsumexp[:, None]
            seconds = timed(partial(engine.sweep, clean, corrupted, grid, IDS), options)
            some = Grid(("cell",), {"cell": np.arange(8)}, grid.cells[:: len(grid.cells) // 8][:8])
            fast = engine.sweep(clean, corrupted, some, IDS).option_logits
            slow = DirectEngine(lalm).sweep(clean, corrupted, some, IDS).option_logits
            error = found[mode] - next(iter(found.values()))
            size = sum(parameter.numel() * parameter.itemsize for parameter in lalm.module.parameters()) / 2**30
            rows.append([mode, seconds, size, float(np.sqrt((error**2).mean())), float(np.abs(fast - slow).max())])
    columns = ["engine.precision", "seconds", "weights, GiB", "error of log P, rms", "replay against direct, a logit"]
    return Table(f"{shape}, bfloat16 weights, token-wise", columns, rows)


def offload(options: argparse.Namespace) -> Table:
    """Layers that wait in the CPU's memory: time and memory of a layer-wise sweep, by how many clips share a pass."""
    rows: list[list[str | int | float]] = []
    shape = "Qwen2-Audio 7B"
    with model(shape, options.dtype, options) as (lalm, _, corrupted, _grid):
        clips = [lalm.random_encoding(TEXT, SHAPES[shape][1], seed) for seed in range(2, 2 + max(SHARED))]
        sweeps = [Sweep(clip, corrupted, layer_grid(clip.tokens, range(lalm.num_layers)), IDS) for clip in clips]
        expected = ReplayEngine(lalm).sweeps(sweeps[:1])[0].option_logits
        for place in ("none", "cpu"):
            if place == "cpu":
                say(f"{shape}: moving layers to the CPU's memory")
                lalm.module.to("cpu")
                lalm.offloaded = Offloaded(lalm.module, torch.device(options.device), {}, on_disk=False)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            for count in SHARED:
                say(f"{shape}: model.offload={place}, {count} clips")
                engine, some = ReplayEngine(lalm), sweeps[:count]

                def run(engine: ReplayEngine = engine, some: list[Sweep] = some) -> list[Readout]:
                    engine.bases([(sweep.source, sweep.target, IDS) for sweep in some])
                    return engine.sweeps(some)

                worst = float(np.abs(run()[0].option_logits - expected).max())
                seconds = timed(run, options)
                rows.append([place, count, seconds / count, peak(options), worst])
        size = sum(parameter.numel() * parameter.itemsize for parameter in lalm.module.parameters()) / 2**30
    columns = [
        "model.offload",
        "clips that share passes",
        "seconds per clip",
        "peak, GiB",
        "largest difference of a logit",
    ]
    return Table(
        f"{shape}, layer-wise, base runs included, {options.dtype}", columns, rows, [f"Weights: {size:.1f} GiB."]
    )


def watched(lalm: RandomLALM, work: Callable[[], Any]) -> int:
    """Operations of the linear layers in a call."""
    found: list[int] = []

    def count(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(2 * inputs[0].numel() * module.out_features)

    linear = [module for module in lalm.module.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(count) for module in linear]
    work()
    for handle in handles:
        handle.remove()
    return sum(found)


def product_rate(options: argparse.Namespace) -> float:
    """Operations per second of large matrix products."""
    size = 512 if options.small else 8192
    left, right = (torch.randn(size, size, device=options.device).to(getattr(torch, options.dtype)) for _ in range(2))
    for _ in range(3):
        left @ right
    return 10 * 2 * size**3 / timed(lambda: [left @ right for _ in range(10)], options)


def timed(work: Callable[[], Any], options: argparse.Namespace) -> float:
    """Seconds of a call, until the device has done it; the record of peak memory begins with it."""
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if torch.device(options.device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory(options: argparse.Namespace) -> float:
    """GiB that are allocated on the device."""
    return torch.cuda.memory_allocated() / 2**30 if torch.device(options.device).type == "cuda" else float("nan")


def peak(options: argparse.Namespace) -> float:
    """GiB that were allocated on the device at most, in the last timed call."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.device(options.device).type == "cuda" else float("nan")


def say(line: str) -> None:
    """How far it is."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


if __name__ == "__main__":
    main()
