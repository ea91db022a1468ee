"""Corruptions behind the projector, and other clips in the clip's place: against plain transformers, and as runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import GENDER, load, noise
from native_checkpoints import DestaFiles

import lalm_patch
from lalm_patch.analysis import mean_recovery
from lalm_patch.checks import from_json
from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.errors import ConfigError, DataError
from lalm_patch.interventions.grids import Grid, make_grid
from lalm_patch.models import LALM
from lalm_patch.settings import CorruptionSettings
from lalm_patch.stimuli import Partners, Prompt, Record, fitted
from lalm_patch.tracing.corruptions import Corruption

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")

TOLERANCE = 1e-5


def record(name: str, label: str, folder: Path, seconds: float = 1.0, group: str = "", sentence: str = "") -> Record:
    path = folder / name
    soundfile.write(path, noise(seconds, seed=sum(name.encode())), 16_000, format="WAV", subtype="PCM_16")
    return Record(name, label, path, name, group or name, sentence)


def corruption(lalm: LALM, name: str, records: list[Record], **settings: float) -> Corruption:
    return Corruption(lalm, CorruptionSettings(name, **settings), "chat", records)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("clips")
    seconds = (1.0, 1.2, 0.8, 1.1)
    return [record(f"{k}.wav", GENDER.options[k % 2], folder, length) for k, length in enumerate(seconds)]


def every_family(checkpoints: dict[str, Path], desta2: DestaFiles, desta25: DestaFiles, qwen: Path) -> dict[str, LALM]:
    native = {"desta2": desta2.location, "desta25": desta25.location, "qwen_audio": qwen}
    return {name: load(folder, name) for name, folder in {**checkpoints, **native}.items()}


def test_overwritten_embeddings_reach_the_decoder_in_every_family(
    checkpoints: dict[str, Path],
    desta2_files: DestaFiles,
    desta25_files: DestaFiles,
    qwen_folder: Path,
    clips: list[Record],
    prompt: Prompt,
) -> None:
    """The direct engine on the whole model is plain transformers' decoder on the embeddings; replay is the engine."""
    for name, lalm in every_family(checkpoints, desta2_files, desta25_files, qwen_folder).items():
        waveform = clips[0].waveform(None)
        clean = lalm.encode(waveform, prompt, "chat")
        ids = lalm.target_ids(prompt, "chat")
        for made in (corruption(lalm, "gaussian", clips, scale=3.0), corruption(lalm, "mean", clips)):
            corrupted = made.encode(clips[0], made.heard(clips[0], waveform), prompt, clean)
            assert corrupted.overwritten
            audio = list(clean.tokens.audio_positions)
            others = [position for position in range(len(clean.tokens)) if position not in audio]
            assert torch.equal(corrupted.inputs_embeds[:, others], clean.inputs_embeds[:, others])
            with torch.no_grad():
                states = lalm.decoder_module(
                    inputs_embeds=corrupted.inputs_embeds, position_ids=corrupted.position_ids, use_cache=False
                ).last_hidden_state[:, -1]
            expected = lalm.logits(states)[0, list(ids)].numpy()
            direct = DirectEngine(lalm)
            found = direct.base(clean, corrupted, ids).option_logits
            np.testing.assert_allclose(found[1], expected, atol=1e-4, err_msg=name)
            assert np.abs(found[0] - found[1]).max() > 1e-3, name
            for source, target in ((clean, corrupted), (corrupted, clean)):
                grid = make_grid("token", clean.tokens, range(lalm.num_layers))
                some = Grid(("cell",), {"cell": np.arange(6)}, grid.cells[:: len(grid.cells) // 6][:6])
                slow = direct.sweep(source, target, some, ids).probabilities
                fast = ReplayEngine(lalm).sweep(source, target, some, ids).probabilities
                np.testing.assert_allclose(fast, slow, atol=TOLERANCE, err_msg=name)


def test_noise_has_the_size_it_is_said_to_have(lalm: LALM, clips: list[Record], prompt: Prompt) -> None:
    waveform = noise(6.0)
    clean = lalm.encode(waveform, prompt, "chat")
    audio = list(clean.tokens.audio_positions)
    before = clean.inputs_embeds[0, audio].double()
    for scale in (0.5, 3.0):
        made = corruption(lalm, "gaussian", clips, scale=scale)
        added = made.encode(clips[0], waveform, prompt, clean).inputs_embeds[0, audio].double() - before
        # The standard error of a standard deviation of n numbers is 1/sqrt(2 n).
        assert float(added.std() / before.std()) == pytest.approx(scale, rel=4 / np.sqrt(2 * added.numel()))
        assert abs(float(added.mean() / added.std())) < 4 / np.sqrt(added.numel())
        again = corruption(lalm, "gaussian", clips[:1], scale=scale).encode(clips[0], waveform, prompt, clean)
        assert torch.equal(again.inputs_embeds[0, audio].double() - before, added)  # whatever other clips there are
        other = made.encode(clips[1], waveform, prompt, clean).inputs_embeds[0, audio].double() - before
        assert abs(float((added * other).mean() / added.var())) < 4 / np.sqrt(added.numel())
    seeded = corruption(lalm, "gaussian", clips, scale=3.0, seed=1).encode(clips[0], waveform, prompt, clean)
    assert not torch.allclose(seeded.inputs_embeds[0, audio].double() - before, added)


def test_the_mean_is_over_all_positions_of_all_clips(lalm: LALM, clips: list[Record], prompt: Prompt) -> None:
    parts = []
    for clip in clips:
        encoding = lalm.encode(clip.waveform(None), prompt, "chat")
        parts.append(encoding.inputs_embeds[0, list(encoding.tokens.audio_positions)])
    expected = torch.cat(parts).double().mean(0)
    clean = lalm.encode(noise(0.7), prompt, "chat")
    audio = list(clean.tokens.audio_positions)
    # A clip that cannot be read takes no part.
    bad = Record("bad.wav", "male", b"no audio", "bad.wav", "bad")
    for pool in (clips, clips[::-1], [*clips, bad]):
        found = corruption(lalm, "mean", pool).encode(clips[0], noise(0.7), prompt, clean).inputs_embeds[0, audio]
        np.testing.assert_allclose(found.double(), expected.expand(len(audio), -1), atol=1e-6)


def test_partners_are_as_like_the_clip_as_the_run_has(tmp_path: Path) -> None:
    angry = record("1001_DFA_ANG_XX.wav", "angry", tmp_path, 1.0, "1001", "DFA")
    same_speaker = record("1001_DFA_SAD_XX.wav", "sad", tmp_path, 2.5, "1001", "DFA")
    same_sentence = record("1002_DFA_SAD_XX.wav", "sad", tmp_path, 1.1, "1002", "DFA")
    shorter = record("1003_IEO_SAD_XX.wav", "sad", tmp_path, 0.99, "1003", "IEO")
    longer = record("1004_IEO_HAP_XX.wav", "happy", tmp_path, 1.9, "1004", "IEO")
    same_answer = record("1001_DFA_ANG_HI.wav", "angry", tmp_path, 1.0, "1001", "DFA")
    pool = [same_answer, angry, longer, shorter, same_sentence, same_speaker]
    for best in (same_speaker, same_sentence, longer, shorter):
        assert Partners(pool).of(angry) is best
        assert Partners(pool[::-1]).of(angry) is best
        pool.remove(best)
    with pytest.raises(
        DataError, match=r"no usable clip of the run has another answer than 'angry'.*raise data\.limit"
    ):
        Partners(pool).of(angry)
    damaged = Record("x.wav", "sad", b"", "x.wav", "x")
    with pytest.raises(DataError, match="no usable clip"):
        Partners([*pool, damaged]).of(angry)


def test_a_partner_is_brought_to_the_clips_length() -> None:
    clip = np.arange(1, 6, dtype=np.float32)
    assert fitted(clip, 3).tolist() == [1, 2, 3]
    assert fitted(clip, 7).tolist() == [1, 2, 3, 4, 5, 0, 0]
    assert fitted(clip, 5).dtype == np.float32


def test_ties_between_partners_do_not_always_go_to_the_same_clip(tmp_path: Path) -> None:
    males = [record(f"m{k}.wav", "male", tmp_path) for k in range(12)]
    females = [record(f"f{k}.wav", "female", tmp_path) for k in range(12)]
    chosen = {Partners(males + females).of(male).id for male in males}
    assert len(chosen) > 4
    assert chosen <= {female.id for female in females}
    assert [Partners(males + females, 1).of(male).id for male in males] != [
        Partners(males + females, 0).of(male).id for male in males
    ]


@pytest.mark.parametrize("name", ["counterfactual", "gaussian", "mean"])
@pytest.mark.parametrize("model", ["demo", "demo_desta"])
def test_a_run_of_it(name: str, model: str, tmp_path: Path) -> None:
    # The demo's planted window: nothing is recovered below it, all of it from its last layer on, whatever is heard.
    # Noise of its own at every position averages out in attention: at 3 standard deviations the demo still hears.
    louder = ("corruption.scale=30",) if name == "gaussian" else ()
    outcome = lalm_patch.trace(
        f"model={model}", f"corruption={name}", *louder, "attr=gender", "data.limit=6", f"outputs={tmp_path}"
    )
    dataset = outcome.dataset
    assert dataset is not None
    assert all(check.passed for check in from_json(dataset.attrs["checks"]))
    assert json.loads(dataset.attrs["settings"])["corruption"]["name"] == name
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
    assert kept.sizes["sample"] >= 2
    rate = mean_recovery(dataset)["mean"]
    assert float(rate.isel(layer=0)) < 0.5
    np.testing.assert_allclose(rate.isel(layer=-1), 1, atol=1e-4)
    if name == "counterfactual":
        labels = dict(zip(dataset["sample"].values, dataset["label"].values, strict=True))
        for clip, partner in zip(dataset["sample"].values, dataset["partner"].values, strict=True):
            assert labels[partner] != labels[clip]
        # With two answers, a clip of the other gender makes the model give the other answer.
        assert (kept["prediction_corrupted"] != kept["label"]).all()
    else:
        assert "partner" not in dataset


def test_settings_that_do_not_go_together() -> None:
    for overrides, message in (
        (("corruption=mean", "backend=ndif"), "replaces audio embeddings, which only this machine can"),
        (("corruption=gaussian", "corruption.scale=0"), "corruption.scale=0: expected a finite number above 0"),
        (("corruption.scale=2",), "goes with corruption=gaussian"),
    ):
        with pytest.raises(ConfigError, match=message):
            lalm_patch.compose(*overrides)
    assert lalm_patch.compose("corruption=gaussian").corruption.scale == 3.0
