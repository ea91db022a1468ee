"""What is seen without changing a run: logit lens and attention, against plain transformers; the grounding score."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import load, noise
from scipy.stats import mannwhitneyu
from tiny_models import save_tiny_qwen2_audio, save_tiny_voxtral

import lalm_patch
from lalm_patch.analysis import grounding, mean_recovery, seen_at_tokens, seen_in_audio
from lalm_patch.checks import from_json
from lalm_patch.engine.observe import audio_attention, check_attention, lens
from lalm_patch.errors import ConfigError, DataError, ModelError
from lalm_patch.figures import plot_grounding, plot_lens
from lalm_patch.models import LALM, Encoding
from lalm_patch.stimuli import Prompt

pytestmark = pytest.mark.usefixtures("without_pdfs", "demos_opened_once")


def decoder_pass(lalm: LALM, encoding: Encoding, **wanted: bool) -> object:
    """A forward pass of the decoder by transformers alone."""
    with torch.no_grad():
        return lalm.decoder_module(
            inputs_embeds=encoding.inputs_embeds, position_ids=encoding.position_ids, use_cache=False, **wanted
        )


def test_the_lens_is_norm_and_head_on_hidden_states(lalm: LALM, prompt: Prompt) -> None:
    encoding = lalm.encode(noise(1.0), prompt, "chat")
    token = lalm.target_ids(prompt, "chat")[0]
    text, audio = lens(lalm, encoding, token)
    states = decoder_pass(lalm, encoding, output_hidden_states=True).hidden_states  # type: ignore[attr-defined]
    for layer in range(lalm.num_layers):
        # transformers' last hidden state has gone through the final norm already.
        with torch.no_grad():
            last = layer == lalm.num_layers - 1
            normed = states[layer + 1] if last else lalm.decoder_module.norm(states[layer + 1])  # type: ignore[operator]
            expected = lalm.module.get_output_embeddings()(normed)[0].float().softmax(-1)[:, token].numpy()
        np.testing.assert_allclose(text[layer], expected[list(encoding.tokens.text_positions)], atol=1e-6)
        assert audio[layer] == pytest.approx(expected[list(encoding.tokens.audio_positions)].max(), abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
def test_attention_is_that_of_eager_transformers(family: str, tmp_path: Path, prompt: Prompt) -> None:
    save = {"qwen2_audio": save_tiny_qwen2_audio, "voxtral": save_tiny_voxtral}[family]
    folder = save(tmp_path / "tiny")
    lalm, eager = (load(folder, family, attn_implementation=name) for name in ("sdpa", "eager"))
    encoding = lalm.encode(noise(1.0), prompt, "chat")
    found = audio_attention(lalm, encoding)
    weights = decoder_pass(eager, encoding, output_attentions=True).attentions  # type: ignore[attr-defined]
    tokens = encoding.tokens
    assert found.shape == (lalm.num_layers, len(tokens.segments), lalm.num_heads)
    for layer, each in enumerate(weights):
        on_audio = each[0][:, :, list(tokens.audio_positions)].sum(-1)
        for index, segment in enumerate(tokens.segments):
            where = [position for position in tokens.positions(segment) if position >= tokens.text_positions[0]]
            np.testing.assert_allclose(found[layer, index], on_audio[:, where].mean(-1).numpy(), atol=1e-5)


def test_looking_changes_nothing(lalm: LALM, prompt: Prompt) -> None:
    encoding = lalm.encode(noise(1.0), prompt, "chat")
    before = decoder_pass(lalm, encoding).last_hidden_state  # type: ignore[attr-defined]
    audio_attention(lalm, encoding)
    lens(lalm, encoding, 5)
    after = decoder_pass(lalm, encoding).last_hidden_state  # type: ignore[attr-defined]
    assert torch.equal(before, after)


def test_native_families_are_seen_alike(native_folders: dict[str, Path], prompt: Prompt) -> None:
    for family, folder in native_folders.items():
        lalm = load(folder, family)
        encoding = lalm.encode(noise(1.0), prompt, "chat")
        token = lalm.target_ids(prompt, "chat")[0]
        with torch.no_grad():
            whole = lalm.scaled(lalm.module(**encoding.inputs).logits[0, -1]).softmax(-1)
        assert lens(lalm, encoding, token)[0][-1, -1] == pytest.approx(float(whole[token]), abs=1e-6)
        mass = audio_attention(lalm, encoding)
        assert ((mass > 0) & (mass < 1)).all()


def test_attention_that_cannot_be_read_is_refused(lalm: LALM, monkeypatch: pytest.MonkeyPatch) -> None:
    check_attention(lalm)
    monkeypatch.setattr(lalm.decoder_module.config, "layer_types", ["sliding_attention"], raising=False)
    with pytest.raises(ModelError, match=r"observe\.attention: .*sliding_attention; use observe=lens or nothing"):
        check_attention(lalm)
    with pytest.raises(ConfigError, match="use backend=local, or observe=nothing"):
        lalm_patch.compose("observe=lens", "backend=ndif")


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["layer", "token"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[xr.Dataset, Path, str]:
    folder = tmp_path_factory.mktemp("runs")
    outcome = lalm_patch.trace(
        "observe=everything", f"granularity={request.param}", "granularity.layers=[2,5,7]", "attr=animal",
        "data.limit=12", f"outputs={folder}",
    )  # fmt: skip
    assert outcome.dataset is not None
    return outcome.dataset, outcome.files[0].parent, outcome.summary


def test_a_run_stores_what_it_saw_of_every_clip(run: tuple[xr.Dataset, Path, str]) -> None:
    dataset, _, summary = run
    checks = {check.name: check for check in from_json(dataset.attrs["checks"])}
    assert checks["lens_ends_at_the_answer"].passed
    # All layers of the decoder, whatever layers were patched; excluded clips, too.
    assert dataset.sizes["observed_layer"] == 8
    assert not dataset["kept"].all()
    is_last = dataset["token_role"] == "last"
    for name in ("clean", "corrupted"):
        at_end = dataset[f"lens_p_{name}"].isel(observed_layer=-1).where(is_last).max("token")
        np.testing.assert_allclose(at_end, dataset[f"p_{name}"], atol=1e-5)
    mass = dataset["audio_attention"]
    assert list(dataset["listener"].values) == ["early", "object", "late", "template", "last"]
    assert ((mass > 0) & (mass < 1)).all()
    assert "lens     the logit lens sees the answer" in summary
    assert "grounded " in summary


def test_the_lens_is_in_the_units_of_the_causal_curve(run: tuple[xr.Dataset, Path, str]) -> None:
    dataset, folder, _ = run
    seen = seen_at_tokens(dataset)
    kept = dataset.isel(sample=np.flatnonzero(dataset["kept"]))
    share = (kept.lens_p_clean - kept.lens_p_corrupted) / (kept.p_clean - kept.p_corrupted)
    expected = share.mean("sample").transpose("observed_layer", "token").values
    np.testing.assert_allclose(seen["mean"].transpose("layer", "token").values, expected, atol=1e-5)
    np.testing.assert_allclose(seen["mean"].isel(layer=-1, token=-1), 1, atol=1e-4)
    # The demo moves nothing between positions below layer 4: there is nothing to be seen in the text.
    np.testing.assert_allclose(seen["mean"].sel(layer=slice(0, 3)), 0, atol=1e-3)
    rows = list(csv.DictReader(io.StringIO((folder / "lens.csv").read_text())))
    causal = [float(row["mean"]) for row in rows if row["curve"] == "causal"]
    np.testing.assert_allclose(causal, mean_recovery(dataset)["mean"].transpose("layer", ...).values.ravel(), atol=1e-6)
    if "token" in dataset["recovery_rate"].dims:
        lens_rows = [float(row["mean"]) for row in rows if row["curve"] == "logit lens"]
        np.testing.assert_allclose(lens_rows, expected.ravel(), atol=1e-5)
    else:
        audio = [float(row["mean"]) for row in rows if row["curve"] == "logit lens, best audio position"]
        np.testing.assert_allclose(audio, seen_in_audio(dataset)["mean"], atol=1e-6)
    assert (folder / "lens.png").stat().st_size
    assert (folder / "grounding.png").stat().st_size


def test_runs_that_did_not_look_say_so(run: tuple[xr.Dataset, Path, str], tmp_path: Path) -> None:
    dataset, _, _ = run
    blind = dataset.drop_vars(["lens_p_clean", "audio_attention"])
    with pytest.raises(DataError, match="expected a run with observe=lens"):
        plot_lens(blind, tmp_path)
    with pytest.raises(DataError, match="expected a run with observe=grounding"):
        plot_grounding(blind, tmp_path)
    with pytest.raises(DataError, match="no segment 'transcript' listens in this run; it has early, object"):
        grounding(dataset, "transcript")


# --- grounding -----------------------------------------------------------------------------------------------------


def simulated(effect: float, clips: int = 240, per_group: int = 4, seed: int = 0, informed: bool = True) -> xr.Dataset:
    """A run whose wrong answers have less of the objects' attention in layer 3, by `effect` standard deviations."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(clips) < 0.3
    mass = rng.normal(0, 1, (clips, 6, 2, 4)) * np.sqrt([1, 4])[None, None, :, None]
    mass[:, 3, 1] -= effect * wrong[:, None]  # object; four heads with noise of their own each
    labels = np.array(["a", "b", "c"], object)[rng.integers(3, size=clips)]
    logits = rng.normal(0, 1, (clips, 3))
    said = np.array([("abc".index(label) + (1 if bad else 0)) % 3 for label, bad in zip(labels, wrong, strict=True)])
    logits[np.arange(clips), said] = logits.max(axis=1) + (
        rng.exponential(1, clips) * np.where(wrong, 0.5, 2.0) if informed else 1
    )
    return xr.Dataset(
        {
            "audio_attention": (("sample", "observed_layer", "listener", "attention_head"), mass),
            "option_logit_clean": (("sample", "option"), logits),
            "prediction_clean": ("sample", np.array(["a", "b", "c"], object)[said]),
            "recovery_rate": (("sample", "layer"), np.zeros((clips, 1))),
            "kept": ("sample", ~wrong),
        },
        {
            "option": np.array(["a", "b", "c"], object),
            "listener": np.array(["early", "object"], object),
            "label": ("sample", labels),
            "group": ("sample", np.array([str(k // per_group) for k in range(clips)], object)),
            "layer": [0],
        },
    )


def test_grounding_finds_the_layer_and_the_sign_on_other_clips() -> None:
    found = grounding(simulated(2.0))
    assert found.layers == {3: 5}
    auroc = found.auroc["object attention"]
    # Two normal distributions 2 apart, each of standard deviation 2 / sqrt(4 heads) = 1: P(X > Y) = Phi(2 / sqrt 2).
    assert auroc.value == pytest.approx(0.921, abs=0.03)
    assert auroc.low < 0.921 < auroc.high
    assert auroc.high - auroc.low < 0.15
    assert (auroc.n, auroc.groups) == (240, 60)
    assert found.wrong + found.right == 240


def test_held_out_scores_of_noise_are_at_chance() -> None:
    """Of six layers and two signs the best would look like something on the clips it was chosen on."""
    values = [grounding(simulated(0.0, seed=seed)).auroc["object attention"].value for seed in range(12)]
    assert abs(np.mean(values) - 0.5) < 0.04
    inside = []
    for seed in range(12):
        run = simulated(0.0, seed=seed)
        mass, wrong = run["audio_attention"].sel(listener="object").mean("attention_head").values, ~run["kept"].values
        each = [
            mannwhitneyu(mass[wrong, k], mass[~wrong, k]).statistic / (wrong.sum() * (~wrong).sum()) for k in range(6)
        ]
        inside.append(max(abs(value - 0.5) for value in each) + 0.5)
    assert np.mean(inside) > 0.55


def test_baselines_are_probability_and_entropy_among_the_options() -> None:
    run = simulated(0.5)
    found = grounding(run)
    wrong = ~run["kept"].values
    p = np.exp(run["option_logit_clean"].values)
    p /= p.sum(axis=1, keepdims=True)
    for name, score in (("max probability", -p.max(axis=1)), ("entropy", -(p * np.log(p)).sum(axis=1))):
        expected = mannwhitneyu(score[wrong], score[~wrong]).statistic / (wrong.sum() * (~wrong).sum())
        assert found.auroc[name].value == pytest.approx(expected)
        assert expected > 0.6
    gain = found.auroc["object attention"].value - found.auroc["max probability"].value
    assert found.gain.value == pytest.approx(gain)
    assert found.gain.low < gain < found.gain.high


def test_clips_of_one_speaker_are_drawn_together() -> None:
    alone, together = (grounding(simulated(2.0, per_group=size)).auroc["max probability"] for size in (1, 24))
    assert (alone.groups, together.groups) == (240, 10)
    assert alone.value == together.value


def test_nothing_is_said_of_too_few_wrong_answers(tmp_path: Path) -> None:
    run = simulated(1.0)
    right = run.isel(sample=np.flatnonzero(run["kept"]))
    found = grounding(right)
    assert np.isnan(found.auroc["object attention"].value)
    assert found.reason.startswith("0 wrong and ")
    assert "expected at least 3 of each" in found.reason
    plot_grounding(right, tmp_path)
    assert (tmp_path / "grounding.csv").read_text().count("\n") == 4
