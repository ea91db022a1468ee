"""The engines against independent oracles (plain PyTorch hooks) and against theorems that hold for any weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GENDER, load, noise
from tiny_models import save_tiny_qwen2_audio, save_tiny_voxtral

from lalm_patch.engine import DirectEngine, Readout, ReplayEngine, suffix_attention
from lalm_patch.engine.choose import choose_engine, noise_floor
from lalm_patch.engine.memory import GIB, PACK_SHARE, bytes_per_token, tokens_within
from lalm_patch.engine.suffix_attention import attend, attend_plainly
from lalm_patch.errors import ModelError
from lalm_patch.interventions.grids import Grid, layer_grid, make_grid, token_grid
from lalm_patch.interventions.patches import Intervention, Patch
from lalm_patch.models import LALM, Encoding
from lalm_patch.models.proof import UNMEASURED, make_pair
from lalm_patch.settings import EngineSettings
from lalm_patch.stimuli import Prompt, silence
from lalm_patch.tracing.metrics import recovery_rate

TOLERANCE = 1e-5


def encodings(lalm: LALM, prompt: Prompt, seconds: float = 1.3, layout: str = "chat") -> tuple[Encoding, Encoding]:
    """A noise clip and silence of its length."""
    clip = noise(seconds)
    return lalm.encode(clip, prompt, layout), lalm.encode(silence(clip), prompt, layout)


def likely_tokens(lalm: LALM, clean: Encoding, corrupted: Encoding) -> tuple[int, ...]:
    """The three most probable tokens of either run: a random model gives the options next to no probability."""
    with torch.no_grad():
        logits = [lalm.module(**encoding.inputs).logits[0, -1] for encoding in (clean, corrupted)]
    return tuple(sorted({int(token) for row in logits for token in row.topk(3).indices}))


def one_row(*interventions: Intervention) -> Grid:
    return Grid(("cell",), {"cell": np.arange(len(interventions))}, interventions)


def hook_logits(lalm: LALM, clean: Encoding, corrupted: Encoding, intervention: Intervention) -> torch.Tensor:
    """One patched run with PyTorch forward hooks only: no nnsight, no code of the package."""
    layers = lalm.module.get_decoder().layers
    source: dict[int, torch.Tensor] = {}
    handles = [
        layers[patch.layer].register_forward_hook(
            lambda _m, _i, output, layer=patch.layer: source.__setitem__(layer, output.clone())
        )
        for patch in intervention.patches
    ]
    with torch.no_grad():
        lalm.module(**clean.inputs)
    for handle in handles:
        handle.remove()

    def write(patch: Patch) -> object:
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, list(patch.positions)] = source[patch.layer][:, list(patch.positions)]
            return output

        return hook

    handles = [layers[patch.layer].register_forward_hook(write(patch)) for patch in intervention.patches]
    with torch.no_grad():
        logits = lalm.module(**corrupted.inputs).logits[0, -1].float()
    for handle in handles:
        handle.remove()
    return logits


def test_direct_engine_equals_plain_hooks(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    text = clean.tokens.text_positions
    interventions = [
        Intervention([Patch(0, text)]),
        Intervention([Patch(1, (text[3],))]),
        Intervention([Patch(0, (text[0], text[5])), Patch(2, (text[-1],))]),
    ]
    ids = likely_tokens(lalm, clean, corrupted)
    rows = DirectEngine(lalm).cells(clean, corrupted, interventions, ids)
    for row, intervention in enumerate(interventions):
        expected = hook_logits(lalm, clean, corrupted, intervention)
        np.testing.assert_allclose(rows.option_logits[row], expected[list(ids)], atol=1e-5)
        np.testing.assert_allclose(rows.logsumexp[row], expected.logsumexp(-1), atol=1e-5)
        assert rows.top_id[row] == expected.argmax()


@pytest.mark.parametrize("seconds", [0.7, 2.4])
@pytest.mark.parametrize("pack_tokens", [1, 100, 5000])
def test_replay_equals_direct_on_a_full_token_grid(
    lalm: LALM, prompt: Prompt, seconds: float, pack_tokens: int
) -> None:
    clean, corrupted = encodings(lalm, prompt, seconds)
    assert clean.tokens.roles[0] == "pre"  # text before the audio
    assert lalm.decoder_module.config.num_key_value_heads < lalm.decoder_module.config.num_attention_heads
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    ids = likely_tokens(lalm, clean, corrupted)
    fast = ReplayEngine(lalm, pack_tokens).sweep(clean, corrupted, grid, ids)
    slow = _direct_sweep(lalm, seconds, clean, corrupted, grid, ids)
    assert np.ptp(slow.probabilities, axis=0).max() > 1e-2  # the cells differ, so equality says something
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE)
    np.testing.assert_allclose(fast.option_logits, slow.option_logits, atol=1e-4)
    np.testing.assert_array_equal(fast.top_id, slow.top_id)


_direct_results: dict[tuple[int, float], Readout] = {}


def _direct_sweep(
    lalm: LALM, seconds: float, clean: Encoding, corrupted: Encoding, grid: Grid, ids: tuple[int, ...]
) -> Readout:
    """The slow sweep, once per model and clip."""
    key = (id(lalm), seconds)
    if key not in _direct_results:
        _direct_results[key] = DirectEngine(lalm).sweep(clean, corrupted, grid, ids)
    return _direct_results[key]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_replay_equals_direct_with_either_attention(
    checkpoints: dict[str, Path], prompt: Prompt, attention: str
) -> None:
    lalm = load(checkpoints["qwen2_audio"], "qwen2_audio", attn_implementation=attention)
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    for granularity in ("layer", "token"):
        grid = make_grid(granularity, clean.tokens, range(lalm.num_layers))
        fast = ReplayEngine(lalm, 150).sweep(clean, corrupted, grid, ids)
        slow = DirectEngine(lalm).sweep(clean, corrupted, grid, ids)
        np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE)
    assert lalm.decoder_module.config._attn_implementation == attention  # replay puts back what it exchanged


def test_replay_equals_direct_on_arbitrary_sets_of_patches(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    rng = np.random.default_rng(1)
    text = np.array(clean.tokens.text_positions)
    cells = []
    for _ in range(25):
        layers = rng.choice(lalm.num_layers, rng.integers(1, lalm.num_layers + 1), replace=False)
        patches = []
        for layer in layers:
            chosen = rng.choice(text, rng.integers(1, 6), replace=False)
            patches.append(Patch(int(layer), tuple(sorted(int(position) for position in chosen))))
        cells.append(Intervention(patches))
    ids = likely_tokens(lalm, clean, corrupted)
    grid = one_row(*cells)
    fast = ReplayEngine(lalm, 120).sweep(clean, corrupted, grid, ids)
    slow = DirectEngine(lalm).sweep(clean, corrupted, grid, ids)
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE)


def test_replay_takes_turns_between_clips(lalm: LALM, prompt: Prompt) -> None:
    """An engine that has seen one pair of runs must not use their states for another."""
    engine, ids = ReplayEngine(lalm), lalm.target_ids(prompt, "chat")
    pairs = [encodings(lalm, prompt, seconds) for seconds in (0.8, 1.9, 0.8)]
    pairs.append((pairs[1][0], pairs[1][1]))
    for clean, corrupted in pairs:
        grid = layer_grid(clean.tokens, range(lalm.num_layers))
        fresh = ReplayEngine(lalm).sweep(clean, corrupted, grid, ids)
        again = engine.sweep(clean, corrupted, grid, ids)
        np.testing.assert_array_equal(fresh.option_logits, again.option_logits)


@pytest.mark.parametrize("engine_class", [DirectEngine, ReplayEngine])
def test_identities_of_causal_tracing(lalm: LALM, prompt: Prompt, engine_class: type) -> None:
    """The last layer's last state is everything, its others are nothing; corrupted into corrupted changes nothing."""
    clean, corrupted = encodings(lalm, prompt)
    engine, ids = engine_class(lalm), likely_tokens(lalm, clean, corrupted)
    p_clean, p_corrupted = engine.base(clean, corrupted, ids).probabilities
    assert np.abs(p_clean - p_corrupted).max() > 1e-3
    last_layer, last = lalm.num_layers - 1, len(clean.tokens) - 1
    other = clean.tokens.text_positions[2]
    ends = engine.sweep(
        clean,
        corrupted,
        one_row(Intervention([Patch(last_layer, (last,))]), Intervention([Patch(last_layer, (other,))])),
        ids,
    ).probabilities
    np.testing.assert_allclose(ends[0], p_clean, atol=TOLERANCE)
    np.testing.assert_allclose(ends[1], p_corrupted, atol=TOLERANCE)
    grid = make_grid("token", clean.tokens, range(lalm.num_layers))
    nothing = engine.sweep(corrupted, corrupted, grid, ids).probabilities
    np.testing.assert_allclose(nothing, np.broadcast_to(p_corrupted, nothing.shape), atol=TOLERANCE)


