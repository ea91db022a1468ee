"""How `model=smol` was made, on a small scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, WhisperFeatureExtractor

from lalm_patch.config import compose
from lalm_patch.models import LALM
from lalm_patch.models.desta import Desta25
from training.answers import question_ids
from training.hearing import WordHeads, states_of, windowed
from training.phones import as_numbers
from training.recordings import recordings
from training.smol import MEL_BINS, SECONDS, extractor, fresh_connector, fresh_encoder
from training.speaking import Decoder
from training.spectra import log_mel
from training.speech import LANGUAGES, SAMPLING_RATE, synthesiser
from training.stages import Stage
from training.teacher import Teacher

FRAMES = 100 * SECONDS


class Killed(Exception):
    """Stands for a process that is killed."""


def steps_of(path: Path, kill_at: int | None = None) -> nn.Module:
    """A little regression of 24 steps, with dropout and drawn batches; perhaps killed on the way."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def loss(stage: Stage) -> Tensor:
        if stage.step == kill_at:
            raise Killed
        inputs = torch.from_numpy(stage.rng.normal(size=(16, 3))).float()
        return functional.mse_loss(model(inputs)[:, 0], inputs.sum(1))

    Stage(path, model, steps=24, rate=1e-2, seed=3).run(loss, every=5, report=lambda: "looked at")
    return model


