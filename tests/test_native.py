"""DeSTA2, DeSTA2.5-Audio and Qwen-Audio against plain recomputations from the published tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import pytest
import torch
from conftest import noise
from native_checkpoints import (
    HEADS,
    QWEN,
    DestaFiles,
)
from native_reference import connector_vectors, qwen_embeds, qwen_logits
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, LlamaForCausalLM, WhisperForConditionalGeneration
from transformers.models.bert.modeling_bert import BertEncoder

from lalm_patch.errors import ModelError
from lalm_patch.models.cache_keyword import CACHE_KEYWORDS
from lalm_patch.models.native import (
    desta2_prompt,
    desta25_prompt,
    load_desta2,
    qwen_audio_chat_prompt,
    qwen_audio_features,
    qwen_audio_tokens,
    transcribe,
    whisper_features,
)

QUESTION = "What is the gender of the speaker in the speech? Possible options: male, female."
PIECES = (
    ("What is the gender of the speaker in the speech? Possible options:", "early"),
    (" male, female", "object"),
    (".", "late"),
)
RESPONSE = "The speaker's gender is"
TRANSCRIPT = " Kids are talking by the door."
CLOSE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def desta2_inputs(loaded: tuple[Any, Any, Any], clip: np.ndarray, **prompt: Any) -> dict[str, Tensor]:
    _, tokenizer, extractor = loaded
    built = desta2_prompt(tokenizer, QUESTION, RESPONSE, **({"transcript": TRANSCRIPT} | prompt))
    return built.tensors() | {"input_features": whisper_features(extractor, [clip])}


def desta25_inputs(loaded: tuple[Any, Any, Any], clip: np.ndarray) -> dict[str, Tensor]:
    _, tokenizer, extractor = loaded
    built = desta25_prompt(tokenizer, QUESTION, RESPONSE, transcripts=[TRANSCRIPT])
    return built.tensors() | {"input_features": whisper_features(extractor, [clip])}


def qwen_inputs(loaded: tuple[Any, Any, Any], *clips: np.ndarray) -> dict[str, Tensor]:
    _, tokenizer, extractor = loaded
    tokens = [qwen_audio_tokens(len(clip)) for clip in clips]
    built = qwen_audio_chat_prompt(tokenizer, QUESTION, RESPONSE, audio_tokens=tokens)
    return built.tensors() | qwen_audio_features(extractor, list(clips))


# --- DeSTA: connector and decoder --------------------------------------------------------------------------------


def test_desta2_hears_the_states_its_code_counts(desta2: tuple[Any, Any, Any], desta2_files: DestaFiles) -> None:
    model, _, extractor = desta2
    features = whisper_features(extractor, [noise(1.0), noise(2.5, seed=1)])
    whisper = WhisperForConditionalGeneration.from_pretrained(desta2_files.encoder)
    # transformers' hidden_states begin with the embeddings: the original's numbers index this list.
    states = whisper.model.encoder(features, output_hidden_states=True).hidden_states
    tensors = torch.load(desta2_files.location / "qformer_connector.pth", weights_only=True)
    expected = connector_vectors(tensors, [states[index] for index in (2, 5, 8, 11)], HEADS)
    torch.testing.assert_close(model.get_audio_features(features), expected.flatten(0, 1), **CLOSE)


def test_desta25_hears_raw_layer_outputs(desta25: tuple[Any, Any, Any], desta25_files: DestaFiles) -> None:
    model, _, extractor = desta25
    features = whisper_features(extractor, [noise(1.0), np.zeros(16000, np.float32)])
    encoder = WhisperForConditionalGeneration.from_pretrained(desta25_files.encoder).model.encoder
    state = encoder(features, output_hidden_states=True).hidden_states[0]
    states = []
    for layer in encoder.layers:  # the last one too: no norm after it
        state = layer(state, None)
        states.append(state)
    tensors = load_file(desta25_files.location / "model.safetensors")
    bare = {name.removeprefix("perception.connector."): value for name, value in tensors.items()}
    expected = connector_vectors(bare, states, HEADS)
    torch.testing.assert_close(model.get_audio_features(features), expected.flatten(0, 1), **CLOSE)


def test_qformer_is_the_originals_bert(desta2: tuple[Any, Any, Any], desta2_files: DestaFiles) -> None:
    tensors = torch.load(desta2_files.location / "qformer_connector.pth", weights_only=True)
    connector = desta2[0].multi_modal_projector
    config = BertConfig(
        num_hidden_layers=2,
        hidden_size=connector.layer_norm.normalized_shape[0],
        num_attention_heads=HEADS,
        add_cross_attention=True,
        is_decoder=True,
        attn_implementation="eager",
    )
    bert = BertEncoder(config).eval()
    bert.load_state_dict({k.removeprefix("qformer."): v for k, v in tensors.items() if k.startswith("qformer.")})
    queries, states = tensors["layer_prompts.1"], torch.randn(1, 7, config.hidden_size)
    expected = bert(queries, encoder_hidden_states=states).last_hidden_state
    for layer in connector.layers:
        queries = layer(queries, states)
    torch.testing.assert_close(queries, expected, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_last_query_reaches_the_first_vector(desta2_files: DestaFiles, attention: str) -> None:
    model, _, extractor = load_desta2(desta2_files.location, attn_implementation=attention)
    assert model.get_decoder().config._attn_implementation == attention
    features = whisper_features(extractor, [noise(1.0)])
    before = model.get_audio_features(features)
    for prompt in model.multi_modal_projector.layer_prompts:
        prompt[:, -1] += 1
    after = model.get_audio_features(features)
    assert (after[0] - before[0]).abs().max() > 1e-4


def test_desta_decoder_is_llama_on_the_spliced_embeddings(
    desta2: tuple[Any, Any, Any], desta2_files: DestaFiles
) -> None:
    model, tokenizer, extractor = desta2
    clip = noise(1.2)
    llama = LlamaForCausalLM.from_pretrained(desta2_files.decoder)
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nFocus on the input audio.<|eot_id|>"
        f"<|start_header_id|>audio<|end_header_id|>\n\n{TRANSCRIPT}<|eot_id|><|start_header_id|>user<|end_header_id|>"
        f"\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{RESPONSE}"
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]  # adds the second BOS
    place = len(tokenizer.tokenize(text[: text.index(TRANSCRIPT)]))  # counts one BOS only
    assert ids[0, :2].tolist() == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(ids[0, place]) == "\n\n"
    vectors = model.get_audio_features(whisper_features(extractor, [clip]))
    embeds = llama.get_input_embeddings()(ids)[0]
    embeds = torch.cat((embeds[:place], vectors, embeds[place:]))[None]
    inputs = desta2_inputs(desta2, clip)
    torch.testing.assert_close(model(**inputs).logits, llama(inputs_embeds=embeds).logits, **CLOSE)


def test_cache_and_kept_logits(desta25: tuple[Any, Any, Any], qwen: tuple[Any, Any, Any]) -> None:
    for model, inputs in ((desta25[0], desta25_inputs(desta25, noise(1.0))), (qwen[0], qwen_inputs(qwen, noise(1.0)))):
        everything = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, everything[:, -2:], **CLOSE)
        head = {name: inputs[name][:, :-1] for name in ("input_ids", "audio_mask")}
        begun = model(**(inputs | head), use_cache=True)
        # As it comes out, under whichever name this transformers gives it, it goes in under either.
        (kept,) = (begun[name] for name in begun if name in CACHE_KEYWORDS)
        for name in CACHE_KEYWORDS:
            step = model(input_ids=inputs["input_ids"][:, -1:], **{name: copy.deepcopy(kept)})
            torch.testing.assert_close(step.logits[:, -1], everything[:, -1], **CLOSE)
        with pytest.raises(ValueError, match="got both cache and past_key_values"):
            model(**inputs, **dict.fromkeys(CACHE_KEYWORDS, kept))
        direct = model(inputs_embeds=model.embed(**inputs)).logits
        torch.testing.assert_close(direct, everything, rtol=0, atol=0)


def test_encoder_stays_in_float32_beside_a_bfloat16_decoder(desta2_files: DestaFiles) -> None:
    loaded = load_desta2(desta2_files.location, dtype=torch.bfloat16)
    model = loaded[0]
    assert model.get_decoder().dtype == torch.bfloat16
    assert {p.dtype for p in model.audio_tower.parameters()} == {torch.float32}
    exact = load_desta2(desta2_files.location)[0]
    inputs = desta2_inputs(loaded, noise(1.0))
    torch.testing.assert_close(
        model.get_audio_features(inputs["input_features"]), exact.get_audio_features(inputs["input_features"])
    )
    assert (model(**inputs).logits.float() - exact(**inputs).logits).abs().max() < 0.5


def test_transcriber_shares_the_encoder(desta2: tuple[Any, Any, Any], desta2_files: DestaFiles) -> None:
    model, _, extractor = desta2
    whisper, tokenizer = model.transcriber
    assert whisper.model.encoder is model.audio_tower
    assert not any("transcriber" in name for name, _ in model.named_modules())
    alone = WhisperForConditionalGeneration.from_pretrained(desta2_files.encoder)
    for clip in (noise(1.0, seed=3), np.zeros(16000, np.float32)):
        ids = alone.generate(input_features=whisper_features(extractor, [clip]))
        expected = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert expected
        assert transcribe(model, extractor, None, clip) == expected
        assert transcribe(alone, extractor, tokenizer, clip) == expected
    with pytest.raises(ModelError, match=r"1 to 48000 samples \(3 s\), got \[48001\]"):
        transcribe(model, extractor, None, np.zeros(48001, np.float32))


# --- Qwen-Audio --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clips",
    [(noise(1.0),), (noise(1.013), noise(0.5, seed=1)), (noise(0.31, seed=2), noise(2.02, seed=3)), (noise(0.03),)],
    ids=["one", "longer first", "longer last", "shortest"],
)
def test_qwen_audio_is_its_equations(
    qwen: tuple[Any, Any, Any], qwen_folder: Path, clips: tuple[np.ndarray, ...]
) -> None:
    model, _, _ = qwen
    tensors = load_file(qwen_folder / "model.safetensors")
    inputs = qwen_inputs(qwen, *clips)
    embeds = qwen_embeds(tensors, inputs["input_ids"][0], inputs["audio_mask"][0], clips, QWEN)
    torch.testing.assert_close(model.embed(**inputs)[0], embeds, **CLOSE)
    expected = qwen_logits(tensors, embeds, QWEN, eps=1e-6)
    torch.testing.assert_close(model(**inputs).logits[0], expected, **CLOSE)


def test_qwen_audio_crops_before_the_convolutions(qwen: tuple[Any, Any, Any]) -> None:
    model, _, extractor = qwen
    clip = noise(1.0)
    cropped = qwen_audio_features(extractor, [clip])
    whole = whisper_features(extractor, [clip])
    assert whole.shape[-1] == 300
    expected = model.get_audio_features(**cropped)
    torch.testing.assert_close(model.get_audio_features(whole, cropped["feature_lengths"]), expected, rtol=0, atol=0)


def test_qwen_audio_refuses_what_it_does_not_compute(qwen: tuple[Any, Any, Any], qwen_folder: Path) -> None:
    model = qwen[0]
    model(inputs_embeds=torch.zeros(1, 256, 32))
    with pytest.raises(ModelError, match="257 positions, Qwen-Audio is implemented up to 256"):
        model(inputs_embeds=torch.zeros(1, 257, 32))
    clip = qwen_inputs(qwen, noise(1.0))
    with pytest.raises(ModelError, match=r"feature_lengths \[51\]: expected 1 numbers from 2 to 50"):
        model(**(clip | {"feature_lengths": torch.tensor([51])}))


# --- audio and its places ----------------------------------------------------------------------------------------


def test_silence_is_heard_as_numbers(
    desta2: tuple[Any, Any, Any], desta25: tuple[Any, Any, Any], qwen: tuple[Any, Any, Any]
) -> None:
    clip = np.zeros(20000, np.float32)
    cases = (
        (desta2, desta2_inputs(desta2, clip)),
        (desta25, desta25_inputs(desta25, clip)),
        (qwen, qwen_inputs(qwen, clip)),
    )
    for (model, *_), inputs in cases:
        assert inputs["input_features"].unique().tolist() == [-1.5]
        assert bool(model(**inputs).logits.isfinite().all())


def test_two_clips_take_their_own_places(desta25: tuple[Any, Any, Any]) -> None:
    model, tokenizer, extractor = desta25
    clips = [noise(1.0), noise(2.0, seed=1)]
    prompt = desta25_prompt(tokenizer, QUESTION, RESPONSE, transcripts=["Kids.", None])
    inputs = prompt.tensors()
    embeds = model.embed(**inputs, input_features=whisper_features(extractor, clips))[0]
    places = inputs["audio_mask"][0].nonzero()[:, 0]
    for index, clip in enumerate(clips):
        alone = model.get_audio_features(whisper_features(extractor, [clip]))
        torch.testing.assert_close(embeds[places[64 * index : 64 * (index + 1)]], alone, **CLOSE)
    text = ~inputs["audio_mask"][0]
    torch.testing.assert_close(embeds[text], model.get_input_embeddings()(inputs["input_ids"][0, text]), rtol=0, atol=0)


def test_audio_that_does_not_arrive_is_an_error(
    desta2: tuple[Any, Any, Any], desta25: tuple[Any, Any, Any], qwen: tuple[Any, Any, Any]
) -> None:
    clip = noise(0.5)
    cases = (
        (desta2[0], desta2_inputs(desta2, clip), 64),
        (desta25[0], desta25_inputs(desta25, clip), 64),
        (qwen[0], qwen_inputs(qwen, clip), 14),
    )
    for model, inputs, count in cases:
        ids, mask = inputs["input_ids"], inputs["audio_mask"]
        with pytest.raises(ModelError, match=f"{count} audio placeholders but no input_features"):
            model(input_ids=ids, audio_mask=mask)
        with pytest.raises(ModelError, match="audio placeholders but no input_features"):
            model(input_ids=ids)
        with pytest.raises(ModelError, match="input_features without audio_mask"):
            model(input_ids=ids, input_features=inputs["input_features"])
        with pytest.raises(ModelError, match=r"expected bool \[1, \d+\] as input_ids, got int64"):
            model(**(inputs | {"audio_mask": mask.long()}))
        short = mask.clone()
        short[0, mask[0].nonzero()[-1]] = False
        with pytest.raises(ModelError, match=f"audio_mask has {count - 1} positions but the audio has {count} vectors"):
            model(**(inputs | {"audio_mask": short}))
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(input_features=inputs["input_features"], audio_mask=mask)
        with pytest.raises(ValueError, match="already hold the audio"):
            model(inputs_embeds=model.embed(**inputs), input_features=inputs["input_features"])


def test_clips_in_the_wrong_order_are_noticed(qwen: tuple[Any, Any, Any]) -> None:
    model, _, extractor = qwen
    clips = [noise(0.5), noise(1.0, seed=1)]
    swapped = qwen_inputs(qwen, *clips) | qwen_audio_features(extractor, clips[::-1])
    with pytest.raises(ModelError, match="27 vectors of clip 0 would be torn apart"):
        model(**swapped)


@pytest.mark.parametrize("family", ["desta2", "desta25", "qwen"])
def test_nnsight_sees_what_runs(request: pytest.FixtureRequest, family: str) -> None:
    loaded = request.getfixturevalue(family)
    build = {"desta2": desta2_inputs, "desta25": desta25_inputs, "qwen": qwen_inputs}[family]
    clean, other = build(loaded, noise(1.0)), build(loaded, np.zeros(16000, np.float32))
    model = loaded[0].requires_grad_(False)
    traced = nnsight.NNsight(model)  # warns, and so fails, if a submodule hides one of nnsight's names
    with traced.trace(**clean):
        state = traced.language_model.layers[1].output.clone().save()
    with traced.trace(**other):
        traced.language_model.layers[1].output[:] = state
        restored = traced.output.logits.save()
    expected = model(**clean).logits
    torch.testing.assert_close(restored, expected, **CLOSE)
    assert (model(**other).logits - expected).abs().max() > 1e-3


# --- the accepted implementation's numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("desta2", [-0.72204, -0.13157, -1.167, 0.55278, -2.40394, -2.01337]),
        ("desta25", [-0.62889, 0.46778, 0.39614, -0.35186, 0.27229, 0.34925]),
        ("qwen", [1.11159, -1.32155, -0.783, -0.00921, -1.58741, -1.04952]),
    ],
)
def test_numbers_stay(request: pytest.FixtureRequest, family: str, expected: list[float]) -> None:
    loaded = request.getfixturevalue(family)
    build = {"desta2": desta2_inputs, "desta25": desta25_inputs, "qwen": qwen_inputs}[family]
    logits = loaded[0](**build(loaded, noise(1.5, seed=5))).logits[0, -1]
    assert logits[:6].tolist() == pytest.approx(expected, abs=1e-4)
