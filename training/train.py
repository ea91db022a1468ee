"""Train the demo model. First the encoder with a classifier per attribute, then the whole model on its prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from lalm_patch.config import config_folder
from lalm_patch.models.qwen2_audio import Qwen2Audio
from lalm_patch.stimuli import SAMPLING_RATE, Attribute, Prompt
from training.corpus import Clip
from training.model import WINDOW
from training.steps import Descent, report_held_out

ATTRIBUTES = ("animal", "emotion", "gender", "language")
QUESTION_WEIGHTS = (1.0, 2.0, 2.0, 3.0)  # in the order of ATTRIBUTES: what is hard is asked more often
SHARE_SILENT, SHARE_SHUFFLED, SHARE_OTHER_LAYOUT = 0.08, 0.15, 0.15
IGNORED = -100
BUCKET = 8  # batches among which clips are sorted by length


@cache
def attributes() -> dict[str, Attribute]:
    """The attributes as the package asks about them."""
    found = {}
    for name in ATTRIBUTES:
        fields = yaml.safe_load((config_folder() / "attr" / f"{name}.yaml").read_text())
        found[name] = Attribute(**{**fields, "options": tuple(fields["options"])})
    return found


def prompt_texts() -> list[str]:
    """Everything the tokenizer has to know whole: questions, phrases, and every answer after its phrase."""
    texts = ["You are a helpful assistant. system user assistant Audio 1:", "system\n", "user\n", "assistant\n"]
    for attribute in attributes().values():
        prompt = Prompt.from_attribute(attribute)
        texts += [f"{prompt.flat_text} {option}" for option in attribute.options]
    return texts


@dataclass
class Features:
    """Log-mel features of a set of clips.

    Attributes:
        mel: [clips, mel bins, frames] float16, the clip padded to the model's window.
        frames: [clips] frames that hold the clip.
        labels: [clips, attributes] index of the right option, `IGNORED` where the question makes no sense.
    """

    mel: Tensor
    frames: Tensor
    labels: Tensor

    @classmethod
    def of(cls, clips: Iterable[Clip], processor: Qwen2AudioProcessor) -> Features:
        """Extract the features of clips."""
        known = attributes()
        mels, frames, labels = [], [], []
        for clip in clips:
            batch = processor.feature_extractor(
                clip.waveform,
                sampling_rate=SAMPLING_RATE,
                return_attention_mask=True,
                padding="max_length",
                return_tensors="pt",
            )
            mels.append(batch["input_features"][0].half())
            frames.append(int(batch["attention_mask"].sum()))
            labels.append(
                [
                    known[name].options.index(clip.labels[name]) if name in clip.labels else IGNORED
                    for name in ATTRIBUTES
                ]
            )
        return cls(torch.stack(mels), torch.tensor(frames), torch.tensor(labels))

    def __len__(self) -> int:
        return len(self.frames)


def positions(frames: Tensor) -> Tensor:
    """Audio positions for a number of mel frames, as in Qwen2-Audio: two strides of two."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


class EncoderClassifier(nn.Module):
    """Linear classifiers on the mean of the projected audio embeddings: they teach the encoder early what matters."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(hidden, len(attribute.options)) for attribute in attributes().values()])

    def loss(self, states: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over the attributes that apply. states: [batch, positions, hidden]."""
        pooled = self.pool(states, frames)
        losses = [
            weight
            / 3
            * functional.cross_entropy(head(pooled), labels[:, column], ignore_index=IGNORED, reduction="sum")
            for column, (head, weight) in enumerate(zip(self.heads, QUESTION_WEIGHTS, strict=True))
        ]
        return torch.stack(losses).sum() / len(labels)

    @torch.no_grad()
    def accuracy(
        self, encoder: Callable[[Tensor, Tensor], Tensor], features: Features, batch: int = 32
    ) -> dict[str, tuple[float, int]]:
        """Share of clips that the classifiers get right on an encoder's states, and their number, per attribute."""
        right = torch.zeros(len(ATTRIBUTES))
        for part in torch.arange(len(features)).split(batch):
            pooled = self.pool(encoder(features.mel[part], features.frames[part]), features.frames[part])
            for column, head in enumerate(self.heads):
                right[column] += (head(pooled).argmax(-1) == features.labels[part, column]).sum()
        counts = (features.labels != IGNORED).sum(0)
        return {name: (float(right[i] / counts[i]), int(counts[i])) for i, name in enumerate(ATTRIBUTES)}

    @staticmethod
    def pool(states: Tensor, frames: Tensor) -> Tensor:
        """Mean over the positions that hold the clip: [clips, hidden]."""
        lengths = positions(frames)
        inside = torch.arange(states.shape[1])[None] < lengths[:, None]
        return (states * inside[..., None]).sum(1) / lengths[:, None]


