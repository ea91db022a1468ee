"""Time per cell of replay beside what people use, on one random model and one token-wise grid, in one run.

    python benchmarks/peers.py                       # Voxtral-shaped: 30 layers, 375 audio and 40 text positions
    python benchmarks/peers.py --shape qwen2_audio   # Qwen2-Audio-shaped: 32 layers, a clip of 10 s
    python benchmarks/peers.py --layers 8 --hidden 128

Replay computes the whole grid, both base runs included; everything else computes some of its cells, spread over the
grid, and the clean states it needs once more (counted as one cell). Every logit is compared with replay's. pyvene and
TransformerLens are measured where they are installed (extra `bench`). TransformerLens cannot pass audio through its
sweeps: it gets a text-only decoder of the same size and a prompt of as many tokens, and is compared with nothing.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from common import IDS, RandomLALM, RandomQwen2Audio, RandomVoxtral, Table, emit, from_embeddings, parser, seconds
from torch import Tensor

from lalm_patch.engine import DirectEngine, ReplayEngine
from lalm_patch.interventions.grids import token_grid
from lalm_patch.interventions.patches import Patch
from lalm_patch.models import Encoding

Sweep = Callable[[Sequence[Patch]], Tensor]
"""Patches of one position each to logits [patches, vocabulary]."""


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--shape", choices=("voxtral", "qwen2_audio"), default="voxtral")
    made.add_argument("--cells", type=int, default=20, help="cells everything but replay computes")
    made.add_argument("--rows", type=int, default=10, help="rows of a batch, where rows are variants")
    options = made.parse_args()
    if options.shape == "qwen2_audio":
        made.set_defaults(layers=32, audio=250)
        options = made.parse_args()
    torch.set_num_threads(options.threads)
    emit([measure(options)], options)


def measure(options: Namespace) -> Table:
    """The table of times per cell."""
    shapes: dict[str, type[RandomLALM]] = {"voxtral": RandomVoxtral, "qwen2_audio": RandomQwen2Audio}
    lalm = shapes[options.shape](options.layers, options.hidden)
    clean, corrupted = (lalm.random_encoding(options.text, options.audio, seed) for seed in (0, 1))
    grid = token_grid(clean.tokens, range(options.layers))
    some = np.random.default_rng(0).choice(len(grid.cells), options.cells, replace=False)
    patches = [grid.cells[index].patches[0] for index in some]

    def replay() -> object:
        return ReplayEngine(lalm, options.pack_tokens).sweep(clean, corrupted, grid, IDS)

    expected = ReplayEngine(lalm, options.pack_tokens).sweep(clean, corrupted, grid, IDS).option_logits[some]
    own = seconds(replay, options.repeats, options.clock) / len(grid.cells)
    bare = [from_embeddings(encoding) for encoding in (clean, corrupted)]
    peers: dict[str, Sweep] = {
        "one nnsight trace per cell, from audio": partial(nnsight_trace, lalm, clean, corrupted),
        "one nnsight trace per cell, from embeddings": partial(nnsight_trace, lalm, *bare),
        "plain PyTorch hooks, from audio": partial(plain_hooks, lalm, clean, corrupted),
        "plain PyTorch hooks, from embeddings": partial(plain_hooks, lalm, *bare),
        f"nnsight, {options.rows} rows as variants, from embeddings": partial(
            nnsight_rows, lalm, clean, corrupted, options.rows
        ),
    }
    notes = []
    if find_spec("pyvene") is None:
        notes.append("pyvene is not installed (extra `bench`).")
    else:
        peers["pyvene, from audio"] = partial(pyvene, lalm, clean, corrupted)
    rows: list[list[str | int | float]] = [["lalm_patch, replay (base runs included)", own * 1e3, 1.0, 0.0]]
    for name, sweep in peers.items():
        kept: list[Tensor] = []
        taken = seconds(partial(_keep, sweep, patches, kept), 1, options.clock) / (len(patches) + 1)
        difference = float(np.abs(kept[0][:, list(IDS)].float().numpy() - expected).max())
        rows.append([name, taken * 1e3, taken / own, difference])
    if find_spec("transformer_lens") is None:
        notes.append("TransformerLens is not installed (extra `bench`).")
    else:
        taken = transformer_lens(lalm, clean, corrupted, patches, options.clock)
        rows.append(["TransformerLens, text-only decoder", taken * 1e3, taken / own, "no audio"])
    positions = f"{options.audio} audio and {options.text} text positions"
    title = f"{options.shape}-shaped, {options.layers} layers, hidden {options.hidden}, {positions}"
    notes.append(f"Replay: all {len(grid.cells)} cells, median of {options.repeats}; the others: {len(patches)} cells.")
    return Table(title, ["", "ms per cell", "times replay", "largest difference of a logit"], rows, notes)


def _keep(sweep: Sweep, patches: Sequence[Patch], kept: list[Tensor]) -> None:
    kept.append(sweep(patches))


def nnsight_trace(lalm: RandomLALM, clean: Encoding, corrupted: Encoding, patches: Sequence[Patch]) -> Tensor:
    """nnsight's documented recipe for activation patching: a trace to read the states, then one trace per cell."""
    source = DirectEngine(lalm).states(clean, {(patch.layer, patch.site) for patch in patches})
    rows = []
    for patch in patches:
        where = list(patch.positions)
        with torch.no_grad(), lalm.traced.trace(**corrupted.inputs):
            lalm.layers[patch.layer].output[:, where] = source[patch.layer, patch.site][:, where]
            logits = lalm.traced.output.logits[:, -1].clone().save()
        rows.append(logits)
    return torch.cat(rows)