def test_a_killed_stage_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps_of(tmp_path / "whole.pt")
    monkeypatch.setattr("training.stages.SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(Killed):
        steps_of(tmp_path / "killed.pt", kill_at=11)
    again = steps_of(tmp_path / "killed.pt")
    finished = steps_of(tmp_path / "killed.pt", kill_at=0)  # a finished stage takes no step
    for one, other, third in zip(whole.parameters(), again.parameters(), finished.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_a_state_of_another_length_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    Stage(tmp_path / "stage.pt", model, steps=1, rate=1e-2, seed=0).run(lambda _: model(torch.ones(1)).sum())
    with pytest.raises(ValueError, match="a stage of 1 steps, expected 2"):
        Stage(tmp_path / "stage.pt", model, steps=2, rate=1e-2, seed=0)


def test_spectra_are_the_extractors() -> None:
    """In the window, as the model gets a clip; the last frames of a clip also see what is behind it."""
    clip, shaped = noise(1.5), extractor()
    expected = shaped(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features[0]
    made = windowed(log_mel(clip, shaped), FRAMES)
    assert made.shape == expected.shape == (MEL_BINS, FRAMES)
    assert torch.allclose(made[:, :147], expected[:, :147], atol=2e-5)
    assert torch.allclose(made[:, 152:], expected[:, 152:], atol=2e-5)


def test_states_are_the_encoders() -> None:
    encoder = fresh_encoder(0).eval()
    window = windowed(log_mel(noise(1.5), extractor()), FRAMES)[None]
    with torch.no_grad():
        states = states_of(encoder, window)
        expected = encoder(window).last_hidden_state
        assert torch.allclose(encoder.layer_norm(states[-1]), expected, atol=1e-5)
    assert len(states) == encoder.config.encoder_layers


def test_the_decoder_says_what_it_says_of_the_whole_prompt() -> None:
    """Its beginning read once, rows of several lengths together, several kinds of prompts."""
    lalm = LALM.load(compose("model=demo_desta").model)
    family, module = lalm.family, lalm.module
    assert isinstance(family, Desta25)
    hole = module.config.audio_token_id
    llama = LlamaForCausalLM(module.config.text_config)
    llama.model, llama.lm_head = module.language_model, module.lm_head
    decoder = Decoder(llama, family, hole, torch.float32)
    asked = [("gender", "chat", None), ("animal", "user", 3), ("language", "chat", 4)]
    audio = torch.randn(len(asked), family.vectors, module.config.text_config.hidden_size)
    with torch.no_grad():
        together = decoder.logits([decoder.row(*each) for each in asked], audio)
        for number, (name, layout, order) in enumerate(asked):
            ids = torch.tensor([question_ids(family, name, layout, order, None, "")])
            embedded = decoder.model.get_input_embeddings()(ids)
            embedded[0, ids[0] == hole] = audio[number]
            alone = decoder.model(inputs_embeds=embedded).logits[0, -1]
            assert torch.allclose(together[number], alone, atol=1e-4)


def test_word_heads_are_right_where_vectors_are_the_words() -> None:
    words = {"gender": torch.eye(8)[:2], "emotion": torch.eye(8)[2:7]}
    heads = WordHeads(fresh_connector(words, 0), words).eval()
    vectors = heads.read(torch.randn(2, 4, 10, 128))
    assert {name: tuple(each.shape) for name, each in vectors.items()} == {
        "gender": (2, 8, 8),
        "emotion": (2, 8, 8),
    }
    for name, embedded in words.items():
        for option, word in enumerate(embedded):
            assert int(heads.logits(name, word.expand(1, 8, 8)).argmax()) == option


def test_the_teacher_learns_what_is_there_and_is_not_fooled_by_groups() -> None:
    rng = np.random.default_rng(0)
    labels = [{"gender": int(label)} for label in rng.integers(0, 2, 200)]
    groups = [str(number // 4) for number in range(200)]
    by_group = [{"gender": int(groups[i]) % 2} for i in range(200)]  # the group says the label, nothing else does
    signal = rng.normal(size=(200, 1, 40))
    signal[:, 0, 0] += [4 * each["gender"] for each in labels]
    marks = rng.normal(size=(50, 40))
    leaked = 0.1 * rng.normal(size=(200, 1, 40)) + marks[[int(group) for group in groups]][:, None]
    good = Teacher.taught(list(signal), labels, groups)
    fooled = Teacher.taught(list(leaked), by_group, groups)
    assert good.accuracy["gender"] > 0.9
    assert abs(fooled.accuracy["gender"] - 0.5) < 0.25
    said = good.shares(signal[0], labels[0], 0)["gender"]
    assert float(said.sum()) == pytest.approx(1)
    assert float(said[labels[0]["gender"]]) >= 0.5


def test_only_clips_of_the_list_are_opened(tmp_path: Path) -> None:
    place = tmp_path / "data" / "Gender" / "audio"
    place.mkdir(parents=True)
    soundfile.write(place / "a.wav", noise(0.2), SAMPLING_RATE)
    (place / "b.wav").write_bytes(b"not to be opened")
    (tmp_path / "list.csv").write_text("attr,file,label,part\nGender,a.wav,male,train\nGender,b.wav,male,validation\n")
    found = recordings(tmp_path, tmp_path / "list.csv", "train", ("gender",))
    assert [(clip.voice, clip.labels) for clip in found] == [("a.wav", {"gender": "male"})]
    with pytest.raises(ValueError, match="names no clip"):
        recordings(tmp_path, tmp_path / "list.csv", "train", ("language",))
    soundfile.write(place / "a.wav", np.zeros((400, 2)), SAMPLING_RATE)
    with pytest.raises(ValueError, match="expected mono"):
        recordings(tmp_path, tmp_path / "list.csv", "train", ("gender",))


def test_phones_of_a_sentence() -> None:
    said = synthesiser().phones("Guten Tag", LANGUAGES["German"][0])
    assert said[1:3] == ["u", "t"]
    assert "n" in said
    assert len(said) < 12
    numbers, size = as_numbers([["a", "b"]] * 20 + [["c"]])
    assert (numbers[0], numbers[-1], size) == ([1, 2], [], 3)  # what is rare is left out


def test_the_window_is_the_extractors() -> None:
    shaped = extractor()
    assert isinstance(shaped, WhisperFeatureExtractor)
    assert shaped.nb_max_frames == FRAMES
