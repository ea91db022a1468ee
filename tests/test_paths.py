"""Path patching: modules held by plain PyTorch hooks against the direct engine, that against replay, and identities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load, noise
from test_engines import TOLERANCE, encodings, likely_tokens
from test_sources import FAMILIES, SMALL, first_of, grid_of

from lalm_patch.engine import ApproximateEngine, DirectEngine, ReplayEngine
from lalm_patch.engine.interface import Sweep
from lalm_patch.engine.path_states import PathStates
from lalm_patch.errors import ModelError
from lalm_patch.interventions import Input, Intervention, Patch, PathPatch, Receiver, Sender, Site
from lalm_patch.models import LALM, Encoding
from lalm_patch.stimuli import Prompt

States = dict[str, torch.Tensor]
HEAD_SIZE = 16
KEY_VALUE_SHARE = 2
"""Query heads that share a key, in the tiny Qwen2-Audio."""


def path(senders: Sender | list[Sender], *receivers: Receiver) -> Intervention:
    sent = tuple(senders) if isinstance(senders, list) else (senders,)
    return Intervention(path=PathPatch(sent, tuple(receivers)))


@pytest.fixture(scope="module")
def one(checkpoints: dict[str, Path]) -> LALM:
    """A tiny Qwen2-Audio."""
    return load(checkpoints["qwen2_audio"], "qwen2_audio")


# --- the definition, by hooks ----------------------------------------------------------------------------------


def run_hooked(lalm: LALM, encoding: Encoding, edits: dict[str, Callable[[torch.Tensor], None]]) -> States:
    """A run whose modules' outputs [positions, width] are edited in place, by their names in the decoder; all outputs.

    `o_proj.input` is what enters an output projection: the heads side by side.
    """
    found: States = {}
    handles = []
    names = ("self_attn", "mlp", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "")
    for index, layer in enumerate(lalm.decoder_module.layers):
        for name in names:
            key = f"{index}.{name}"

            def after(_m: Any, _i: Any, output: Any, key: str = key) -> Any:
                states = first_of(output).clone()
                if key in edits:
                    edits[key](states[0])
                found[key] = states[0].clone()
                return (states, *output[1:]) if isinstance(output, tuple) else states

            handles.append(layer.get_submodule(name).register_forward_hook(after))

        def before(_m: Any, args: Any, key: str = f"{index}.o_proj.input") -> Any:
            states = args[0].clone()
            if key in edits:
                edits[key](states[0])
            found[key] = states[0].clone()
            return (states,)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(before))
    with torch.no_grad():
        found["logits"] = lalm.module(**encoding.inputs).logits[0, -1].float()
    for handle in handles:
        handle.remove()
    return found


def put(states: torch.Tensor, where: tuple[int, ...] = (), within: slice = slice(None)) -> Callable[..., None]:
    """An edit that puts rows of a whole run's states where they belong; all of them for no positions."""
    rows: Any = list(where) or slice(None)

    def edit(there: torch.Tensor) -> None:
        there[rows, within] = states[rows, within]

    return edit


def both(*edits: Callable[..., None]) -> Callable[..., None]:
    def edit(there: torch.Tensor) -> None:
        for each in edits:
            each(there)

    return edit


