"""How the first demo was made, on a small scale: it learns, keeps its planted window, and repeats itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load
from transformers import Qwen2AudioProcessor

from lalm_patch.stimuli import Prompt, check_records, load_demo
from training.animals import ANIMALS, call
from training.corpus import Clip, clips, sentences, write_corpus
from training.model import WINDOW, make_model, make_processor
from training.sentences import SENTENCES
from training.speech import LANGUAGES, SAMPLING_RATE, VARIANTS, synthesiser
from training.train import Features, accuracy, attributes, positions, prompt_texts, save, silence, train
from training.words import words


@pytest.fixture(scope="module")
def processor() -> Qwen2AudioProcessor:
    return make_processor(prompt_texts())


@pytest.fixture(scope="module")
def material() -> list[Clip]:
    return list(clips("train", speech=32, animals=16, seed=5))


@pytest.fixture(scope="module")
def features(material: list[Clip], processor: Qwen2AudioProcessor) -> Features:
    return Features.of(material, processor)


def small_run(processor: Qwen2AudioProcessor, features: Features) -> tuple[list[float], torch.nn.Module]:
    model = make_model(processor, seed=3, hidden=32)
    quiet = silence(processor, 4, seed=5)
    losses = train(model, processor, features, quiet, encoder_steps=24, steps=24, batch=8, rate=3e-3, seed=5)
    return losses, model


def test_training_learns_keeps_the_window_and_repeats_itself(
    processor: Qwen2AudioProcessor, features: Features
) -> None:
    losses, model = small_run(processor, features)
    epoch = len(features) // 8
    assert np.mean(losses[24 - epoch : 24]) < np.mean(losses[:epoch])  # encoder
    assert np.mean(losses[-epoch:]) < np.mean(losses[24 : 24 + epoch])  # whole model
    first, end = WINDOW
    for index, layer in enumerate(model.get_decoder().layers):  # type: ignore[operator]
        assert bool(layer.self_attn.o_proj.weight.any()) == (first <= index < end)
    again, twin = small_run(processor, features)
    assert losses == again
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_batched_training_sees_what_the_model_sees(
    processor: Qwen2AudioProcessor, features: Features, material: list[Clip], tmp_path: Path
) -> None:
    """Accuracy as training measures it is accuracy as the package measures it, clip by clip through the processor."""
    _, model = small_run(processor, features)
    own = accuracy(model, processor, features)  # type: ignore[arg-type]
    save(model, processor, tmp_path)  # type: ignore[arg-type]
    lalm = load(tmp_path, "qwen2_audio")
    attribute = attributes()["gender"]
    prompt = Prompt.from_attribute(attribute)
    ids = list(lalm.target_ids(prompt, "chat"))
    spoken = [clip for clip in material if "gender" in clip.labels]
    right = 0
    for clip in spoken:
        with torch.no_grad():
            logits = lalm.module(**lalm.encode(clip.waveform, prompt, "chat").inputs).logits[0, -1, ids]
        right += attribute.options[int(logits.argmax())] == clip.labels["gender"]
    assert len(spoken) == own["gender"][1]
    assert abs(right / len(spoken) - own["gender"][0]) <= 2 / len(spoken)  # weights are saved as bfloat16


def test_any_number_of_processes_makes_the_same_clips(material: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.corpus.BLOCK", 48)
    again = list(clips("train", speech=32, animals=16, seed=5, processes=2))
    for first, second in zip(material, again, strict=True):
        assert first.labels == second.labels
        assert np.array_equal(first.waveform, second.waveform)


def test_words_are_of_one_language() -> None:
    lists = {language: set(words(language)) for language in LANGUAGES}
    for first, second in itertools.combinations(LANGUAGES, 2):
        assert not lists[first] & lists[second]
    assert min(map(len, lists.values())) > 500


def test_evaluation_is_not_training() -> None:
    assert set(SENTENCES) == set(LANGUAGES)
    for language in LANGUAGES:
        assert not set(sentences(language, "train")) & set(sentences(language, "evaluation"))
        assert len(set(SENTENCES[language])) == len(SENTENCES[language])
    for gender in ("male", "female"):
        assert not set(VARIANTS["train"][gender]) & set(VARIANTS["evaluation"][gender])


@pytest.mark.parametrize("animal", ANIMALS)
def test_calls_are_audible_and_vary(animal: str) -> None:
    first, second = call(animal, np.random.default_rng(1)), call(animal, np.random.default_rng(2))
    assert 0.3 < len(first) / SAMPLING_RATE < 4
    assert np.isfinite(first).all()
    assert 0.01 < np.sqrt(np.mean(first**2)) < 0.5
    assert len(first) != len(second) or not np.array_equal(first, second)


def test_speech_says_something_else_in_every_language() -> None:
    lengths = {}
    for language, voices in LANGUAGES.items():
        clip = synthesiser().say(SENTENCES[language][0], f"{voices[0]}+f1", 160, 50, 50, 0)
        assert np.abs(clip).max() > 0.1
        lengths[language] = len(clip)
    assert len(set(lengths.values())) == len(lengths)


def test_audio_positions_are_the_processors(processor: Qwen2AudioProcessor) -> None:
    for samples in (9_600, 16_000, 33_333, 79_999):
        text = "<|audio_bos|><|AUDIO|><|audio_eos|>"
        batch = processor(text=[text], audio=[np.zeros(samples, np.float32)], sampling_rate=16_000, return_tensors="pt")
        count = int((batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")).sum())
        assert int(positions(batch["feature_attention_mask"].sum(-1))) == count


def test_corpus_is_reproducible_and_readable(tmp_path: Path) -> None:
    total = write_corpus(tmp_path / "corpus", seed=0)
    shipped = sum(len(load_demo(attribute)) for attribute in attributes().values())
    assert total == shipped
    for attribute in attributes().values():
        assert check_records(load_demo(attribute)) == []