def nnsight_rows(lalm: RandomLALM, clean: Encoding, corrupted: Encoding, rows: int, patches: Sequence[Patch]) -> Tensor:
    """Cells as rows of a batch: one trace writes one patch into each row."""
    source = DirectEngine(lalm).states(from_embeddings(clean), {(patch.layer, patch.site) for patch in patches})
    logits = []
    for start in range(0, len(patches), rows):
        batch = sorted(enumerate(patches[start : start + rows]), key=lambda item: item[1].layer)
        embeds = corrupted.inputs_embeds.expand(len(batch), -1, -1)
        with torch.no_grad(), lalm.traced.trace(inputs_embeds=embeds, use_cache=False):
            for row, patch in batch:
                where = list(patch.positions)
                lalm.layers[patch.layer].output[row, where] = source[patch.layer, patch.site][0, where]
            last = lalm.traced.output.logits[:, -1].clone().save()
        logits.append(last)
    return torch.cat(logits)


def plain_hooks(lalm: RandomLALM, clean: Encoding, corrupted: Encoding, patches: Sequence[Patch]) -> Tensor:
    """PyTorch forward hooks and a whole forward pass per cell."""
    layers = lalm.decoder_module.layers
    source: dict[int, Tensor] = {}

    def read(layer: int, _module: object, _inputs: object, output: Tensor) -> None:
        source[layer] = output

    def write(patch: Patch, _module: object, _inputs: object, output: Tensor) -> Tensor:
        where = list(patch.positions)
        output[:, where] = source[patch.layer][:, where]
        return output

    handles = [
        layers[layer].register_forward_hook(partial(read, layer)) for layer in {patch.layer for patch in patches}
    ]
    rows = []
    with torch.no_grad():
        lalm.module(**clean.inputs)
        for handle in handles:
            handle.remove()
        for patch in patches:
            handle = layers[patch.layer].register_forward_hook(partial(write, patch))
            rows.append(lalm.module(**corrupted.inputs).logits[:, -1])
            handle.remove()
    return torch.cat(rows)


def pyvene(lalm: RandomLALM, clean: Encoding, corrupted: Encoding, patches: Sequence[Patch]) -> Tensor:
    """pyvene's interchange intervention with given source states; audio models have to be made known to it first."""
    from pyvene import IntervenableConfig, IntervenableModel, RepresentationConfig, VanillaIntervention
    from pyvene.models.constants import CONST_OUTPUT_HOOK
    from pyvene.models.intervenable_modelcard import type_to_dimension_mapping, type_to_module_mapping

    kind = type(lalm.module)
    path = next(name for name, module in lalm.module.named_modules() if module is lalm.decoder_module)
    type_to_module_mapping[kind] = {"block_output": (f"{path}.layers[%s]", CONST_OUTPUT_HOOK)}
    type_to_dimension_mapping[kind] = {"block_output": ("text_config.hidden_size",)}
    source = DirectEngine(lalm).states(clean, {(patch.layer, patch.site) for patch in patches})
    rows = []
    for patch in patches:
        where = RepresentationConfig(layer=patch.layer, component="block_output", unit="pos", max_number_of_units=1)
        model = IntervenableModel(
            IntervenableConfig([where], intervention_types=VanillaIntervention), model=lalm.module
        )
        (key,) = model.interventions
        with torch.no_grad():
            _, patched = model(
                base=corrupted.inputs,
                source_representations={key: source[patch.layer, patch.site][:, list(patch.positions)]},
                unit_locations={"base": patch.positions[0]},
            )
        rows.append(patched.logits[:, -1])
    return torch.cat(rows)


def transformer_lens(
    lalm: RandomLALM, clean: Encoding, corrupted: Encoding, patches: Sequence[Patch], clock: str
) -> float:
    """Seconds per cell of TransformerLens's run_with_hooks on a Llama of the decoder's size."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {name: value for name, value in lalm.decoder_module.config.to_dict().items() if name in _SIZES}
    module = LlamaForCausalLM(LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])).eval()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="</s>", eos_token="</s>", pad_token="</s>"
    )
    with tempfile.TemporaryDirectory() as folder:
        module.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # TransformerLens wants to know its folder
        bridge = TransformerBridge.boot_transformers(folder, hf_model=module, tokenizer=tokenizer)
    tokens = [
        torch.randint(2, lalm.decoder_module.config.vocab_size, (1, len(encoding.tokens)))
        for encoding in (clean, corrupted)
    ]

    def write(patch: Patch, cache: dict[str, Tensor], states: Tensor, hook: object) -> Tensor:
        where = list(patch.positions)
        states[:, where] = cache[f"blocks.{patch.layer}.hook_out"][:, where]
        return states

    def sweep() -> None:
        names = {f"blocks.{patch.layer}.hook_out" for patch in patches}
        _, cache = bridge.run_with_cache(tokens[0], names_filter=lambda name: name in names)
        for patch in patches:
            hooks = [(f"blocks.{patch.layer}.hook_out", partial(write, patch, cache))]
            bridge.run_with_hooks(tokens[1], fwd_hooks=hooks)

    with torch.no_grad():
        return seconds(sweep, 1, clock) / (len(patches) + 1)


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

if __name__ == "__main__":
    main()
