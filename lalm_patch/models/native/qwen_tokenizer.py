"""Qwen-Audio's tokenizer, built from the checkpoint's own qwen.tiktoken."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lalm_patch.errors import ModelError
from lalm_patch.models.files import check_file

TOKENIZER_FILE = "qwen.tiktoken"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO_START, AUDIO_END, AUDIO_PAD = "<audio>", "</audio>", "[[[AUDIO:modality]]]"
_EXTRAS = 205  # <|extra_0|> ... between the turn tokens and the audio tokens
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_qwen_tokenizer(path: Path, audio_start_id: int | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer with the ids of the original.

    Byte-level BPE by rank, special tokens after the ranks: end of text, start and end of a turn, 205 extras, then the
    audio tokens, of which the pad is the first and the two tags are the last. How many are between is not in the
    file: the start tag's id comes from config.json. The ids between (task, language and time tags of the base model's
    training) stay without a name.

    Args:
        path: one token a line: base64 of its bytes, a blank, its rank.
        audio_start_id: id of `<audio>`; the end tag follows it.

    Raises:
        ModelError: no such file, not in this format, or an `audio_start_id` among the text tokens.
    """
    ranks = _read_ranks(path)
    count = len(ranks)
    pad = count + 3 + _EXTRAS
    specials = {END_OF_TEXT: count, TURN_START: count + 1, TURN_END: count + 2, AUDIO_PAD: pad}
    specials |= {f"<|extra_{index}|>": count + 3 + index for index in range(_EXTRAS)}
    if audio_start_id is not None:
        if audio_start_id <= pad:
            raise ModelError(
                f"{path}: {count} tokens put the audio pad at {pad}, but config.json puts {AUDIO_START} at "
                f"{audio_start_id}; the two files are not of the same checkpoint"
            )
        specials |= {AUDIO_START: audio_start_id, AUDIO_END: audio_start_id + 1}
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()} | specials
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(ranks, spelled), ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = sorted(specials, key=specials.__getitem__)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in named])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are the numbers from 0 on."""
    check_file(path)
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            got = line[:40].decode(errors="replace")
            raise ModelError(f"{path}, line {number}: expected base64, a blank and a rank, got {got!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ModelError(f"{path}: expected ranks 0 to {len(ranks) - 1} once each and every single byte among them")
    return ranks


def _merges(ranks: dict[bytes, int], spelled: dict[bytes, str]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, by the token's rank.

    The original merges the two neighbours whose joined bytes have the lowest rank, whichever they are, so all splits
    of a token are merges, not only the one training made.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[left], spelled[right]) for left, right in known]
    return merges


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