def test_restoring_every_position_restores_the_clean_run(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    engine, ids = DirectEngine(lalm), likely_tokens(lalm, clean, corrupted)
    every = tuple(range(len(clean.tokens)))
    cells = [Intervention([Patch(layer, every)]) for layer in range(lalm.num_layers)]
    p_clean = engine.base(clean, corrupted, ids).probabilities[0]
    restored = engine.cells(clean, corrupted, cells, ids).probabilities
    np.testing.assert_allclose(restored, np.broadcast_to(p_clean, restored.shape), atol=TOLERANCE)


def test_positions_before_the_audio_recover_nothing(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    engine, ids = DirectEngine(lalm), likely_tokens(lalm, clean, corrupted)
    before = clean.tokens.positions("pre")
    p_corrupted = engine.base(clean, corrupted, ids).probabilities[1]
    cells = [Intervention([Patch(layer, before)]) for layer in range(lalm.num_layers)]
    patched = engine.cells(clean, corrupted, cells, ids).probabilities
    np.testing.assert_allclose(patched, np.broadcast_to(p_corrupted, patched.shape), atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
@pytest.mark.parametrize("window", [(1, 3), (2, 3), (0, 2)])
@pytest.mark.parametrize("engine_class", [DirectEngine, ReplayEngine])
def test_planted_attention_window_is_what_the_curve_shows(
    tmp_path: Path, prompt: Prompt, family: str, window: tuple[int, int], engine_class: type
) -> None:
    """Attention output zero outside layers [a, b): recovery exactly 0 below a and exactly 1 from b - 1 on."""
    save = {"qwen2_audio": save_tiny_qwen2_audio, "voxtral": save_tiny_voxtral}[family]
    lalm = load(save(tmp_path, layers=4, seed=3, window=window), family)
    clean, corrupted = encodings(lalm, prompt)
    engine, ids = engine_class(lalm), likely_tokens(lalm, clean, corrupted)
    base = engine.base(clean, corrupted, ids).probabilities
    patched = engine.sweep(clean, corrupted, layer_grid(clean.tokens, range(4)), ids).probabilities
    answer = int(np.abs(base[0] - base[1]).argmax())
    rate = recovery_rate(patched[:, answer], base[0, answer], base[1, answer])
    first, end = window
    scale = abs(float(base[0, answer] - base[1, answer]))
    assert scale > 1e-3
    np.testing.assert_allclose(rate[:first] * scale, 0, atol=1e-6)
    np.testing.assert_allclose((rate[end - 1 :] - 1) * scale, 0, atol=1e-6)
    if first < end - 1:
        assert abs(rate[first]) > 1e-4  # the window is where something happens
        assert abs(rate[first] - 1) > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_replay_errs_no_more_than_direct(
    checkpoints: dict[str, Path], prompt: Prompt, dtype: str, attention: str
) -> None:
    """Both engines round; against the float32 model neither is further off than rounding makes the other."""
    exact, rounded = (
        load(checkpoints["voxtral"], "voxtral", dtype=kind, attn_implementation=attention)
        for kind in ("float32", dtype)
    )
    for parameter, rough in zip(exact.module.parameters(), rounded.module.parameters(), strict=True):
        parameter.copy_(rough)  # the same rounded weights: what differs is the arithmetic
    true_clean, true_corrupted = encodings(exact, prompt)
    clean, corrupted = encodings(rounded, prompt)
    ids = likely_tokens(exact, true_clean, true_corrupted)
    cells = token_grid(clean.tokens, range(rounded.num_layers)).cells[::5]
    truth = ReplayEngine(exact).sweep(true_clean, true_corrupted, one_row(*cells), ids).probabilities
    fast = ReplayEngine(rounded).sweep(clean, corrupted, one_row(*cells), ids)
    slow = DirectEngine(rounded).sweep(clean, corrupted, one_row(*cells), ids)
    noise_of_direct, noise_of_replay = (np.sqrt(((run.probabilities - truth) ** 2).mean()) for run in (slow, fast))
    assert 1e-6 < noise_of_replay < 2 * noise_of_direct
    np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=UNMEASURED[rounded.dtype])
    assert fast.option_logits.dtype == fast.logsumexp.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(33, 50, False), (7, 7, True), (1, 1, True)])
