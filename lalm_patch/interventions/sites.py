"""The places in a model at which states are read and written."""

from __future__ import annotations

from enum import StrEnum


class Site(StrEnum):
    """A named place in the model, in the order in which a forward pass meets them: in every decoder layer, but for the
    first two."""

    TOWER = "tower"
    """What leaves a layer of the audio encoder, [chunks, frames, width]; positions are frames, chunk after chunk."""
    EMBED = "embed"
    """What enters the first decoder layer, [batch, positions, hidden]: at audio positions the projector's output."""
    HEAD = "head"
    """One attention head's part of what enters the output projection, [batch, positions, head size]."""
    ATTN = "attn"
    """What self-attention adds to the residual stream: its output, [batch, positions, hidden]."""
    MLP = "mlp"
    """What the MLP adds to the residual stream: its output, [batch, positions, hidden]."""
    RESID = "resid"
    """The residual stream after the layer: the decoder layer's output, [batch, positions, hidden]."""