class Prompts:
    """Token ids of every question, with the place where the audio positions go."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        self.family = Qwen2Audio(processor)
        self.vocabulary = len(processor.tokenizer)
        self.audio_id = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        self._answers: dict[str, list[int]] = {}
        for name, attribute in attributes().items():
            prompt = Prompt.from_attribute(attribute)
            plain = self.family.text_ids(prompt, "chat")
            longer = [self.family.text_ids(prompt, "chat", f" {option}") for option in attribute.options]
            if any(len(ids) != len(plain) + 1 for ids in longer):
                raise ValueError(f"every option of {name} must be one token")
            self._answers[name] = [ids[-1] for ids in longer]

    def answer(self, name: str, index: int) -> int:
        """Target token of an option."""
        return self._answers[name][index]

    def answers(self, name: str) -> list[int]:
        """Target tokens of an attribute's options."""
        return self._answers[name]

    def ids(self, name: str, audio_positions: int, layout: str = "chat", order: int | None = None) -> list[int]:
        """A question about a clip of some length; `order` seeds a shuffled list of options."""
        attribute = attributes()[name]
        prompt = Prompt.from_attribute(attribute)
        if order is not None:
            prompt = Prompt.from_attribute(attribute, "shuffled", order, "training")
        ids = self.family.text_ids(prompt, layout)
        place = ids.index(self.audio_id)
        return [*ids[:place], *[self.audio_id] * audio_positions, *ids[place + 1 :]]


def last_logits(
    model: Qwen2AudioForConditionalGeneration, rows: Sequence[list[int]], mel: Tensor, frames: Tensor
) -> Tensor:
    """Logits at each row's last position: [rows, vocabulary]."""
    ends = torch.tensor([len(row) - 1 for row in rows])
    ids = torch.full((len(rows), int(ends.max()) + 1), model.config.text_config.pad_token_id)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    # Rows end at different places: padding on the right is invisible to what comes before it.
    decoder = model.get_decoder()
    first, end = WINDOW
    # Outside of the window attention adds nothing: there a token's state follows from its id alone, whoever is around.
    unique, inverse = ids.unique(return_inverse=True)
    states = without_attention(model.get_input_embeddings()(unique), decoder.layers[:first])[inverse]
    audio = without_attention(encode(model, mel, frames), decoder.layers[:first])
    for index, count in enumerate(positions(frames).tolist()):
        states[index, ids[index] == model.config.audio_token_id] = audio[index, :count]
    place = torch.arange(states.shape[1])[None]
    rotary = decoder.rotary_emb(states, place)
    for layer in decoder.layers[first:end]:
        states = layer(states, position_ids=place, position_embeddings=rotary)
    lasts = without_attention(states[torch.arange(len(rows)), ends], decoder.layers[end:])
    logits: Tensor = model.lm_head(decoder.norm(lasts))
    return logits