def test_attention_and_its_log_sum_exp_follow_the_definition(
    dtype: torch.dtype, queries: int, keys: int, causal: bool
) -> None:
    """The kernel used on a CPU, and the plain form used elsewhere, against the softmax in float64."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, queries, 16, generator=generator).to(dtype)
    key, value = (torch.randn(3, keys, 16, generator=generator).to(dtype) for _ in range(2))
    scores = query.double() @ key.double()[:, None].transpose(-1, -2) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones(queries, keys, dtype=torch.bool).triu(1), float("-inf"))
    expected = scores.softmax(-1) @ value.double()[:, None]
    for function in (attend, attend_plainly):
        out, total = function(query, key, value, 0.3, causal)
        assert out.dtype == dtype
        assert total.dtype == torch.float32
        np.testing.assert_allclose(out.double(), expected, atol=8 * torch.finfo(dtype).eps)
        np.testing.assert_allclose(total.double(), scores.logsumexp(-1), atol=8 * torch.finfo(dtype).eps)


def test_plain_attention_gives_the_same_sweep(lalm: LALM, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here."""
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    kernel = ReplayEngine(lalm).sweep(clean, corrupted, grid, ids)
    monkeypatch.setattr(suffix_attention, "attend", attend_plainly)
    plain = ReplayEngine(lalm).sweep(clean, corrupted, grid, ids)
    np.testing.assert_allclose(plain.probabilities, kernel.probabilities, atol=TOLERANCE)
    assert (plain.option_logits != kernel.option_logits).any()  # it did take the other road


