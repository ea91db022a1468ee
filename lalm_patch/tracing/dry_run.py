"""What a run would do, said before it does it: prompt, targets, cells and passes, memory and time, checks.

Needs configuration and tokenizer of the model, no weights, and computes nothing but a small matrix product to learn how
fast this machine is.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from lalm_patch.checks import STATEMENTS
from lalm_patch.engine.approximate import check_relevance
from lalm_patch.engine.choose import EXACT_STEPS, PROOF_STEPS, replay_obstacle
from lalm_patch.engine.cuts import check_cuts
from lalm_patch.engine.direct_paths import direct_passes
from lalm_patch.engine.memory import (
    GIB,
    KEPT_SHARE,
    PACK_TOKENS,
    ROW_TOKENS,
    base_run_bytes,
    bytes_per_token,
    free_budget,
    states_within,
    tokens_within,
)
from lalm_patch.engine.passes import plan_passes, sources_cost
from lalm_patch.engine.path_states import path_positions
from lalm_patch.engine.sites import check_sites
from lalm_patch.engine.sources import run_places
from lalm_patch.errors import DataError
from lalm_patch.interventions.grids import Grid, make_grid, patched_layers, place_in
from lalm_patch.interventions.patches import Site
from lalm_patch.interventions.segments import check_present
from lalm_patch.models import LALM, TokenTable
from lalm_patch.models.placement import device_name
from lalm_patch.models.precision import HALF
from lalm_patch.models.proof import NOISE_SECONDS, noise_clip, passes
from lalm_patch.settings import APPROXIMATE, RunSettings
from lalm_patch.stimuli import Attribute, Record
from lalm_patch.tracing.questions import Questions
from lalm_patch.tracing.transcripts import Transcripts
from lalm_patch.tracing.vectors import DIRECTION_CLIPS, MEAN_CLIPS

_GIGA = 1e9


@dataclass(frozen=True)
class Cost:
    """Estimates for one clip.

    Attributes:
        passes: forward passes, the clean and the corrupted run among them; by replay, passes up the layers: one for
            these two runs, and those of the cells.
        backward: backward passes, of an approximation.
        again: layers that base runs go through once more, by replay, for states that come from later layers; none where
            they are kept.
        taken: by replay, positions of states that are kept for other places than their own, summed over layers.
        positions: positions that go through decoder layers, summed over layers and passes.
        seconds: at the speed of matrix products on this device.
        weights: bytes of the model's parameters.
        working: bytes beside the weights, at most: states of cells and base runs, the inside of a layer, logits.
    """

    passes: int
    positions: int
    seconds: float
    weights: int
    working: int
    backward: int = 0
    again: int = 0
    taken: int = 0


def describe_run(
    settings: RunSettings, attribute: Attribute | None, records: list[Record] | DataError, left_out: str = ""
) -> str:
    """The page that `dry_run=true` prints.

    Args:
        settings: the run's settings.
        attribute: what is asked; None where each clip has its own question.
        records: the clips that are traced, or why they cannot be had here: then the example is noise.
        left_out: how many more there are, and why they are not.

    Raises:
        LalmPatchError: as the run itself would, where that needs no weights.
    """
    lalm = LALM.outline(settings.model)
    questions = Questions(lalm, attribute, settings)
    layout = questions.layout
    asked = questions.example(tuple(records) if isinstance(records, list) else ())
    answers = questions.answers(asked)
    prompt = replace(asked, transcript=Transcripts(lalm, settings).example)
    waveform, example = _example(records)
    tokens, _ = lalm.inputs(waveform, prompt, layout)
    place = place_in(lalm, settings.site, settings.granularity, settings.direction.name)
    check_sites(lalm, [place.site])
    if place.knockout:
        check_cuts(lalm)
    layers = patched_layers(place, settings.granularity)
    check_present(place.edges, tokens.segments)
    grid = make_grid(settings.granularity.name, tokens, layers, place)
    obstacle = replay_obstacle(lalm)
    there = settings.backend.name == "ndif"
    tower = place.site is Site.TOWER
    replay = settings.engine.name != "direct" and obstacle is None and not there and not tower
    cost = estimate(lalm, grid, tokens, settings, replay, len(asked.options))
    clips = f"{len(records)} clips" if isinstance(records, list) else f"clips unknown here ({records})"
    approximate = settings.engine.name in APPROXIMATE
    engine = "replay" if replay else "direct" + (f" ({obstacle})" if obstacle else "")
    if approximate:
        if settings.engine.name == "relevance":
            check_relevance(lalm)
        licence = f"{settings.engine.licence_cells} exact cells by {engine}"
        engine = f"{settings.engine.name}, approximate: {cost.backward} backward passes per clip and {licence}"
    if there:
        rows = max(1, (settings.engine.pack_tokens or ROW_TOKENS) // len(tokens))
        engine = f"ndif, on a server: one request per clip, its cells in passes of {rows} rows; otherwise as direct"
    unit = "passes up the layers" if replay and not approximate else "forward passes"
    total = f"; all clips {_duration(cost.seconds * len(records))}" if isinstance(records, list) else ""
    lines = [
        f"model    {settings.model.name}: {lalm.id} ({lalm.commit}), {type(lalm.module).__name__}, {lalm.num_layers} "
        f"decoder layers, prompt layout {layout}",
        f"data     {clips}" + (f"; {left_out}" if left_out else ""),
        f"example  {example}: {len(tokens)} positions, {len(tokens.audio_positions)} of them audio, "
        f"{len(tokens.text_positions)} after it",
        *_token_lines(tokens),
        "targets  "
        + ", ".join(f"{text} {' '.join(map(str, ids))}" for text, ids in zip(asked.answers, answers, strict=True)),
        f"grid     {settings.granularity.name}: {' x '.join(map(str, grid.shape))} = {len(grid.cells)} cells per clip; "
        f"site {settings.site.name}, {settings.direction.name}"
        + (f", windows of {settings.site.window} layers" if settings.site.window > 1 else ""),
        f"engine   {engine}: {cost.passes} {unit} per clip, clean and corrupted run included",
        *_source_lines(settings, grid, cost, replay),
        *(
            []
            if there
            else _proof_lines(settings, lalm.dtype not in HALF or settings.engine.precision in (None, "float32"))
        ),
        f"memory   {cost.weights / _GIGA:.2f} GB of weights ({settings.model.dtype}), about "
        f"{cost.working / _GIGA:.2f} GB beside them",
        f"time     about {_duration(cost.seconds)} per clip{total} (matrix products alone, on "
        f"{device_name(settings.model)})",
        "checks   " + "\n         ".join(f"{name}: {STATEMENTS[name]}" for name in STATEMENTS),
        "settings " + json.dumps(asdict(settings), ensure_ascii=False),
        "Nothing was run. Leave out dry_run=true to run it.",
    ]
    return "\n".join(["", *lines])


def estimate(lalm: LALM, grid: Grid, tokens: TokenTable, settings: RunSettings, replay: bool, options: int) -> Cost:
    """Passes, positions, time and memory of one clip.

    A position costs two operations per weight of a decoder layer and, for attention, four per key and hidden unit.
    Audio tower and projector run once per clip and once for what replaces it.
    """
    length, layers = len(tokens), lalm.num_layers
    item = lalm.dtype.itemsize
    decoder: Any = lalm.decoder_module
    config = decoder.config
    per_layer = _parameters(decoder.layers) // layers
    whole = _parameters(lalm.module)
    head = _parameters(lalm.module.get_output_embeddings())
    embedding = _parameters(lalm.module.get_input_embeddings())
    audio = max(whole - _parameters(decoder.layers) - head - embedding, 0)
    first = tokens.text_positions[0]
    cells, backward, again, taken = grid.cells, 0, 0, 0
    if settings.engine.name in APPROXIMATE:
        cells = cells[:: max(1, len(cells) // settings.engine.licence_cells)][: settings.engine.licence_cells]
        points = settings.engine.steps if settings.engine.name == "integrated_gradients" else 1
        backward = points * (options + 1)
    if replay:
        moving = [cell for cell in cells if not cell.idle]
        first = min([first, *(cell.first_position for cell in moving)])
        suffixes = [(cell.entry_layer, length - cell.first_position) for cell in moving]
        positions = 2 * layers * length + sum((layers - entry) * suffix for entry, suffix in suffixes)
        positions += path_positions(cells)
        given = settings.engine.memory_budget
        budget = free_budget(lalm.decoder_module) if given is None else given * GIB
        total = sum(suffix for _, suffix in suffixes)
        plan = [parts[0] for parts in plan_passes([(cells, length)], layers, states_within(budget, lalm))]
        passes = 1 + len(plan)
        most = settings.engine.pack_tokens or PACK_TOKENS[device_name(settings.model).split(":")[0]]
        pack = min(most, tokens_within(budget, lalm, length), total)
        going_up = min(total, states_within(budget, lalm))
        kept = [base_run_bytes(lalm, length, first, sites, keys) for sites, keys in ((0, True), (1, False))]
        again, taken = sources_cost(cells, plan)
        if max(kept) > KEPT_SHARE * budget:  # then they are computed once more, along with the cells
            positions += (2 * layers + again) * length
            kept = [size // layers for size in kept]
        else:
            again = 0
        working = sum(kept) + (2 * going_up + taken) * item * config.hidden_size + pack * bytes_per_token(lalm, length)
    else:
        # Runs that states are taken from go through once more for these.
        passes = 2 + len({place.origin for place in run_places(cells)}) + direct_passes(cells)
        positions = passes * layers * length
        working = length * bytes_per_token(lalm, length)
    if backward:  # both runs' states, every point's own pass; a backward pass costs two forward ones
        passes += 2 + points
        positions += (2 + points + 2 * backward) * layers * length
    attention = 4 * length * config.hidden_size
    operations = positions * (2 * per_layer + attention) + 2 * (2 if replay else passes) * audio * _audio_frames(tokens)
    return Cost(
        passes, positions, operations / _speed(lalm.dtype, settings), whole * item, working, backward, again, taken
    )


def _audio_frames(tokens: TokenTable) -> int:
    """Encoder frames for the audio positions; encoders see two to four frames per position."""
    return 4 * len(tokens.audio_positions)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _speed(dtype: torch.dtype, settings: RunSettings, size: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second of matrix products of the run's type on its device."""
    left = torch.randn(size, size, device=device_name(settings.model)).to(dtype)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        (left @ left).sum().item()  # item: waits for the device
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)


