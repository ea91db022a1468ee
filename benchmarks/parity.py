"""Compare the natively implemented models with reference numbers of their original code.

    python benchmarks/parity.py FOLDER

FOLDER holds one folder per model (desta2, desta25, qwen_audio) with `checkpoint_root/` (tiny weights in the published
layout), `inputs/<audio>.wav`, `meta.json` (one case or several), and `outputs/<case>.npz` (`inputs_embeds`,
`layer_00`..., `final_norm`, `logits` or `logits_last`, `input_ids`). Prints the largest difference of every tensor and
exits with 1 if one exceeds 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import nnsight
import numpy as np
import soundfile
import torch

from lalm_patch.models import LALM, native
from lalm_patch.settings import ModelSettings

TOLERANCE = 1e-4
GENDER = "What is the gender of the speaker in the speech?"
QUESTION = f"{GENDER} Possible options: male, female."
DESTA25_QUESTION = f'{GENDER} Choose from the following options: "male" or "female"'  # as in the reference
RESPONSE = "The speaker's gender is"
CHECKPOINTS = {
    "desta2": "DeSTA-ntu/DeSTA2-8B-beta",
    "desta25": "DeSTA-ntu/DeSTA2.5-Audio-Llama-3.1-8B",
    "qwen_audio": ".",
}


def inputs(name: str, lalm: LALM, clip: np.ndarray, meta: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The case's inputs, built by the package from the clip and the texts."""
    tokenizer, extractor = lalm.family.tokenizer, lalm.family.extractor  # type: ignore[attr-defined]
    if name == "qwen_audio":
        tokens = native.qwen_audio_tokens(len(clip))
        prompt = native.qwen_audio_chat_prompt(tokenizer, QUESTION, RESPONSE, audio_tokens=[tokens])
        return {**prompt.tensors(), **native.qwen_audio_features(extractor, [clip])}
    if name == "desta2":  # the reference leaves the system turn out, as AudioLens does
        prompt = native.desta2_prompt(tokenizer, QUESTION, RESPONSE, transcript=meta["transcription"], system=None)
    else:
        prompt = native.desta25_prompt(tokenizer, DESTA25_QUESTION, RESPONSE, transcripts=(meta["transcription_used"],))
    return {**prompt.tensors(), "input_features": native.whisper_features(extractor, [clip])}


def cases(folder: Path) -> list[dict[str, Any]]:
    """The cases of a model's `meta.json`: one, a list of them (perhaps under `cases`), or by their names."""
    meta = json.loads((folder / "meta.json").read_text())
    if isinstance(meta, dict) and "case" in meta:
        return [meta]
    found = meta.get("cases", meta) if isinstance(meta, dict) else meta
    if isinstance(found, dict):
        found = [{"case": name} | case for name, case in found.items() if isinstance(case, dict)]
    if not found or not all(isinstance(case, dict) and "case" in case for case in found):
        sys.exit(
            f"{folder / 'meta.json'}: expected a case, or several, each with its name under 'case'; got {meta!r:.200}"
        )
    return list(found)


def compare(name: str, folder: Path, meta: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference by tensor of one case's reference."""
    clip, _ = soundfile.read(folder / "inputs" / f"{meta.get('audio', 'a')}.wav", dtype="float32")
    reference = np.load(folder / "outputs" / f"{meta['case']}.npz")
    before = Path.cwd()
    os.chdir(folder / "checkpoint_root")  # the checkpoints name their parts relative to it
    try:
        lalm = LALM.load(
            ModelSettings(name=name, family=name, id=f"./{CHECKPOINTS[name]}", dtype="float32", device="cpu")
        )
    finally:
        os.chdir(before)
    tensors = inputs(name, lalm, clip, meta)
    if tensors["input_ids"].shape[1] != reference["layer_00"].reshape(-1, reference["layer_00"].shape[-1]).shape[0]:
        return {"positions": float("inf")}
    found: dict[str, Any] = {}
    with torch.no_grad(), lalm.traced.trace(**tensors):
        embeds = lalm.layers[0].input.clone().save()
        states = nnsight.save([layer.output.clone() for layer in lalm.layers])
        normed = lalm.norm.output.clone().save()
        logits = lalm.traced.output.logits.clone().save()
    found = {"inputs_embeds": embeds, "final_norm": normed, "logits": logits, "logits_last": logits[:, -1]}
    found |= {f"layer_{index:02d}": state for index, state in enumerate(states)}
    columns = folder / "outputs" / "logit_columns.npy"
    if columns.is_file():
        found["logits_columns"] = logits[..., torch.from_numpy(np.load(columns)).long()]
    differences = {}
    for key in reference.files:
        if key in found:
            expected = torch.from_numpy(reference[key]).float()
            got = found[key].float().reshape(expected.shape)
            differences[key] = float((got - expected).abs().max())
    return differences


def main() -> None:
    """Compare all models of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    worst = 0.0
    for name in CHECKPOINTS:
        for meta in cases(folder / name):
            differences = compare(name, folder / name, meta)
            worst = max(worst, *differences.values())
            listed = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
            print(f"{name:10s} {meta['case']} largest {max(differences.values()):.1e}: {listed}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
