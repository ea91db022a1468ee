"""The last stage of `training.smol`: the connector learns what a frozen, pretrained decoder understands.

The loss is that of the answer's first token after the response phrase. Nothing of the decoder is trained; it runs in
bfloat16, and what stands before the audio, the same in every prompt, is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lalm_patch.models import Family
from lalm_patch.models.native.qformer import DestaConnector
from training.answers import question_ids
from training.hearing import EVERY, SHARE_SYNTHETIC, Examples, Material, accuracy, states_of, windowed, written
from training.spectra import FLOOR
from training.stages import Stage
from training.train import ATTRIBUTES, SHARE_OTHER_LAYOUT, SHARE_SILENT, attributes

SHARE_SHUFFLED = 0.5
LAYOUTS = ("chat", "user")


@dataclass(frozen=True)
class Row:
    """A prompt behind its audio: ids, and how probable every token of the vocabulary should be."""

    ids: list[int]
    answer: dict[int, float]


class Decoder:
    """The frozen decoder with the prompt's beginning already read.

    Args:
        model: the pretrained decoder, any precision.
        family: makes the prompts; their audio is at the same places whatever is asked.
        audio_id: the token that holds these places.
    """

    def __init__(self, model: LlamaForCausalLM, family: Family, audio_id: int) -> None:
        self.model = model.to(torch.bfloat16).eval().requires_grad_(False)
        self.family = family
        ids = question_ids(family, "gender", "chat", None, None, "")
        self._first = ids.index(audio_id)
        self._after = len(ids) - ids[::-1].index(audio_id)
        with torch.no_grad():
            read = model.model(torch.tensor([ids[: self._first]]), use_cache=True).past_key_values
        self._read = [(layer.keys, layer.values) for layer in read.layers]

    def targets(self, name: str) -> list[int]:
        """The first token of every option of an attribute, after the response phrase."""
        plain = len(question_ids(self.family, name, "chat", None, None, ""))
        options = attributes()[name].options
        return [question_ids(self.family, name, "chat", None, None, f" {option}")[plain] for option in options]

    def row(self, name: str, layout: str, order: int | None, label: int | None) -> Row:
        """A question; without a label (nothing is heard) all options are equally right."""
        targets = self.targets(name)
        wanted = targets if label is None else [targets[label]]
        ids = question_ids(self.family, name, layout, order, None, "")[self._after :]
        return Row(ids, dict.fromkeys(wanted, 1 / len(wanted)))

    def logits(self, rows: list[list[int]], audio: Tensor) -> Tensor:
        """Logits [rows, vocabulary] at each row's end, after audio vectors [rows, positions, hidden]."""
        ends = torch.tensor([len(row) - 1 for row in rows])
        ids = torch.zeros(len(rows), int(ends.max()) + 1, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)  # padding behind a row's end is invisible to it
        words = self.model.get_input_embeddings()(ids)
        states = torch.cat([audio.to(words.dtype), words], 1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._read):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        place = self._first + torch.arange(states.shape[1])[None]
        states = self.model.model(inputs_embeds=states, past_key_values=cache, position_ids=place).last_hidden_state
        lasts = states[torch.arange(len(rows)), audio.shape[1] + ends]
        return self.model.lm_head(lasts).float()


def train_answers(
    connector: DestaConnector,
    encoder: WhisperEncoder,
    decoder: Decoder,
    material: Material,
    path: Path,
    *,
    frames: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    held_out: Examples,
) -> Stage:
    """Train the connector through the decoder on questions about clips, and now and then about silence."""
    encoder.eval().requires_grad_(False)
    silence = torch.full((encoder.config.num_mel_bins, frames), FLOOR)

    def loss(stage: Stage) -> Tensor:
        rows, spectra = [], []
        for _ in range(batch):
            name, spectrum, known = material.draw(SHARE_SYNTHETIC, stage.rng)
            layout = LAYOUTS[int(stage.rng.random() < SHARE_OTHER_LAYOUT)]
            order = int(stage.rng.integers(1000)) if stage.rng.random() < SHARE_SHUFFLED else None
            silent = stage.rng.random() < SHARE_SILENT
            rows.append(decoder.row(name, layout, order, None if silent else known[name]))
            spectra.append(windowed(silence, frames) if silent else windowed(spectrum, frames, stage.rng))
        with torch.no_grad():
            states = states_of(encoder, torch.stack(spectra))
        logits = decoder.logits([row.ids for row in rows], connector(states))
        wanted = torch.zeros_like(logits)
        for index, row in enumerate(rows):
            for token, share in row.answer.items():
                wanted[index, token] = share
        return functional.cross_entropy(logits, wanted, label_smoothing=0.0)

    def answer(name: str, spectrum: Tensor) -> Tensor:
        vectors = connector(states_of(encoder, windowed(spectrum, frames)[None]))
        row = decoder.row(name, "chat", None, None)
        return decoder.logits([row.ids], vectors)[0, decoder.targets(name)]

    stage = Stage(path, nn.ModuleDict({"connector": connector}), steps=steps, rate=rate, seed=seed)
    stage.run(loss, EVERY, lambda: written(accuracy(held_out, answer)))
    return stage


def word_embeddings(decoder: Decoder) -> dict[str, Tensor]:
    """The embedding [options, hidden] of every option's first token, float32, by attribute."""
    table = decoder.model.get_input_embeddings().weight.detach().float()
    return {name: table[decoder.targets(name)] for name in ATTRIBUTES}
