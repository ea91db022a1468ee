"""Audio positions, the projector's output and the audio encoder as places to patch: windows along time."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, noise
from hypothesis import given
from hypothesis import strategies as st

import lalm_patch
from lalm_patch.analysis import about, fusion, mean_recovery
from lalm_patch.checks import from_json
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError, ModelError
from lalm_patch.interventions.grids import Grid, Place, make_grid
from lalm_patch.interventions.patches import Intervention, Patch, Site
from lalm_patch.interventions.spans import PADDING, Spans, audio_windows, start_of, tower_windows
from lalm_patch.models import LALM, Encoding, TokenTable
from lalm_patch.models.tokens import Clock
from lalm_patch.report import make_report
from lalm_patch.stimuli import Prompt

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def families(checkpoints: dict[str, Path], native_folders: dict[str, Path]) -> dict[str, LALM]:
    return {name: load(folder, name) for name, folder in {**checkpoints, **native_folders}.items()}


def pair(lalm: LALM, prompt: Prompt, seconds: float = 1.0) -> tuple[Encoding, Encoding]:
    sound = noise(seconds)
    return lalm.encode(sound, prompt, "chat"), lalm.encode(np.zeros_like(sound), prompt, "chat")


def place(lalm: LALM, site: Site, spans: Spans, window: int = 1) -> Place:
    layers = len(lalm.tower_layers) if site is Site.TOWER else 1 if site is Site.EMBED else lalm.num_layers
    return Place(site, window, layers, lalm.num_heads, spans=spans)


def table(clock: Clock | None, audio: int) -> TokenTable:
    roles = ("pre", *["audio"] * audio, "last")
    return TokenTable((0,) * len(roles), ("",) * len(roles), roles, clock)


# --- windows -------------------------------------------------------------------------------------------------------


@given(
    seconds=st.floats(0.1, 40),
    each=st.floats(0.05, 3),
    rate=st.sampled_from([None, 12.5, 25.0]),
    size=st.integers(1, 9),
    tags=st.integers(0, 1),
    surplus=st.integers(0, 50),
)
def test_windows_part_the_audio_in_order(
    seconds: float, each: float, rate: float | None, size: int, tags: int, surplus: int
) -> None:
    count = max(1, int(seconds * (rate or 10))) + 2 * tags + surplus
    tokens = table(Clock(seconds, rate, tags), count)
    windows = audio_windows(tokens, Spans(None, size) if rate is None else Spans(each))
    assert [position for members in windows.values() for position in members] == list(tokens.audio_positions)
    for name, members in windows.items():
        if rate is None:
            assert len(members) == size or name == list(windows)[-1]
        elif name != PADDING:
            first = max(members[0] - 1 - tags, 0) / rate
            assert start_of(name) == pytest.approx(np.floor(first / each + 1e-9) * each, rel=1e-4)
            assert first < seconds
        else:
            assert (members[-1] - 1 - tags) / rate >= seconds


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen_audio", "voxtral"])
def test_a_window_holds_the_positions_that_its_sound_takes(
    family: str, families: dict[str, LALM], prompt: Prompt
) -> None:
    """A clip that ends where a window ends has as many positions as the windows up to there (Voxtral fills them up)."""
    lalm = families[family]
    tokens = lalm.inputs(noise(2.3), prompt, "chat")[0]
    windows = audio_windows(tokens, Spans(0.4))
    names = [name for name in windows if name != PADDING]
    assert names == ["0-0.4 s", "0.4-0.8 s", "0.8-1.2 s", "1.2-1.6 s", "1.6-2 s", "2-2.4 s"]
    assert (PADDING in windows) == (family == "voxtral")
    ends = {name: sum(len(windows[other]) for other in names[: index + 1]) for index, name in enumerate(names)}
    for index, name in enumerate(names[:-1]):
        cut = lalm.inputs(noise(0.4 * (index + 1)), prompt, "chat")[0]
        shorter = audio_windows(cut, Spans(0.4))
        held = sum(len(members) for other, members in shorter.items() if other != PADDING)
        tag = 1 if family == "qwen_audio" else 0  # the tag that ends the clip
        assert ends[name] == held - tag


def test_frames_of_the_encoder() -> None:
    windows = tower_windows(table(Clock(1.05, None, 0, 50.0), 4), Spans(0.5))
    assert windows == {"0-0.5 s": tuple(range(25)), "0.5-1 s": tuple(range(25, 50)), "1-1.5 s": (50, 51)}
    with pytest.raises(ModelError, match="frame rate of its audio encoder is not known; use site=embed"):
        tower_windows(table(Clock(1.0), 4), Spans(0.5))
    with pytest.raises(ModelError, match=r"granularity.seconds is null"):
        tower_windows(table(Clock(1.0, None, 0, 50.0), 4), Spans(None, 2))
    for clock in (None, Clock(1.0)):
        with pytest.raises(ModelError, match=r"4 audio positions are in no known order of time; use granularity\.sec"):
            audio_windows(table(clock, 4), Spans(0.5))


# --- engines -------------------------------------------------------------------------------------------------------


def hooked(lalm: LALM, clean: Encoding, corrupted: Encoding, patch: Patch) -> torch.Tensor:
    """Logits of the last position with a patch, by PyTorch's hooks alone."""
    if patch.site is Site.TOWER:
        (tower,) = (part for name, part in lalm.module.named_modules() if name.split(".")[-1] == "audio_tower")
        module = tower.layers[patch.layer]  # type: ignore[index]
    else:
        module = lalm.decoder_module.layers[patch.layer]  # type: ignore[index]
    kept: list[torch.Tensor] = []

    def states(value: object) -> torch.Tensor:
        found = value[0] if isinstance(value, tuple) else value
        assert isinstance(found, torch.Tensor)
        return found

    def write(old: torch.Tensor) -> torch.Tensor:
        rows = old.clone().reshape(-1, old.shape[-1])
        rows[list(patch.positions)] = kept[0].reshape(-1, old.shape[-1])[list(patch.positions)]
        return rows.reshape(old.shape)

    def keep(_module: object, inputs: object, output: object = None) -> None:
        kept.append(states(inputs if patch.site is Site.EMBED else output).clone())

    def change(_module: object, inputs: tuple[object, ...], output: object = None) -> object:
        if patch.site is Site.EMBED:
            return (write(states(inputs)), *inputs[1:])
        return (write(states(output)), *output[1:]) if isinstance(output, tuple) else write(states(output))

    for hook, encoding in ((keep, clean), (change, corrupted)):
        before = patch.site is Site.EMBED
        handle = (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
        with torch.no_grad():
            logits = lalm.module(**encoding.inputs).logits[0, -1].float()
        handle.remove()
    return logits


@pytest.mark.parametrize("site", [Site.EMBED, Site.TOWER, Site.RESID])
def test_direct_engine_equals_plain_hooks(site: Site, families: dict[str, LALM], prompt: Prompt) -> None:
    for name, lalm in families.items():
        clean, silent = pair(lalm, prompt)
        ids = list(lalm.target_ids(prompt, "chat"))
        first = clean.tokens.audio_positions[0]
        where = tuple(range(7, 19)) if site is Site.TOWER else (first, first + 1, first + 3)
        patch = Patch(0, where, site)
        engine = DirectEngine(lalm)
        found = engine.cells(clean, silent, [Intervention([patch])], ids).option_logits[0]
        np.testing.assert_allclose(found, hooked(lalm, clean, silent, patch)[ids], atol=1e-4, err_msg=name)
        assert np.abs(found - engine.base(clean, silent, ids).option_logits[1]).max() > 1e-4, name


def test_everything_before_the_decoder_is_the_clean_run(families: dict[str, LALM], prompt: Prompt) -> None:
    """All audio positions of the decoder's input, or all frames of the encoder's first layer, restore the clean run."""
    for name, lalm in families.items():
        clean, silent = pair(lalm, prompt)
        ids = lalm.target_ids(prompt, "chat")
        (tower,) = (part for path, part in lalm.module.named_modules() if path.split(".")[-1] == "audio_tower")
        frames: list[int] = []
        handle = tower.layers[
            0
        ].register_forward_hook(  # type: ignore[union-attr,index]
            lambda _module, _args, output, frames=frames: frames.append(
                (output[0] if isinstance(output, tuple) else output).shape[:-1].numel()
            )
        )
        with torch.no_grad():
            lalm.module(**clean.inputs)
        handle.remove()
        cells = [
            Intervention([Patch(0, clean.tokens.audio_positions, Site.EMBED)]),
            Intervention([Patch(0, tuple(range(frames[0])), Site.TOWER)]),
        ]
        engine = DirectEngine(lalm)
        expected = engine.base(clean, silent, ids).option_logits[0]
        found = engine.cells(clean, silent, cells, ids).option_logits
        np.testing.assert_allclose(found, np.tile(expected, (2, 1)), atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("site", "window"), [("resid", 1), ("resid", 2), ("attn", 1), ("mlp", 2), ("embed", 1)])
def test_replay_equals_direct_at_audio_positions(
    site: str, window: int, families: dict[str, LALM], prompt: Prompt
) -> None:
    for name, lalm in families.items():
        clean, silent = pair(lalm, prompt, 0.6)
        ids = lalm.target_ids(prompt, "chat")
        where = place(lalm, Site(site), Spans(None, 2), window)
        whole = make_grid("audio", clean.tokens, range(where.num_layers), where)
        chosen = np.random.default_rng(1).choice(len(whole.cells), min(10, len(whole.cells)), replace=False)
        grid = Grid(("cell",), {"cell": chosen}, tuple(whole.cells[index] for index in chosen))
        for source, target in ((clean, silent), (silent, clean)):
            slow = DirectEngine(lalm).sweep(source, target, grid, ids)
            replay = ReplayEngine(lalm, 64)
            base = replay.base(source, target, ids)  # before the sweep says from where on states are needed
            fast = replay.sweep(source, target, grid, ids)
            np.testing.assert_allclose(fast.probabilities, slow.probabilities, atol=TOLERANCE, err_msg=name)
            np.testing.assert_allclose(fast.option_logits, slow.option_logits, atol=1e-4, err_msg=name)
            again = replay.base(source, target, ids)
            np.testing.assert_allclose(again.option_logits, base.option_logits, atol=1e-4)


def test_replay_leaves_the_encoder_to_the_direct_engine(lalm: LALM, prompt: Prompt) -> None:
    clean, silent = pair(lalm, prompt)
    grid = Grid(("cell",), {"cell": np.arange(1)}, (Intervention([Patch(0, (1,), Site.TOWER)]),))
    with pytest.raises(ModelError, match="use engine=direct"):
        ReplayEngine(lalm).sweep(clean, silent, grid, (1, 2))
    with pytest.raises(ValueError, match="the site embed is before layer 0"):
        Patch(1, (1,), Site.EMBED)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=demo", "site=resid"),
        ("model=demo", "site=attn", "site.window=2", "direction=noising"),
        ("model=demo_voxtral", "site=embed", "corruption=counterfactual"),
        ("model=demo_voxtral", "site=tower", "granularity.layers=[0,-1]", "granularity.seconds=1"),
        ("model=demo_desta", "site=mlp", "granularity.seconds=null", "granularity.positions=8"),
    ],
)
def test_a_run_of_windows(overrides: tuple[str, ...], tmp_path: Path) -> None:
    outcome = lalm_patch.trace(
        "attr=animal", "data.limit=4", "granularity=audio", "engine.spot_checks=4", f"outputs={tmp_path}", *overrides
    )
    dataset = outcome.dataset
    assert dataset is not None
    info = about(dataset)
    assert info.granularity == "window"
    assert all(check.passed for check in from_json(dataset.attrs["checks"]))
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
    rates = kept["recovery_rate"].transpose("sample", "layer", "window")
    timed = info.model != "demo_desta"
    for rate, clip in zip(rates, kept["sample"].values, strict=True):
        known = ~np.isnan(rate.values).any(axis=0)
        assert (np.isnan(rate.values).all(axis=0) == ~known).all()
        if timed:  # windows up to the clip's end, and the padding, which Voxtral alone has
            seconds = float(kept["duration"].sel(sample=clip))
            within = kept["window_start"].values < seconds - 0.05
            assert known[within].all()
            names = kept["window"].values[known & np.isnan(kept["window_start"].values)]
            assert list(names) == (["padding"] if info.model == "demo_voxtral" and info.site != "tower" else [])
    if info.site in ("resid", "attn", "mlp") and info.model == "demo":
        np.testing.assert_allclose(rates.isel(layer=-1), np.where(np.isnan(rates.isel(layer=-1)), np.nan, 0), atol=1e-4)
    layers = {"embed": 1, "tower": 2}.get(info.site, 8)
    assert dataset.sizes["layer"] == layers
    assert np.isnan(fusion(dataset).depth.value)
    drawn = {path.name for path in outcome.files}
    assert {"figure.png", "clip.png", "clip.csv"} <= drawn
    (folder,) = {path.parent for path in outcome.files}
    rows = list(csv.DictReader(io.StringIO((folder / "clip.csv").read_text())))
    first = rates.isel(sample=0)
    assert len(rows) == first.size
    for row in rows:
        value = float(first.sel(layer=int(row["layer"]), window=row["window"]))
        assert (row["recovery_rate"] == "" and np.isnan(value)) or float(row["recovery_rate"]) == pytest.approx(value)
    if info.model == "demo":
        page = make_report(tmp_path, audio=False).read_text()
        assert "window 0.5-1 s" in page