def without_attention(states: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """Decoder layers whose attention adds nothing: [..., hidden]."""
    for layer in layers:
        states = states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[operator]
    return states


def encode(model: Qwen2AudioForConditionalGeneration, mel: Tensor, frames: Tensor) -> Tensor:
    """Audio tower and projector as the model runs them: [clips, positions, hidden].

    The model pads every clip to its window and masks the padding; here the batch is cut behind its longest clip, which
    changes nothing but the time it takes.
    """
    tower = model.model.audio_tower
    cut = min(mel.shape[-1], (int(frames.max()) + 2 + 3) // 4 * 4)  # the convolutions look two frames ahead
    states = functional.gelu(tower.conv1(mel[..., :cut].float()))
    states = functional.gelu(tower.conv2(states)).permute(0, 2, 1)
    states = states + tower.embed_positions.weight[: states.shape[1]]
    inside = torch.arange(states.shape[1])[None] < ((frames - 1) // 2 + 1)[:, None]
    mask = inside[:, None, None].expand(-1, 1, states.shape[1], -1)
    for layer in tower.layers:
        states = layer(states, mask)
    states = tower.layer_norm(tower.avg_pooler(states.permute(0, 2, 1)).permute(0, 2, 1))
    projected: Tensor = model.model.multi_modal_projector(states)
    return projected


Batch = tuple[list[list[int]], Tensor, Tensor, Tensor]


def draw(
    prompts: Prompts,
    features: Features,
    chosen: np.ndarray,
    rng: np.random.Generator,
    silent: Features,
    weights: Sequence[float],
) -> Batch:
    """Rows of ids, mels, frames and answers for a batch: one question a clip, some of them about silence.

    Answers are probabilities, [rows, vocabulary]: for silence, which tells nothing, all options alike.
    """
    rows, mels, frames = [], [], []
    answers = torch.zeros(len(chosen), prompts.vocabulary)
    for row, index in enumerate(chosen):
        labels = features.labels[index]
        shares = np.where(labels.numpy() != IGNORED, weights, 0)
        column = int(rng.choice(len(ATTRIBUTES), p=shares / shares.sum()))
        name, source = ATTRIBUTES[column], features
        if rng.random() < SHARE_SILENT:
            # As long as the clip it replaces: one long clip in a batch costs as much as a batch of long clips.
            source, index = silent, int((silent.frames - features.frames[index]).abs().argmin())
            answers[row, prompts.answers(name)] = 1 / len(prompts.answers(name))
        else:
            answers[row, prompts.answer(name, int(labels[column]))] = 1
        layout = str(rng.choice(["user", "flat"])) if rng.random() < SHARE_OTHER_LAYOUT else "chat"
        order = int(rng.integers(1000)) if rng.random() < SHARE_SHUFFLED else None
        rows.append(prompts.ids(name, int(positions(source.frames[index])), layout, order))
        mels.append(source.mel[index])
        frames.append(int(source.frames[index]))
    return rows, torch.stack(mels), torch.tensor(frames), answers


def batches(frames: Tensor, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of indices; clips of a batch are of about the same length, so that little is padding."""
    while True:
        order = rng.permutation(len(frames))
        for start in range(0, len(order) - size + 1, size * BUCKET):
            part = order[start : start + size * BUCKET]
            part = part[np.argsort(frames.numpy()[part], kind="stable")]
            together = [part[at : at + size] for at in range(0, len(part) - size + 1, size)]
            yield from (together[index] for index in rng.permutation(len(together)))


def train(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    features: Features,
    silent: Features,
    *,
    encoder_steps: int,
    steps: int,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
    weights: Sequence[float] = QUESTION_WEIGHTS,
    evaluation: Features | None = None,
) -> list[float]:
    """Both stages; returns the loss of every step. The same seed on the same machine gives the same weights.

    `evaluation` is looked at now and then for the log only.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    classifier = EncoderClassifier(model.config.text_config.hidden_size)
    prompts = Prompts(processor)
    descent = Descent([*model.parameters(), *classifier.parameters()], rate, encoder_steps, steps)

    def encoder_loss(chosen: np.ndarray) -> Tensor:
        audio = encode(model, features.mel[chosen], features.frames[chosen])
        return classifier.loss(audio, features.frames[chosen], features.labels[chosen])

    order = batches(features.frames, batch, rng)
    model.train()
    for step in range(encoder_steps + steps):
        first_stage = step < encoder_steps
        chosen = next(order)
        if first_stage:
            loss = encoder_loss(chosen)
        else:
            rows, mel, frames, answers = draw(prompts, features, chosen, rng, silent, weights)
            loss = functional.cross_entropy(last_logits(model, rows, mel, frames), answers)
            if step % 4 == 0:  # now and then, so that the encoder keeps what it learned
                loss = loss + 0.3 * encoder_loss(chosen)
        descent.step(loss)
        if evaluation is not None and (step + 1) % 1000 == 0:
            if first_stage:
                report_held_out(classifier.accuracy(partial(encode, model), evaluation))
            else:
                report_held_out(accuracy(model, processor, evaluation))
    model.eval()
    return descent.losses


@torch.no_grad()
def accuracy(
    model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, features: Features, batch: int = 32
) -> dict[str, tuple[float, int]]:
    """Share of clips whose largest option logit is the right one, and their number, per attribute."""
    prompts = Prompts(processor)
    result = {}
    for column, name in enumerate(ATTRIBUTES):
        which = (features.labels[:, column] != IGNORED).nonzero()[:, 0]
        right = 0
        for part in which.split(batch):
            rows = [prompts.ids(name, int(count)) for count in positions(features.frames[part])]
            logits = last_logits(model, rows, features.mel[part], features.frames[part])
            right += int((logits[:, prompts.answers(name)].argmax(-1) == features.labels[part, column]).sum())
        if len(which):
            result[name] = (right / len(which), len(which))
    return result


def silence(processor: Qwen2AudioProcessor, count: int, seed: int) -> Features:
    """Digital silence of 0.8 to 4.5 s."""
    rng = np.random.default_rng([seed, 3])
    lengths = (rng.uniform(0.8, 4.5, count) * SAMPLING_RATE).astype(int)
    return Features.of((Clip(np.zeros(length, np.float32), {}, "") for length in lengths), processor)


def save(model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, folder: Path) -> None:
    """Write the checkpoint in its published layout, weights rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
