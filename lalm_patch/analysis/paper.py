"""What the paper reports on Figures 2 and 3 (Chen, Huang and Lee, arXiv 2603.13768), as statements a program can check.

The paper describes its curves in words; the numbers that make a word checkable ("gradually", "near 0", "about layer
15") are this package's, and stand here to be seen. A claim names a measure of `lalm_patch.analysis.claims.MEASURES`,
the runs it is about, and the region in which the measured number has to lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

DESTA = ("desta2", "desta25")
QWEN = ("qwen_audio", "qwen2_audio")
VOXTRAL = ("voxtral",)
ALL_MODELS = (*DESTA, *QWEN, *VOXTRAL)
ALL_ATTRIBUTES = ("animal", "emotion", "gender", "language")


@dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes:
        name: identifier.
        source: where in the paper.
        says: the statement, in our words.
        criterion: what is measured and required.
        measure: name of the measure.
        models: it is about each of these.
        attributes: it is about each of these.
        granularity: of the runs.
        low, high: the region: the number has to be at least `low` and at most `high`.
        window: layers, or shares of depth, that the measure looks at, where it needs any.
        against: models that each of `models` is compared with, where the measure compares models.
        contrast: attributes that `attributes` together are set against, where the measure is about the difference.
    """

    name: str
    source: str
    says: str
    criterion: str
    measure: str
    models: tuple[str, ...]
    attributes: tuple[str, ...] = ALL_ATTRIBUTES
    granularity: str = "layer"
    low: float = -inf
    high: float = inf
    window: tuple[float, float] = (0.0, 1.0)
    against: tuple[str, ...] = ()
    contrast: tuple[str, ...] = ()


CLAIMS = (
    Claim(
        "desta_rises_gradually",
        "Figure 2 and the text on it",
        "Recovery of DeSTA2 and DeSTA2.5 rises gradually over the layers.",
        "From 10 % to 90 % of the final recovery takes at least a quarter of the decoder's depth.",
        "width",
        DESTA,
        low=0.25,
    ),
    Claim(
        "desta_settles_about_layer_15",
        "Figure 2 and the text on it",
        "DeSTA2 and DeSTA2.5 settle after about layer 15.",
        "90 % of the final recovery is passed between layers 11 and 19.",
        "settled",
        DESTA,
        low=11,
        high=19,
    ),
    Claim(
        "qwen_stays_near_zero",
        "Figure 2 and the text on it",
        "Recovery of Qwen-Audio and Qwen2-Audio stays near 0 for most layers.",
        "Mean recovery is nowhere above 0.2 in the layers before 18.",
        "largest_in_window",
        QWEN,
        high=0.2,
        window=(0, 17),
    ),
    Claim(
        "qwen_jumps_late",
        "Figure 2 and the text on it",
        "Recovery of Qwen-Audio and Qwen2-Audio jumps in the last third of the layers.",
        "Half of the final recovery is passed between layers 18 and 31.",
        "depth",
        QWEN,
        low=18,
        high=31,
    ),
    Claim(
        "voxtral_is_earlier",
        "Figure 2 and the text on it",
        "Voxtral peaks much earlier than the DeSTA and the Qwen models.",
        "Against each of the four, Voxtral passes half of its final recovery at a share of depth 0.1 or more smaller.",
        "earlier_than_others",
        VOXTRAL,
        high=-0.1,
        against=(*DESTA, *QWEN),
    ),
    Claim(
        "voxtral_is_clearest_for_emotion_and_gender",
        "Figure 2 and the text on it",
        "Voxtral's lead is clearest for emotion and gender.",
        "Its mean lead in share of depth is larger by 0.02 or more on emotion and gender than on animal and language.",
        "lead_contrast",
        VOXTRAL,
        ("emotion", "gender"),
        low=0.02,
        against=(*DESTA, *QWEN),
        contrast=("animal", "language"),
    ),
    Claim(
        "last_token_is_highest",
        "Figure 3 and the text on it",
        "Token by token, recovery is highest at the last token, for every model and attribute.",
        "Recovery averaged over the layers before the last is larger at the last token than at any other "
        "(the last layer itself gives 1 there by construction).",
        "last_above_others",
        ALL_MODELS,
        granularity="token",
        low=0.0,
    ),
    *(
        Claim(
            f"object_peak_{name}",
            "Figure 3 and the text on it",
            f"The option tokens show a peak in the middle layers: {who} on {attribute}.",
            "Between a quarter and three quarters of depth, some layer's recovery at the option tokens is larger by "
            "0.05 or more than at the text around them, and the test for it is significant.",
            "object_peak",
            models,
            (attribute,),
            "token",
            low=0.05,
            window=(0.25, 0.75),
        )
        for name, who, models, attribute in (
            ("qwen_animal", "the Qwen models", QWEN, "animal"),
            ("desta_language", "the DeSTA models", DESTA, "language"),
            ("voxtral_language", "Voxtral", VOXTRAL, "language"),
        )
    ),
)