def _torch_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _real_allocation() -> None:
    torch.empty(2**52)  # more than any address space: torch's own allocator refuses


@pytest.mark.parametrize("failure", [_torch_error, _real_allocation])
def test_out_of_memory_halves_the_pack_and_the_run_goes_on(
    lalm: LALM, prompt: Prompt, caplog: pytest.LogCaptureFixture, failure: Callable[[], None]
) -> None:
    clean, corrupted = encodings(lalm, prompt)
    ids = likely_tokens(lalm, clean, corrupted)
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    expected = ReplayEngine(lalm).sweep(clean, corrupted, grid, ids)
    engine, told = ReplayEngine(lalm), []
    engine.base(clean, corrupted, ids)
    largest = 0

    def refuse(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal largest
        if inputs[0].shape[1] > 70:
            failure()
        largest = max(largest, inputs[0].shape[1])

    # In the last layer the MLP gets last positions alone.
    handle = lalm.decoder_module.layers[-2].mlp.register_forward_pre_hook(refuse)
    try:
        got = engine.sweep(clean, corrupted, grid, ids, told.append)
        attempts = len(caplog.records)
        again = engine.sweep(clean, corrupted, grid, ids)
    finally:
        handle.remove()
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=TOLERANCE)
    np.testing.assert_allclose(again.probabilities, expected.probabilities, atol=TOLERANCE)
    assert sum(told) == len(grid.cells)  # no cell is counted twice
    assert largest <= 70
    assert engine.pack_tokens <= 70
    assert "out of memory" in caplog.text
    assert len(caplog.records) == attempts  # the smaller size is kept: the second sweep tries nothing too large


