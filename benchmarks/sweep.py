"""Time per cell of the direct and the replay engine on one random model, in one run.

    python benchmarks/sweep.py                  # Voxtral-shaped: 30 layers, 375 audio and 40 text positions, hidden 512
    python benchmarks/sweep.py --layers 8 --hidden 128

The whole token-wise grid goes through replay, both base runs included; the direct engine computes some of its cells,
spread over the grid, both from audio (as a user without replay would) and from embeddings (audio tower left out). The
largest difference in probability over those cells is printed beside the times. Only the ratios mean something.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.grids import token_grid
from lalm_patch.interventions import Intervention
from lalm_patch.models import LALM, Encoding, TokenTable

AUDIO_TOKEN, PRE = 24, 3


class RandomVoxtral(LALM):
    """A random Voxtral-shaped model; prompts are ids, no tokenizer is involved."""

    def __init__(self, layers: int, hidden: int) -> None:
        config = VoxtralConfig(
            audio_config={"hidden_size": hidden // 2, "intermediate_size": hidden * 2, "num_hidden_layers": layers}
            | {"num_attention_heads": 8},
            text_config={
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": hidden * 8 // 3,
                "num_hidden_layers": layers,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": hidden // 8,
                "vocab_size": 32000,
            },
            audio_token_id=AUDIO_TOKEN,
        )
        torch.manual_seed(0)
        super().__init__(VoxtralForConditionalGeneration(config), family=None)  # type: ignore[arg-type]

    def random_encoding(self, text: int, audio: int, seed: int) -> Encoding:
        """A random clip of `audio` positions and a prompt of `text` tokens after it."""
        generator = torch.Generator().manual_seed(seed)
        ids = [5] * PRE + [AUDIO_TOKEN] * audio + list(range(100, 100 + text))
        roles = ["pre"] * PRE + ["audio"] * audio + ["late"] * (text - 1) + ["last"]
        tokens = TokenTable(tuple(ids), tuple(map(str, ids)), tuple(roles))
        windows = audio // 375
        features = torch.randn(windows, 128, 3000, generator=generator)
        return self.embed(tokens, {"input_ids": torch.tensor([ids]), "input_features": features})


class DirectFromEmbeddings(DirectEngine):
    """The direct engine without its audio tower: starts from the decoder's input embeddings."""

    name = "direct, from embeddings"

    def cells(  # type: ignore[override]
        self, clean: Encoding, corrupted: Encoding, interventions: Sequence[Intervention], option_ids: Sequence[int]
    ) -> object:
        """As `DirectEngine.cells`, on encodings whose inputs are embeddings."""
        bare = [
            Encoding(e.tokens, {"inputs_embeds": e.inputs_embeds}, e.inputs_embeds, e.position_ids)
            for e in (clean, corrupted)
        ]
        return super().cells(*bare, interventions, option_ids)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median wall time."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--text", type=int, default=40, help="text positions after the audio")
    parser.add_argument("--audio", type=int, default=375, help="audio positions, a multiple of 375")
    parser.add_argument("--cells", type=int, default=20, help="cells the direct engine computes")
    parser.add_argument("--repeats", type=int, default=3, help="whole grids that replay computes")
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    lalm = RandomVoxtral(options.layers, options.hidden)
    clean, corrupted = (lalm.random_encoding(options.text, options.audio, seed) for seed in (0, 1))
    grid = token_grid(clean.tokens, range(options.layers))
    ids = (11, 12, 13)
    some = np.random.default_rng(0).choice(len(grid.cells), options.cells, replace=False)
    cells = [grid.cells[index] for index in some]

    def replay() -> object:
        engine = ReplayEngine(lalm, options.pack_tokens)  # a new one: its base runs belong to the time
        return engine.sweep(clean, corrupted, grid, ids)

    direct = DirectEngine(lalm)
    embeddings = DirectFromEmbeddings(lalm)
    replay()  # warm-up: allocator, nnsight's source cache
    passes = len(cells) + 1  # the clean run is one more
    per_cell = {
        "replay": seconds(replay, options.repeats) / len(grid.cells),
        "direct, from audio": seconds(lambda: direct.cells(clean, corrupted, cells, ids), 1) / passes,
        "direct, from embeddings": seconds(lambda: embeddings.cells(clean, corrupted, cells, ids), 1) / passes,
    }
    fast = ReplayEngine(lalm, options.pack_tokens).sweep(clean, corrupted, grid, ids)
    slow = direct.cells(clean, corrupted, cells, ids)
    difference = np.abs(fast.option_logits[some] - slow.option_logits).max()

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {options.threads} threads, {versions}")
    positions = f"{options.audio} audio and {options.text} text positions"
    print(f"decoder: {options.layers} layers, hidden {options.hidden}, {positions}")
    print(f"audio encoder: {options.layers} layers, hidden {options.hidden // 2}, 1500 frames per 375 audio positions")
    print(f"float32, token-wise grid of {len(grid.cells)} cells")
    print(f"{'engine':<26}{'ms per cell':>12}{'times replay':>14}")
    for name, value in per_cell.items():
        print(f"{name:<26}{value * 1e3:>12.3f}{value / per_cell['replay']:>14.1f}")
    print(f"largest difference of a logit, replay against direct, {len(cells)} random cells: {difference:.1e}")


if __name__ == "__main__":
    main()