def _example(records: list[Record] | DataError) -> tuple[np.ndarray, str]:
    if isinstance(records, list):
        record = records[0]
        return record.waveform(None), f"clip {record.id}"
    return noise_clip(), f"{NOISE_SECONDS:g} s of noise"


def _proof_lines(settings: RunSettings, exact: bool) -> list[str]:
    """What is computed besides the cells of clips."""
    steps = passes(exact) + PROOF_STEPS + (0 if exact else EXACT_STEPS)
    lines = [f"proof    {steps} steps before the first clip, most of them forward passes"]
    engine = settings.engine
    if not exact and engine.float32_clips:
        lines.append(
            f"float32  both runs and {engine.float32_cells} cells of {engine.float32_clips} clips, to measure how far "
            f"engine.precision={engine.precision} is from it"
        )
    return lines


def _source_lines(settings: RunSettings, grid: Grid, cost: Cost, replay: bool) -> list[str]:
    """What has to be computed so that there is something to put in, where that is not the other run's same place."""
    granularity = settings.granularity
    if granularity.name == "ablate" and granularity.replacement == "mean":
        return [f"sources  clean runs of at most {MEAN_CLIPS} clips before the first one, for their mean states"]
    if granularity.name == "steer":
        return [f"sources  clean runs of at most {DIRECTION_CLIPS} clips before the first one, for class means"]
    if granularity.name == "path":
        return [_path_line(grid, replay)]
    places = run_places(grid.cells)
    if not places or all(patch.plain for cell in grid.cells for patch in cell.patches):
        return []
    if not replay:
        return [f"sources  states of {len(places)} places of the two runs, in one more pass of each run they are in"]
    again = (
        f"; {cost.again} layers of base runs are computed once more" if cost.again else ", or from runs that are kept"
    )
    return [f"sources  states of {cost.taken} positions and layers, taken on the way{again}"]


def _path_line(grid: Grid, replay: bool) -> str:
    """How many cells have paths, and what those take."""
    leading = [cell for cell in grid.cells if not cell.idle]
    senders = {sender for cell in leading if cell.path is not None for sender in cell.path.senders}
    said = f"paths    {len(leading)} of {len(grid.cells)} cells lead somewhere, the others are 0 by definition"
    if replay:
        more = path_positions(grid.cells)
        return f"{said}; {len(senders)} senders, each computed once, {more} positions of senders and receivers in all"
    return f"{said}; a cell takes several forward passes, everything held between senders and receivers"


def _token_lines(tokens: TokenTable) -> list[str]:
    """One line per token, audio and what is before it in runs."""
    lines = [f"         {'position':>9}  {'role':<10}  {'id':>7}  token"]
    for role, group in itertools.groupby(range(len(tokens)), key=lambda index: tokens.roles[index]):
        run = list(group)
        if role == "audio":
            lines.append(f"         {f'{run[0]}-{run[-1]}':>9}  {role:<10}  {tokens.ids[run[0]]:>7}  x {len(run)}")
        else:
            lines += [f"         {i:>9}  {role:<10}  {tokens.ids[i]:>7}  {tokens.texts[i]!r}" for i in run]
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
