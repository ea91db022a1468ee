"""Replay's time against that of its linear layers' matrix products alone: how far from what the arithmetic allows.

    python benchmarks/limit.py

One sweep of the token-wise grid, base runs included, is watched: every call of a linear layer (and of the head) with
the shape of its input. The same products are then computed alone, one after another, on inputs of those shapes.
"""

from __future__ import annotations

import torch
from common import IDS, RandomVoxtral, Table, emit, parser, seconds
from torch import Tensor, nn

from lalm_patch.engine import ReplayEngine
from lalm_patch.interventions.grids import token_grid


def main() -> None:
    """Measure and print."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    lalm = RandomVoxtral(options.layers, options.hidden)
    clean, corrupted = (lalm.random_encoding(options.text, options.audio, seed) for seed in (0, 1))
    grid = token_grid(clean.tokens, range(options.layers))
    calls: list[tuple[nn.Linear, tuple[int, ...]]] = []

    def replay() -> object:
        return ReplayEngine(lalm, options.pack_tokens).sweep(clean, corrupted, grid, IDS)

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, tuple(inputs[0].shape)))

    linear = [module for module in lalm.module.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch) for module in linear]
    replay()
    for handle in handles:
        handle.remove()
    inputs = {shape: torch.randn(shape) for _, shape in calls}

    def products() -> None:
        with torch.no_grad():
            for module, shape in calls:
                nn.functional.linear(inputs[shape], module.weight, module.bias)

    products()
    pairs = [
        (seconds(replay, 1, options.clock), seconds(products, 1, options.clock)) for _ in range(options.repeats)
    ]  # in turns, so that both see the same machine
    pairs.sort(key=lambda pair: pair[0] / pair[1])
    whole, limit = pairs[len(pairs) // 2]
    operations = sum(2 * shape.numel() * module.out_features for module, shape in _sized(calls))
    rows: list[list[str | int | float]] = [
        ["replay, whole sweep", whole, whole / limit],
        ["its matrix products alone", limit, 1.0],
    ]
    notes = [f"{len(grid.cells)} cells, {len(calls)} products, {operations / limit / 1e9:.0f} GFLOP/s in the products."]
    size = f"{options.layers} layers, hidden {options.hidden}, {options.audio} audio and {options.text} text positions"
    emit([Table(f"Replay and its matrix products: {size}", ["", "seconds", "ratio"], rows, notes)], options)


def _sized(calls: list[tuple[nn.Linear, tuple[int, ...]]]) -> list[tuple[nn.Linear, torch.Size]]:
    return [(module, torch.Size(shape)) for module, shape in calls]


if __name__ == "__main__":
    main()
