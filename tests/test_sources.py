"""What a patch puts in: plain PyTorch hooks against the direct engine, that against replay, and identities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, noise
from test_engines import TOLERANCE, encodings, likely_tokens

from lalm_patch.engine import ApproximateEngine, DirectEngine, ReplayEngine
from lalm_patch.engine.interface import Sweep
from lalm_patch.engine.whole_answers import AnswerReader
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid
from lalm_patch.interventions.patches import SAME_PLACE, Cut, Intervention, Origin, Patch, Site, Source
from lalm_patch.models import LALM, Encoding
from lalm_patch.stimuli import Prompt

Edit = Callable[[torch.Tensor], torch.Tensor]
FAMILIES = ("qwen2_audio", "voxtral", "desta2", "desta25", "qwen_audio")
SMALL = 1e-7
"""GiB in which no base run can be kept, and few cells share a pass."""


def grid_of(*cells: Intervention, **arrays: np.ndarray) -> Grid:
    return Grid(("cell",), {"cell": np.arange(len(cells))}, cells, arrays)


def random_basis(width: int, rows: int, seed: int = 0) -> np.ndarray:
    """Orthonormal rows."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, rows)))[0].T.astype(np.float32)


def module_of(lalm: LALM, layer: int, site: Site) -> torch.nn.Module:
    """The module whose output (at the sites `embed` and `head`: input) the site is."""
    names = {Site.ATTN: "self_attn", Site.MLP: "mlp", Site.HEAD: "self_attn.o_proj"}
    found: torch.nn.Module = lalm.decoder_module.layers[layer].get_submodule(names.get(site, ""))
    return found


def first_of(value: Any) -> torch.Tensor:
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, torch.Tensor)
    return found


def with_hooks(
    lalm: LALM, encoding: Encoding, edits: Mapping[tuple[int, Site], Edit], keep: list[tuple[int, Site]]
) -> tuple[torch.Tensor, dict[tuple[int, Site], torch.Tensor]]:
    """Logits of a run whose states [positions, width] are edited by PyTorch's hooks, and states of other places."""
    found: dict[tuple[int, Site], torch.Tensor] = {}
    handles = []
    for place in {*edits, *keep}:

        def change(value: Any, place: tuple[int, Site] = place) -> Any:
            states = first_of(value).clone()
            if place in edits:
                states[0] = edits[place](states[0])
            found[place] = states[0].clone()
            return (states, *value[1:]) if isinstance(value, tuple) else states

        module = module_of(lalm, *place)
        if place[1] in (Site.EMBED, Site.HEAD):

            def before(_m: Any, args: Any, kwargs: Any, change: Any = change) -> Any:
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _m, _i, output, change=change: change(output)))
    with torch.no_grad():
        logits = lalm.module(**encoding.inputs).logits[0, -1].float()
    for handle in handles:
        handle.remove()
    return logits, found


def at(where: list[int], value: torch.Tensor | float) -> Edit:
    """An edit that puts something at some positions."""

    def edit(states: torch.Tensor) -> torch.Tensor:
        states[where] = value
        return states

    return edit