def test_a_cell_that_does_not_fit_alone_is_an_error(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt, 0.7)
    engine, grid = ReplayEngine(lalm), one_row(Intervention([Patch(0, clean.tokens.text_positions)]))
    engine.base(clean, corrupted, (1, 2))
    handle = lalm.decoder_module.layers[-1].mlp.register_forward_pre_hook(lambda *_: _torch_error())
    try:
        with pytest.raises(ModelError, match="out of memory with a single cell"):
            engine.sweep(clean, corrupted, grid, (1, 2))
    finally:
        handle.remove()


def test_packs_follow_the_memory_budget(lalm: LALM, prompt: Prompt) -> None:
    clean, corrupted = encodings(lalm, prompt)
    ids, length = likely_tokens(lalm, clean, corrupted), len(corrupted.tokens)
    grid = token_grid(clean.tokens, range(lalm.num_layers))
    budget = 50 / PACK_SHARE * bytes_per_token(lalm, length)
    seen: list[int] = []
    engine = ReplayEngine(lalm, memory_budget=budget / GIB)
    engine.base(clean, corrupted, ids)
    handle = lalm.decoder_module.layers[-1].register_forward_pre_hook(
        lambda _m, inputs: seen.append(inputs[0].shape[1])
    )
    try:
        small = engine.sweep(clean, corrupted, grid, ids)
    finally:
        handle.remove()
    assert 40 <= max(tokens for tokens in seen if tokens != length) <= 50  # base runs have all positions
    assert tokens_within(0, lalm, length) == 1
    whole = ReplayEngine(lalm).sweep(clean, corrupted, grid, ids)
    np.testing.assert_allclose(small.probabilities, whole.probabilities, atol=TOLERANCE)


def test_noise_floor_is_measured_for_every_engine(lalm: LALM, prompt: Prompt) -> None:
    pair = make_pair(lalm, prompt, "chat")
    ids = likely_tokens(lalm, pair.noise, pair.silence)
    for name in ("direct", "replay"):
        _, checks = choose_engine(lalm, EngineSettings(name), pair, ids)
        floor = {check.name: check for check in checks}["noise_floor"]
        assert floor.passed
        if name == "direct":
            assert floor.value == 0  # writing a state onto itself is exact
    shifted = DirectEngine(lalm)
    shifted.base = lambda *arguments: DirectEngine.base(  # type: ignore[method-assign]
        shifted, pair.noise, pair.noise, arguments[2]
    )
    assert not noise_floor(shifted, pair.silence, ids, TOLERANCE).passed


def test_voxtral_clip_of_two_windows(checkpoints: dict[str, Path]) -> None:
    """A clip over 30 s has 750 audio positions; replay still equals direct."""
    lalm = load(checkpoints["voxtral"], "voxtral")
    prompt = Prompt.from_attribute(GENDER)
    clean, corrupted = encodings(lalm, prompt, seconds=31.0)
    assert len(clean.tokens.audio_positions) == 750
    ids = likely_tokens(lalm, clean, corrupted)
    grid = layer_grid(clean.tokens, range(lalm.num_layers))
    fast = ReplayEngine(lalm).sweep(clean, corrupted, grid, ids).probabilities
    slow = DirectEngine(lalm).sweep(clean, corrupted, grid, ids).probabilities
    np.testing.assert_allclose(fast, slow, atol=TOLERANCE)