def test_the_mean_over_clips_has_its_own_n_in_every_window(tmp_path: Path) -> None:
    dataset = lalm_patch.trace(
        "attr=animal", "data.limit=9", "granularity=audio", "site=embed", f"outputs={tmp_path}"
    ).dataset
    assert dataset is not None
    found = mean_recovery(dataset)
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
    counts = kept["recovery_rate"].notnull().sum("sample")
    np.testing.assert_array_equal(found["n"].transpose(*counts.dims), counts)
    assert counts.min() < counts.max()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("site=embed",), "expected granularity=audio, got granularity=layer"),
        (("site=tower", "granularity=token"), "expected granularity=audio, got granularity=token"),
        (("granularity=audio", "site=head"), "use granularity=layer"),
        (("granularity=audio", "granularity.seconds=0"), "granularity.seconds=0: expected a finite number above 0"),
        (("granularity=audio", "granularity.positions=2"), "one of them and positive"),
        (("granularity=audio", "granularity.seconds=null"), "one of them and positive"),
        (("granularity.seconds=1",), "go with granularity=audio, not layer"),
        (("granularity=audio", "backend=ndif"), "use backend=local"),
        (("granularity=audio", "site=embed", "site.window=2"), "one place, not one per layer"),
        (("granularity=audio", "site=embed", "granularity.layers=[0]"), "one place, not one per layer"),
        (("granularity=audio", "site=tower", "engine=replay"), "use engine=auto or direct"),
        (("granularity=audio", "site=tower", "corruption=mean"), "a corruption that is sound, or site=embed"),
        (
            ("granularity=audio", "site=tower", "granularity.seconds=null", "granularity.positions=1"),
            "expected granularity.seconds, got null",
        ),
    ],
)
def test_what_windows_do_not_go_with(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lalm_patch.compose(*overrides)


def test_queries_have_no_time(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"16 audio positions are in no known order of time"):
        lalm_patch.trace("model=demo_desta", "granularity=audio", "data.limit=2", f"outputs={tmp_path}")