def test_direct_engine_equals_plain_hooks_for_each_kind_of_source(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    text, audio, width = clean.tokens.text_positions, clean.tokens.audio_positions[:5], 64
    rng, last, basis = np.random.default_rng(0), (clean.tokens.text_positions[-1],), random_basis(64, 5)
    vector, rows = rng.normal(size=width).astype(np.float32), rng.normal(size=(5, width)).astype(np.float32)
    arrays = {"vector": vector, "rows": rows, "basis": basis}
    every = [(layer, Site.RESID) for layer in range(3)] + [(0, Site.EMBED), (1, Site.ATTN), (1, Site.HEAD)]
    _, other = with_hooks(lalm, clean, {}, every)
    _, own = with_hooks(lalm, corrupted, {}, every)
    resid, audio_, text_ = Site.RESID, list(audio), list(text)
    p = torch.tensor(basis).T @ torch.tensor(basis)
    head = slice(16, 32)

    def head_zero(states: torch.Tensor) -> torch.Tensor:
        states[text_, head] = 0.0
        return states

    def blend(states: torch.Tensor) -> torch.Tensor:
        states[text_] = 0.3 * states[text_] + 0.7 * other[1, resid][text_]
        return states

    def subspace(states: torch.Tensor) -> torch.Tensor:
        states[text_] += (other[1, resid][text_] - states[text_]) @ p
        return states

    def steered(states: torch.Tensor) -> torch.Tensor:
        states[text_] += -1.5 * torch.tensor(vector)
        return states

    cases: list[tuple[Patch, tuple[int, Site], Edit]] = [
        (Patch(1, text), (1, resid), at(text_, other[1, resid][text_])),
        (Patch(0, audio, source=Source(layer=2)), (0, resid), at(audio_, other[2, resid][audio_])),
        (Patch(0, audio, source=Source(Origin.OWN, 2)), (0, resid), at(audio_, own[2, resid][audio_])),
        (Patch(2, text, source=Source(layer=0)), (2, resid), at(text_, other[0, resid][text_])),
        (
            Patch(0, audio, Site.EMBED, source=Source(Origin.OWN, 1, site=resid)),
            (0, Site.EMBED),
            at(audio_, own[1, resid][audio_]),
        ),
        (
            Patch(1, last, source=Source(positions=audio[:1])),
            (1, resid),
            at(list(last), other[1, resid][audio_[:1]]),
        ),
        (
            Patch(1, text, Site.MLP, source=Source(Origin.OWN, site=Site.ATTN)),
            (1, Site.MLP),
            at(text_, own[1, Site.ATTN][text_]),
        ),
        (Patch(1, text, source=Source(Origin.ZERO)), (1, resid), at(text_, 0.0)),
        (Patch(1, text, Site.HEAD, 1, Source(Origin.ZERO)), (1, Site.HEAD), head_zero),
        (
            Patch(1, text, source=Source(Origin.VECTOR, vector="vector")),
            (1, resid),
            at(text_, torch.tensor(vector)),
        ),
        (Patch(0, audio, source=Source(Origin.VECTOR, vector="rows")), (0, resid), at(audio_, torch.tensor(rows))),
        (Patch(1, text, source=Source(alpha=0.7)), (1, resid), blend),
        (Patch(1, text, source=Source(basis="basis")), (1, resid), subspace),
        (Patch(1, text, source=Source(Origin.VECTOR, vector="vector", alpha=-1.5, added=True)), (1, resid), steered),
    ]
    ids = likely_tokens(lalm, clean, corrupted)
    grid = grid_of(*(Intervention([patch]) for patch, _, _ in cases), **arrays)
    found = DirectEngine(lalm).sweep(clean, corrupted, grid, ids)
    base = DirectEngine(lalm).base(clean, corrupted, ids)
    for row, (patch, place, edit) in enumerate(cases):
        expected, _ = with_hooks(lalm, corrupted, {place: edit}, [])
        np.testing.assert_allclose(found.option_logits[row], expected[list(ids)], atol=1e-5, err_msg=str(patch))
        assert (found.option_logits[row] != base.option_logits[1]).any(), patch  # the patch did something


def random_source(rng: np.random.Generator, patch: Patch, layers: int, positions: int) -> Source:
    """Any kind of source that a patch of the decoder can have; arrays are named as `random_grid` makes them."""
    origin = list(Origin)[rng.integers(4)]
    wide = patch.site is not Site.HEAD
    taken: dict[str, Any] = {}
    if origin in (Origin.OTHER, Origin.OWN):
        if wide and rng.random() < 0.5:
            taken["site"] = [Site.RESID, Site.ATTN, Site.MLP, Site.EMBED][rng.integers(4)]
        if taken.get("site", patch.site) is Site.EMBED:
            taken["layer"] = 0
        elif rng.random() < 0.7 or patch.site is Site.EMBED:
            taken["layer"] = int(rng.integers(layers))
        if rng.random() < 0.5:
            taken["positions"] = tuple(int(each) for each in rng.integers(positions, size=len(patch.positions)))
    elif origin is Origin.VECTOR:
        taken["vector"] = "vector"
    alpha = float(rng.choice([1.0, 0.4, -2.0]))
    basis = "basis" if wide and rng.random() < 0.4 else None
    return Source(origin, alpha=alpha, basis=basis, added=bool(rng.random() < 0.3), **taken)


def random_grid(lalm: LALM, encoding: Encoding, seed: int, count: int) -> Grid:
    """Cells of several patches each, some with cut attention, with sources of every kind."""
    rng, length, cells = np.random.default_rng(seed), len(encoding.tokens), []
    for _ in range(count):
        patches = []
        every = rng.permutation(np.arange(length - 12, length))
        for number in range(rng.integers(1, 4)):
            chosen = tuple(sorted(int(each) for each in every[number * 4 : number * 4 + rng.integers(1, 4)]))
            site = [Site.RESID, Site.RESID, Site.ATTN, Site.MLP, Site.HEAD, Site.EMBED][rng.integers(6)]
            layer = 0 if site is Site.EMBED else int(rng.integers(lalm.num_layers))
            head = int(rng.integers(lalm.num_heads)) if site is Site.HEAD else None
            patch = Patch(layer, chosen, site, head)
            source = random_source(rng, patch, lalm.num_layers, length) if rng.random() < 0.9 else SAME_PLACE
            patches.append(Patch(layer, chosen, site, head, source))
        cuts = [Cut(int(rng.integers(lalm.num_layers)), (length - 1,), (length - 9,))] if rng.random() < 0.2 else []
        cells.append(Intervention(patches, cuts))
    width = lalm.decoder_module.config.hidden_size
    return grid_of(*cells, vector=rng.normal(size=width).astype(np.float32), basis=random_basis(width, 7))


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LALM:
    """A tiny model of each of the five families."""
    folders = checkpoints if request.param in checkpoints else request.getfixturevalue("native_folders")
    return load(folders[request.param], request.param)


def test_replay_equals_direct_with_any_sources(any_family: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(any_family, prompt)
    grid = random_grid(any_family, clean, seed=1, count=30)
    ids = likely_tokens(any_family, clean, corrupted)
    slow = DirectEngine(any_family).sweep(clean, corrupted, grid, ids).probabilities
    fast = ReplayEngine(any_family).sweep(clean, corrupted, grid, ids).probabilities
    np.testing.assert_allclose(fast, slow, atol=TOLERANCE)
    assert np.ptp(slow, axis=0).max() > 1e-2
    # A second sweep starts from kept runs, a small budget keeps none and takes many passes.
    engine, small = ReplayEngine(any_family), ReplayEngine(any_family, 40, SMALL)
    for each in (engine, small):
        each.base(clean, corrupted, ids)
        for _ in range(2):
            np.testing.assert_allclose(each.sweep(clean, corrupted, grid, ids).probabilities, slow, atol=TOLERANCE)


def test_clips_share_passes_and_answers_have_several_tokens(lalm: LALM, prompt: Prompt) -> None:
    """Two clips with one corrupted run, together and alone; and the factors of answers of several tokens."""
    clean, corrupted = encodings(lalm, prompt)
    other = lalm.encode(noise(1.3, seed=5), prompt, "chat")
    grid = random_grid(lalm, clean, seed=4, count=12)
    ids = likely_tokens(lalm, clean, corrupted)
    alone = [DirectEngine(lalm).sweep(source, corrupted, grid, ids).probabilities for source in (clean, other)]
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    for budget in (None, SMALL):
        engine = ReplayEngine(lalm, memory_budget=budget)
        together = engine.sweeps([Sweep(source, corrupted, grid, ids) for source in (clean, other)])
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(found.probabilities, expected, atol=TOLERANCE)
    read = AnswerReader([ids[:3], (ids[0], ids[2]), ids[1:2]], whole=True)
    slow = read.sweep(DirectEngine(lalm), clean, corrupted, grid).probabilities
    fast = read.sweep(ReplayEngine(lalm), clean, corrupted, grid).probabilities
    np.testing.assert_allclose(fast, slow, atol=TOLERANCE)


def layer_calls(lalm: LALM, engine: ReplayEngine, pair: tuple[Encoding, Encoding], grid: Grid) -> int:
    """How often a whole run goes through the decoder's second layer in a sweep; what enters it is remembered."""
    seen: list[int] = []
    handle = lalm.decoder_module.layers[1].register_forward_hook(
        lambda _m, _i, output: seen.append(first_of(output).shape[1])
    )
    try:
        engine.sweep(*pair, grid, (1, 2))
    finally:
        handle.remove()
    return sum(length == len(pair[0].tokens) for length in seen)


def test_only_states_of_later_layers_cost_another_pass_of_a_base_run(lalm: LALM, prompt: Prompt) -> None:
    pair = encodings(lalm, prompt)
    text = pair[0].tokens.text_positions
    calls = {}
    for name, layer, source in (
        ("plain", 1, SAME_PLACE),
        ("same layer", 1, Source(positions=text[::-1])),
        ("earlier layer", 2, Source(layer=0)),
        ("later layer", 0, Source(layer=1)),
        ("later layer of its own run", 0, Source(Origin.OWN, 1)),
    ):
        grid = grid_of(Intervention([Patch(layer, text, source=source)]))
        calls[name] = layer_calls(lalm, ReplayEngine(lalm, memory_budget=SMALL), pair, grid)
    assert calls["plain"] == calls["same layer"] == calls["earlier layer"] == 2
    assert calls["later layer"] == calls["later layer of its own run"] == 3


@pytest.mark.parametrize("engine_class", [DirectEngine, ReplayEngine])
def test_identities(lalm: LALM, prompt: Prompt, engine_class: type) -> None:
    """No alpha and an empty basis change nothing; all of either, and the same place by name, is the plain patch."""
    clean, corrupted = encodings(lalm, prompt)
    engine, ids = engine_class(lalm), likely_tokens(lalm, clean, corrupted)
    text = clean.tokens.text_positions
    arrays = {"full": random_basis(64, 64), "empty": np.zeros((0, 64), np.float32), "some": random_basis(64, 9)}
    arrays["rest"] = np.linalg.qr(np.concatenate([arrays["some"], random_basis(64, 64)]).T)[0].T[9:].astype(np.float32)

    def rows(*sources: Source) -> np.ndarray:
        cells = [Intervention([Patch(1, text, source=source)]) for source in sources]
        return np.asarray(engine.sweep(clean, corrupted, grid_of(*cells, **arrays), ids).probabilities)

    unpatched = engine.base(clean, corrupted, ids).probabilities[1]
    (plain,) = rows(SAME_PLACE)
    assert np.abs(plain - unpatched).max() > 1e-3
    nothing = rows(Source(alpha=0.0), Source(basis="empty"), Source(Origin.OWN), Source(Origin.ZERO, added=True))
    np.testing.assert_allclose(nothing, np.broadcast_to(unpatched, nothing.shape), atol=1e-6)
    same = rows(Source(basis="full"), Source(layer=1), Source(positions=text), Source(alpha=1))
    np.testing.assert_allclose(same, np.broadcast_to(plain, same.shape), atol=1e-6)
    part, other_part = rows(Source(basis="some"), Source(basis="rest"))
    for one in (part, other_part):
        assert np.abs(one - plain).max() > 1e-4
        assert np.abs(one - unpatched).max() > 1e-4


def test_a_subspace_and_what_is_left_of_it_make_the_whole(lalm: LALM, prompt: Prompt) -> None:
    """Clean within a subspace into the corrupted run is corrupted within the rest of it into the clean run."""
    clean, corrupted = encodings(lalm, prompt)
    ids, layer = likely_tokens(lalm, clean, corrupted), 1
    every = tuple(range(len(clean.tokens)))
    whole = random_basis(64, 64)
    arrays = {"some": whole[:20], "rest": whole[20:]}
    here, there = (grid_of(Intervention([Patch(layer, every, source=Source(basis=key))]), **arrays) for key in arrays)
    denoised = ReplayEngine(lalm).sweep(clean, corrupted, here, ids).probabilities
    noised = ReplayEngine(lalm).sweep(corrupted, clean, there, ids).probabilities
    np.testing.assert_allclose(denoised, noised, atol=TOLERANCE)


def test_sources_are_data() -> None:
    one, two = (Patch(1, (3, 4), source=Source(Origin.OWN, 2, alpha=0.5)) for _ in range(2))
    assert one == two
    assert len({one, two, Patch(1, (3, 4))}) == 2
    assert Patch(1, (3,), source=Source()).plain
    for wrong, message in (
        (lambda: Source(Origin.VECTOR), "a vector's key"),
        (lambda: Source(vector="a"), "a vector's key"),
        (lambda: Source(Origin.ZERO, 1), "at no place of a run"),
        (lambda: Source(layer=-1), "counted from 0"),
        (lambda: Source(alpha=float("nan")), "finite alpha"),
        (lambda: Patch(0, (1, 2), source=Source(positions=(1,))), "a source position for each"),
        (lambda: Patch(0, (1,), Site.HEAD, 0, Source(site=Site.MLP)), "not as wide"),
        (lambda: Patch(1, (1,), source=Source(site=Site.EMBED)), "the site embed is before layer 0"),
        (lambda: Intervention([Patch(1, (1,)), Patch(1, (1, 2), source=Source(alpha=0.5))]), "two patches of position"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()  # type: ignore[no-untyped-call]


def test_arrays_are_checked_where_they_travel(lalm: LALM, prompt: Prompt) -> None:
    vector, basis = Source(Origin.VECTOR, vector="mean"), Source(basis="axes")
    cells = [Intervention([Patch(0, (1,), source=source)]) for source in (vector, basis)]
    with pytest.raises(ValueError, match="orthonormal rows"):
        grid_of(cells[1], axes=np.ones((2, 8)))
    with pytest.raises(ValueError, match="finite"):
        grid_of(cells[0], mean=np.array([np.nan]))
    clean, corrupted = encodings(lalm, prompt)
    for engine in (DirectEngine(lalm), ReplayEngine(lalm)):
        with pytest.raises(ValueError, match="a cell names the array 'mean', and the grid has none"):
            engine.sweep(clean, corrupted, grid_of(cells[0]), (1, 2))
        with pytest.raises(ValueError, match=r"array mean: expected \[64\] or \[1, 64\]"):
            engine.sweep(clean, corrupted, grid_of(cells[0], mean=np.ones(7)), (1, 2))
        with pytest.raises(ValueError, match="basis axes: expected rows of width 64"):
            engine.sweep(clean, corrupted, grid_of(cells[1], axes=random_basis(8, 2)), (1, 2))


def test_engines_that_cannot_say_so(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    grid = grid_of(Intervention([Patch(0, clean.tokens.text_positions, source=Source(layer=1))]))
    with pytest.raises(ModelError, match=r"attribution follows a gradient .* use engine=auto"):
        ApproximateEngine(lalm, DirectEngine(lalm), "attribution", 1).sweep(clean, corrupted, grid, (1, 2))
    beyond = grid_of(Intervention([Patch(0, (1,), source=Source(layer=99))]))
    with pytest.raises(ModelError, match="layer 99"):
        ReplayEngine(lalm).sweep(clean, corrupted, beyond, (1, 2))
