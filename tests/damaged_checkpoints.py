"""Tiny checkpoints of six layouts to damage, each opened and asked the way a run does it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import load, noise
from native_checkpoints import save_desta25, save_qwen_audio
from safetensors.torch import load_file
from tiny_generic import save_generic
from tiny_models import save_tiny_qwen2_audio, save_tiny_voxtral
from transformers import AutoModelForMultimodalLM

from lalm_patch.models.checkpoint import find_checkpoint
from lalm_patch.settings import ModelSettings
from lalm_patch.stimuli import Prompt

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f\nsize 12345\n"
PROMPT = Prompt("What is the gender of the speaker?", ("male", "female"), "The speaker is")


@dataclass(frozen=True)
class Tiny:
    """A checkpoint that one call opens; `folders` are all its repositories."""

    family: str
    folders: tuple[Path, ...]

    def copy(self, root: Path) -> Tiny:
        return Tiny(self.family, tuple(Path(shutil.copytree(folder, root / folder.name)) for folder in self.folders))

    def settings(self) -> dict[str, str]:
        return dict(zip(("decoder", "encoder"), map(str, self.folders[1:]), strict=False))

    def identity(self) -> str:
        given = {"name": "x", "family": self.family, "id": str(self.folders[0])}
        return find_checkpoint(ModelSettings(**given, **self.settings())).revision

    def answer(self, **pinned: str) -> tuple[str, torch.Tensor]:
        """Identity and the numbers that carry it."""
        lalm = load(self.folders[0], self.family, **self.settings(), **pinned)
        layout = lalm.family.layouts[0]
        with torch.no_grad():
            logits = lalm.module(**lalm.inputs(noise(0.5), PROMPT, layout)[1]).logits[:, -1]
        options = lalm.target_ids(PROMPT, layout)
        return lalm.commit, torch.cat([logits.flatten(), torch.tensor(options, dtype=logits.dtype)])


def save_tinies(root: Path) -> dict[str, Tiny]:
    """In shards, in torch's old format, in one file, and published in three repositories."""
    whole = save_tiny_qwen2_audio(root / "whole")
    shards, old = root / "shards", root / "old"
    for folder in (shards, old):
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForMultimodalLM.from_pretrained(whole).save_pretrained(shards, max_shard_size="200KB")
    torch.save(load_file(whole / "model.safetensors"), old / "pytorch_model.bin")
    return {
        "shards": Tiny("qwen2_audio", (shards,)),
        "old": Tiny("qwen2_audio", (old,)),
        "voxtral": Tiny("voxtral", (save_tiny_voxtral(root / "voxtral"),)),
        "generic": Tiny("generic", (save_generic(root / "flamingo", "audioflamingo3"),)),
        "qwen_audio": Tiny("qwen_audio", (save_qwen_audio(root / "qwen_audio"),)),
        "desta25": Tiny("desta25", tuple(save_desta25(root / "desta25"))),
    }
