"""The last stage of `training.smol`: the connector learns what a frozen, pretrained decoder understands.

The loss is that of the answer's first token after the response phrase. Nothing of the decoder is trained; it runs in
bfloat16, and what stands before the audio, the same in every prompt, is computed once.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM

from lalm_patch.models import Family
from lalm_patch.models.cache_keyword import cache_keyword
from lalm_patch.models.native.qformer import DestaConnector
from training.answers import question_ids
from training.hearing import EVERY, Heard, Material, accuracy, written
from training.stages import Stage
from training.train import ATTRIBUTES, SHARE_OTHER_LAYOUT, SHARE_SILENT, attributes

SHARE_SHUFFLED = 0.5
LAYOUTS = ("chat", "user")


class Decoder:
    """The frozen decoder with the prompt's beginning already read.

    Args:
        model: the pretrained decoder.
        family: makes the prompts; their audio is at the same places whatever is asked.
        audio_id: the token that holds these places.
        dtype: what it computes in.
    """

    def __init__(
        self, model: LlamaForCausalLM, family: Family, audio_id: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.model = model.to(dtype).eval().requires_grad_(False)
        self.family = family
        ids = question_ids(family, "gender", "chat", None, None, "")
        self._first = ids.index(audio_id)
        self._after = len(ids) - ids[::-1].index(audio_id)
        with torch.no_grad():
            read = DynamicCache()
            self._run(read, input_ids=torch.tensor([ids[: self._first]]))
        self._read = [(layer.keys, layer.values) for layer in read.layers]

    def targets(self, name: str) -> list[int]:
        """The first token of every option of an attribute, after the response phrase."""
        plain = len(question_ids(self.family, name, "chat", None, None, ""))
        options = attributes()[name].options
        return [question_ids(self.family, name, "chat", None, None, f" {option}")[plain] for option in options]

    def row(self, name: str, layout: str = "chat", order: int | None = None) -> list[int]:
        """Ids of a question behind its audio; `order` seeds a shuffled list of options."""
        return question_ids(self.family, name, layout, order, None, "")[self._after :]

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
        states = self._run(cache, inputs_embeds=states, position_ids=place)
        lasts = states[torch.arange(len(rows)), audio.shape[1] + ends]
        return self.model.lm_head(lasts).float()

    def _run(self, cache: DynamicCache, **inputs: Tensor) -> Tensor:
        layers = self.model.model
        found: Tensor = layers(**inputs, **{cache_keyword(layers.forward): cache}, use_cache=True).last_hidden_state
        return found


def train_answers(
    connector: DestaConnector,
    decoder: Decoder,
    material: Material,
    silence: Tensor,
    path: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    held_out: Heard,
) -> Stage:
    """Train the connector through the decoder on questions about clips, and now and then about silence.

    Nothing is to be heard in silence, states [layers, positions, width]: there all options are equally right.
    """

    def loss(stage: Stage) -> Tensor:
        rows, states, wanted = [], [], torch.zeros(batch, decoder.model.config.vocab_size)
        for index in range(batch):
            name, heard, answers = material.draw(stage.rng)
            shares = answers[name]
            if stage.rng.random() < SHARE_SILENT:
                heard, shares = silence, torch.full_like(shares, 1 / len(shares))
            layout = LAYOUTS[int(stage.rng.random() < SHARE_OTHER_LAYOUT)]
            order = int(stage.rng.integers(1000)) if stage.rng.random() < SHARE_SHUFFLED else None
            rows.append(decoder.row(name, layout, order))
            states.append(heard)
            wanted[index, decoder.targets(name)] = shares
        logits = decoder.logits(rows, connector(list(torch.stack(states).unbind(1))))
        return functional.cross_entropy(logits, wanted)

    def answer(name: str, states: Tensor) -> Tensor:
        logits = decoder.logits([decoder.row(name)], connector(list(states[None].unbind(1))))
        return logits[0, decoder.targets(name)]

    stage = Stage(path, nn.ModuleDict({"connector": connector}), steps=steps, rate=rate, seed=seed)
    stage.run(loss, EVERY, lambda: written(accuracy(held_out, answer)))
    return stage


def word_embeddings(decoder: Decoder) -> dict[str, Tensor]:
    """The embedding [options, hidden] of every option's first token, float32, by attribute."""
    table = decoder.model.get_input_embeddings().weight.detach().float()
    return {name: table[decoder.targets(name)] for name in ATTRIBUTES}