def head_of(head: int, share: int = 1) -> slice:
    return slice(head // share * HEAD_SIZE, (head // share + 1) * HEAD_SIZE)


def hooked_path(lalm: LALM, other: States, own: States, target: Encoding, cell: Intervention) -> torch.Tensor:
    """Logits of the patched run with one path, receivers in one layer, every module between held by a hook."""
    assert cell.path is not None
    senders, receivers = cell.path.senders, cell.path.receivers
    modules = {Site.ATTN: "self_attn", Site.MLP: "mlp", Site.HEAD: "o_proj.input", Site.RESID: ""}
    held = {f"{i}.{name}": put(own[f"{i}.{name}"]) for i in range(lalm.num_layers) for name in ("self_attn", "mlp")}
    for sender in senders:
        key, within = f"{sender.layer}.{modules[sender.site]}", slice(None)
        sent = other
        if sender.reads is not None:
            kv = {f"{sender.layer}.self_attn.{n}": put(other[f"{sender.layer}.self_attn.{n}"], sender.reads)
                  for n in ("k_proj", "v_proj")}  # fmt: skip
            sent = run_hooked(lalm, target, kv)
        if sender.site is Site.HEAD:
            assert sender.head is not None
            within = head_of(sender.head)
            held.pop(f"{sender.layer}.self_attn")
            held.setdefault(key, put(own[key]))
        held[key] = both(held.get(key, lambda there: None), put(sent[key], sender.positions, within))
    frozen = run_hooked(lalm, target, held)
    final: dict[str, Callable[..., None]] = {}

    def add(key: str, edit: Callable[..., None]) -> None:
        final[key] = both(final.get(key, lambda there: None), edit)

    for receiver in receivers:
        layer, where, head = receiver.layer, receiver.positions, receiver.head
        if receiver.input is Input.RESID:
            add(f"{layer - 1}.", put(frozen[f"{layer - 1}."], where))
            continue
        name = f"{layer}.self_attn.{receiver.input.value[0]}_proj"
        if receiver.input is Input.QUERY:
            add(name, put(frozen[name], where, slice(None) if head is None else head_of(head)))
        elif head is None and receiver.seen_by is None:
            add(name, put(frozen[name], where))
        else:  # what these queries read, of a run in which all see the changed ones
            of_group = slice(None) if head is None else head_of(head, KEY_VALUE_SHARE)
            seen = run_hooked(lalm, target, {name: put(frozen[name], where, of_group)})
            columns = slice(None) if head is None else head_of(head)
            add(f"{layer}.o_proj.input", put(seen[f"{layer}.o_proj.input"], receiver.seen_by or (), columns))
    return run_hooked(lalm, target, final)["logits"]


def test_direct_engine_equals_hooks_that_hold_every_module(one: LALM, prompt: Prompt) -> None:
    lalm = one
    clean, corrupted = encodings(lalm, prompt)
    tokens, last = clean.tokens, (len(clean.tokens) - 1,)
    text, audio, some = tokens.text_positions, tokens.audio_positions, tokens.text_positions[2:6]
    attn = Sender(0, text, Site.ATTN)
    cells = [
        path(attn, Receiver(2, text)),
        path(attn, Receiver(4, last)),
        path(attn, Receiver(3, text, Input.QUERY)),
        path(attn, Receiver(1, text, Input.KEY)),
        path(attn, Receiver(2, text, Input.VALUE)),
        path(attn, Receiver(1, some, Input.QUERY, 3), Receiver(1, last, Input.QUERY, 1)),
        path(Sender(0, some, Site.MLP), Receiver(2, text, Input.VALUE, seen_by=last)),
        path(Sender(0, some, Site.MLP), Receiver(2, text, Input.KEY, 1, text[-4:])),
        path(Sender(1, audio, Site.RESID), Receiver(3, audio, Input.VALUE, 2, last)),
        path(Sender(1, text, Site.HEAD, 2), Receiver(3, text)),
        path([Sender(0, text, Site.HEAD, 0), Sender(1, text, Site.HEAD, 3), attn_of(2, some)], Receiver(4, last)),
        path(Sender(1, some, Site.ATTN, reads=audio), Receiver(2, some, Input.VALUE, seen_by=last)),
        path([Sender(0, text), Sender(1, some, Site.MLP)], Receiver(2, text[3:], Input.KEY)),
    ]
    own, other = run_hooked(lalm, corrupted, {}), run_hooked(lalm, clean, {})
    ids = likely_tokens(lalm, clean, corrupted)
    found = DirectEngine(lalm).sweep(clean, corrupted, grid_of(*cells), ids).option_logits
    unpatched = own["logits"][list(ids)].numpy()
    for cell, row in zip(cells, found, strict=True):
        expected = hooked_path(lalm, other, own, corrupted, cell)[list(ids)]
        np.testing.assert_allclose(row, expected, atol=2e-5, err_msg=str(cell))
        assert np.abs(row - unpatched).max() > 1e-4, cell  # the path leads somewhere


def attn_of(layer: int, positions: tuple[int, ...]) -> Sender:
    return Sender(layer, positions, Site.ATTN)


# --- replay ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> LALM:
    """A tiny model of each of the five families."""
    folders = checkpoints if request.param in checkpoints else request.getfixturevalue("native_folders")
    return load(folders[request.param], request.param)


def random_path(lalm: LALM, rng: np.random.Generator, encoding: Encoding) -> Intervention:
    """Senders and receivers of every kind, in several layers, such that they may go together."""
    length, audio, layers = len(encoding.tokens), encoding.tokens.audio_positions, lalm.num_layers

    def positions(most: int = 25) -> tuple[int, ...]:
        low = audio[0] if rng.random() < 0.2 else length - 14
        drawn = {int(each) for each in rng.integers(low, length, size=rng.integers(1, most))}
        return tuple(sorted(drawn | ({length - 1} if rng.random() < 0.7 else set())))

    def some(kind: Callable[[], Any], count: int) -> list[Any]:
        return [kind() for _ in range(rng.integers(1, count + 1))]

    def sender() -> Sender:
        site = [Site.HEAD, Site.HEAD, Site.ATTN, Site.MLP, Site.EMBED, Site.RESID][rng.integers(6)]
        layer = 0 if site is Site.EMBED else int(rng.integers(layers))
        head = int(rng.integers(lalm.num_heads)) if site is Site.HEAD else None
        reads = audio[::2] if site in (Site.HEAD, Site.ATTN) and rng.random() < 0.5 else None
        return Sender(layer, positions(), site, head, reads)

    def receiver() -> Receiver:
        kind = list(Input)[rng.integers(4)]
        layer = int(rng.integers(1, layers + (kind is Input.RESID)))
        head = int(rng.integers(lalm.num_heads)) if kind is not Input.RESID and rng.random() < 0.5 else None
        seen_by = positions(4) if kind in (Input.KEY, Input.VALUE) and rng.random() < 0.5 else None
        return Receiver(layer, positions(), kind, head, seen_by)

    while True:
        try:
            cell = path(some(sender, 3), *some(receiver, 3))
        except ValueError:  # two of them are, in part, the same
            continue
        if not cell.idle or rng.random() < 0.1:
            return cell


def test_replay_equals_direct_on_random_paths(any_family: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(any_family, prompt)
    rng = np.random.default_rng(2)
    cells = [random_path(any_family, rng, clean) for _ in range(10)]
    grid = grid_of(*cells, Intervention([Patch(1, clean.tokens.text_positions)]))
    ids = likely_tokens(any_family, clean, corrupted)
    slow = DirectEngine(any_family).sweep(clean, corrupted, grid, ids).probabilities
    for engine in (ReplayEngine(any_family), ReplayEngine(any_family, 40, SMALL)):
        np.testing.assert_allclose(engine.sweep(clean, corrupted, grid, ids).probabilities, slow, atol=TOLERANCE)
        engine.base(clean, corrupted, ids)  # from now on with all that paths need
        np.testing.assert_allclose(engine.sweep(clean, corrupted, grid, ids).probabilities, slow, atol=TOLERANCE)
    unpatched = DirectEngine(any_family).base(clean, corrupted, ids).probabilities[1]
    changed = np.abs(slow - unpatched).max(axis=1)
    assert (changed > 1e-4).sum() > 5, changed


def test_clips_share_passes(one: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(one, prompt)
    other = one.encode(noise(1.3, seed=5), prompt, "chat")
    rng = np.random.default_rng(1)
    grid = grid_of(*(random_path(one, rng, clean) for _ in range(6)))
    ids = likely_tokens(one, clean, corrupted)
    alone = [DirectEngine(one).sweep(source, corrupted, grid, ids).probabilities for source in (clean, other)]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4  # two clips of noise
    for budget in (None, SMALL):
        engine = ReplayEngine(one, memory_budget=budget)
        together = engine.sweeps([Sweep(source, corrupted, grid, ids) for source in (clean, other)])
        for found, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(found.probabilities, expected, atol=TOLERANCE)


# --- identities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine_class", [DirectEngine, ReplayEngine])
def test_all_paths_together_are_the_patch(lalm: LALM, prompt: Prompt, engine_class: type) -> None:
    """What all readers of a sender get is what they get of the sender patched; likewise all that writes."""
    clean, corrupted = encodings(lalm, prompt)
    text, every, top = clean.tokens.text_positions, tuple(range(len(clean.tokens))), lalm.num_layers
    heads = range(lalm.num_heads)
    asked = (Input.QUERY, Input.KEY, Input.VALUE)
    summands = [Sender(k, every, site) for k in (0, 1) for site in (Site.ATTN, Site.MLP)]
    summands.append(Sender(0, every, Site.EMBED))
    whole, parts = Sender(1, every, Site.RESID), (every[:40], every[40:])
    by_head = [Receiver(2, every, Input.QUERY, head) for head in heads]
    by_head += [Receiver(2, every, kind, head, seen) for kind in asked[1:] for head in heads for seen in parts]
    pairs = [
        (path(Sender(1, text, Site.MLP), Receiver(2, text)), Patch(1, text, Site.MLP)),
        (path(Sender(1, text, Site.RESID), Receiver(2, text)), Patch(1, text)),
        (path(Sender(top - 1, text, Site.RESID), Receiver(top, text)), Patch(top - 1, text)),
        (path(summands, Receiver(2, every)), Patch(1, every)),
        (path(whole, *(Receiver(2, every, kind) for kind in asked)), Patch(2, every, Site.ATTN)),
        (path(whole, *by_head), Patch(2, every, Site.ATTN)),
        (path(whole, *(Receiver(2, every, kind, 1) for kind in asked)), Patch(2, every, Site.HEAD, 1)),
    ]
    engine, ids = engine_class(lalm), likely_tokens(lalm, clean, corrupted)
    unpatched = engine.base(clean, corrupted, ids).probabilities[1]
    paths = engine.sweep(clean, corrupted, grid_of(*(cell for cell, _ in pairs)), ids).probabilities
    patches = engine.sweep(clean, corrupted, grid_of(*(Intervention([patch]) for _, patch in pairs)), ids).probabilities
    np.testing.assert_allclose(paths, patches, atol=TOLERANCE)
    assert np.abs(patches - unpatched).max(axis=1).min() > 1e-4


def test_heads_that_send_are_the_attention_that_sends(one: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(one, prompt)
    text, audio, last = clean.tokens.text_positions, clean.tokens.audio_positions, (len(clean.tokens) - 1,)
    heads = range(one.num_heads)
    cells = [
        path(senders, Receiver(2, text, Input.VALUE, seen_by=last), Receiver(3, last))
        for reads in (None, audio)
        for senders in (
            [Sender(1, text, Site.HEAD, head, reads) for head in heads],
            [Sender(1, text, Site.ATTN, reads=reads)],
            [Sender(1, text, Site.HEAD, head, reads) for head in heads[:-1]],
        )
    ]
    ids = likely_tokens(one, clean, corrupted)
    found = ReplayEngine(one).sweep(clean, corrupted, grid_of(*cells), ids).probabilities
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[3], found[4], atol=1e-6)
    assert np.abs(found[1] - found[4]).max() > 1e-6  # what attention reads from the text differs, too
    assert np.abs(found[1] - found[2]).max() > 1e-6


@pytest.mark.parametrize("engine_class", [DirectEngine, ReplayEngine])
def test_what_does_not_reach_changes_nothing_exactly(lalm: LALM, prompt: Prompt, engine_class: type) -> None:
    """No attention looks ahead, nothing goes down or sideways in the residual stream, and equal runs send nothing."""
    clean, corrupted = encodings(lalm, prompt)
    audio, text = clean.tokens.audio_positions, clean.tokens.text_positions
    last, before = text[-1:], text[:-1]
    cells = [
        path(Sender(0, last), Receiver(2, last, Input.VALUE, seen_by=before)),  # seen by none that may
        path(Sender(0, audio[:3], reads=audio[4:]), Receiver(2, audio[:3])),  # reads what comes after it
        path(Sender(0, before), Receiver(2, last)),  # from position to position, without attention
        path(Sender(0, before), Receiver(2, last, Input.QUERY)),
        path(Sender(2, text), Receiver(1, text, Input.QUERY), Receiver(2, last, Input.KEY)),  # downwards
        path(Sender(2, text), Receiver(2, text, Input.QUERY)),  # a layer's attention to itself
    ]
    assert all(cell.idle for cell in cells)
    engine, ids = engine_class(lalm), likely_tokens(lalm, clean, corrupted)
    found = engine.sweep(clean, corrupted, grid_of(*cells, Intervention()), ids)
    nothing = path(Sender(0, text), Receiver(lalm.num_layers, last))
    equal = engine.sweep(corrupted, corrupted, grid_of(nothing), ids)
    unpatched = engine.base(clean, corrupted, ids).option_logits[1]
    # The direct engine computes even these, edge by edge: the same up to rounding.
    bound = 1e-5 if engine_class is DirectEngine else 0.0
    np.testing.assert_allclose(found.option_logits, np.tile(unpatched, (len(cells) + 1, 1)), rtol=0, atol=bound)
    np.testing.assert_allclose(equal.option_logits[0], unpatched, atol=1e-5)


def test_a_path_costs_no_pass_of_its_own(one: LALM, prompt: Prompt) -> None:
    """Each run goes through a layer once, however many senders and receivers there are."""
    clean, corrupted = encodings(one, prompt)
    text, last = clean.tokens.text_positions, clean.tokens.text_positions[-1:]
    values = {high: Receiver(high, text[:-1], Input.VALUE, seen_by=last) for high in range(one.num_layers)}
    cells = [
        path(Sender(low, text[:-1], reads=clean.tokens.audio_positions), values[high])
        for low in range(one.num_layers)
        for high in range(low + 1, one.num_layers)
    ]
    seen: list[int] = []
    handle = one.decoder_module.layers[1].register_forward_hook(
        lambda _m, _i, output: seen.append(first_of(output).shape[1])
    )
    ReplayEngine(one, memory_budget=SMALL).sweep(clean, corrupted, grid_of(*cells), (1, 2))
    handle.remove()
    assert seen.count(len(clean.tokens)) == 2


def test_a_pack_that_does_not_fit_goes_on_in_pieces(one: LALM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out anywhere: at the senders' difference, too, whose pack is then where it was."""
    clean, corrupted = encodings(one, prompt)
    text = clean.tokens.text_positions
    receivers = (Receiver(1, text, Input.VALUE), Receiver(2, text[:8]), Receiver(3, text[8:], Input.QUERY))
    grid = grid_of(*(path(Sender(0, text[k:]), *receivers) for k in range(4)))
    ids = likely_tokens(one, clean, corrupted)
    expected = ReplayEngine(one).sweep(clean, corrupted, grid, ids).probabilities
    whole = PathStates.difference
    for failing in (1, 5, 7):
        calls = iter(range(1000))

        def difference(self: PathStates, *asked: Any, failing: int = failing, calls: Any = calls) -> torch.Tensor:
            if next(calls) == failing:
                raise MemoryError("out of memory")
            return whole(self, *asked)

        monkeypatch.setattr(PathStates, "difference", difference)
        engine = ReplayEngine(one)
        before = engine.pack_tokens
        found = engine.sweep(clean, corrupted, grid, ids).probabilities
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert engine.pack_tokens < before


def test_paths_are_data() -> None:
    one, two = (path(Sender(0, (3, 4)), Receiver(2, (4,), Input.KEY, 1, (5,))) for _ in range(2))
    assert one == two
    assert len({one, two, Intervention()}) == 2
    assert (one.entry_layer, one.first_position, one.idle) == (2, 5, False)
    key, resid = Receiver(1, (2,), Input.KEY), Receiver(1, (2,))
    for wrong, message in (
        (lambda: Sender(0, (1,), Site.TOWER), "writes to the residual stream"),
        (lambda: Sender(0, (1,), Site.HEAD), "has a head"),
        (lambda: Sender(1, (1,), Site.EMBED), "before layer 0"),
        (lambda: Sender(1, (1,), Site.MLP, reads=(0,)), "only attention reads"),
        (lambda: Sender(1, (2, 1)), "ascending"),
        (lambda: Receiver(1, (1,), head=2), "belongs to no head"),
        (lambda: Receiver(1, (1,), Input.QUERY, seen_by=(2,)), "only keys and values"),
        (lambda: Receiver(-1, (1,)), "counted from 0"),
        (lambda: PathPatch((), (resid,)), "a sender and a receiver"),
        (lambda: path([Sender(0, (1,)), Sender(0, (1, 2), Site.HEAD, 0)], resid), "write the same"),
        (lambda: path([Sender(0, (1,)), Sender(1, (1,), Site.RESID)], resid), "write the same"),
        (lambda: path(Sender(0, (2,)), resid, key), "the same reader"),
        (lambda: path(Sender(0, (2,)), key, Receiver(1, (2,), Input.KEY, 3)), "the same reader"),
        (lambda: Intervention([Patch(0, (1,))], path=one.path), "expected no patches"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()  # type: ignore[no-untyped-call]


def test_engines_that_cannot_say_so(one: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(one, prompt)
    cell = path(Sender(0, (1,)), Receiver(2, (1,)))
    with pytest.raises(ModelError, match=r"attribution .* use engine=auto"):
        ApproximateEngine(one, DirectEngine(one), "attribution", 1).sweep(clean, corrupted, grid_of(cell), (1, 2))
    for wrong in (path(Sender(0, (1,)), Receiver(9, (1,))), path(Sender(0, (1,), Site.HEAD, 99), Receiver(1, (1,)))):
        for engine in (DirectEngine(one), ReplayEngine(one)):
            with pytest.raises(ModelError, match="expected layers 0 to"):
                engine.sweep(clean, corrupted, grid_of(wrong), (1, 2))
