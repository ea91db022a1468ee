"""What a run is made of, as typed settings. Hydra checks every YAML under `conf/` and every override against these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

APPROXIMATE = ("attribution", "integrated_gradients", "relevance")
"""Engines whose cells are approximate."""


@dataclass
class ModelSettings:
    """One checkpoint (`conf/model/*.yaml`).

    Attributes:
        name: short name; part of the run folder's name.
        family: the adapter that knows its processor and prompt (`lalm_patch.models.FAMILIES`).
        id: hub id, or a local folder in the same layout. `demo` is the model shipped with the package.
        revision: branch, tag or commit on the hub.
        decoder: hub id or folder of the language model, where the checkpoint is only a connector; null for the one the
            checkpoint names.
        encoder: likewise, of the audio encoder.
        transcript: what `transcript=null` means for this model; null for a model that is given none.
        dtype: float32, bfloat16 or float16.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...
        device_map: as in transformers (`auto` spreads the model over all GPUs); needs the extra `gpu`.
        attn_implementation: sdpa or eager.
        prompt_layout: where the response phrase goes: chat (assistant prefill), user (end of the user's turn), flat
            (no template; base models), or fixed (chat without the quirks of the original's prompt, where it has any).
        data: the data set used when `data=auto`.
    """

    name: str = MISSING
    family: str = MISSING
    id: str = MISSING
    revision: str | None = None
    decoder: str | None = None
    encoder: str | None = None
    transcript: str | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str = "sdpa"
    prompt_layout: str = "chat"
    data: str = "sakura"


@dataclass
class AttributeSettings:
    """One attribute of the sound (`conf/attr/*.yaml`): the question, its options, how the answer begins."""

    name: str = MISSING
    question: str = MISSING
    options: list[str] = MISSING
    response: str = MISSING
    folder: str = MISSING


@dataclass
class GranularitySettings:
    """What is changed at once (`conf/granularity/*.yaml`).

    Attributes:
        name: layer (all text positions), token (one), segment (all of a segment), audio (a window of the audio), edge
            (attention between two segments is cut), or early_text_only (attention of the text to the audio is cut up
            to a layer).
        layers: in which decoder layers; null for all.
        edges: of granularity=edge, which ones, as SOURCE-TARGET; null for all; site=head takes exactly one.
        seconds: of granularity=audio, length of a window in time; null to count positions.
        positions: of granularity=audio, audio positions in a window; null to measure time.
    """

    name: str = MISSING
    layers: list[int] | None = None
    edges: list[str] | None = None
    seconds: float | None = None
    positions: int | None = None


@dataclass
class SiteSettings:
    """Where in a layer states are exchanged (`conf/site/*.yaml`).

    Attributes:
        name: resid (the residual stream after the layer), attn or mlp (what they add to it), head (one attention
            head at a time, before the output projection; with granularity=layer), embed (what enters the decoder: at
            audio positions the projector's output) or tower (after a layer of the audio encoder), both with
            granularity=audio.
        window: layers exchanged together: a cell's own and the ones above it.
    """

    name: str = MISSING
    window: int = 1


@dataclass
class DirectionSettings:
    """Which run's states go into which run (`conf/direction/*.yaml`).

    Attributes:
        name: denoising (clean states into the corrupted run; the rate is the share of the gap that returns) or noising
            (corrupted states into the clean run; the rate is the share of the gap that is lost).
    """

    name: str = MISSING


@dataclass
class DataSettings:
    """Which clips (`conf/data/*.yaml`).

    Attributes:
        name: auto (what the model's YAML names), demo, or sakura.
        root: folder that holds SAKURA's `data/` tree; null fetches it from the hub (extra `hub`).
        limit: how many clips, balanced over the classes; null for all.
        seed: which clips, where `limit` leaves a choice.
        bad_clips: stop (name every unusable clip before anything is computed) or exclude (keep the reason instead).
    """

    name: str = MISSING
    root: str | None = None
    limit: int | None = None
    seed: int = 0
    bad_clips: str = "stop"


@dataclass
class CorruptionSettings:
    """What the corrupted run hears instead of the clip (`conf/corruption/*.yaml`).

    Attributes:
        name: silence (exact zeros), dither (the quietest noise), silence_floor (the clip's own background), noise
            (white, of the clip's level), time_shuffle (the clip's pieces in another order), counterfactual (a clip of
            another class, cut or filled up), all of the clip's length; or, what the decoder gets in place of the clip's
            audio embeddings: gaussian (they and noise), mean (the mean of the run's).
        scale: of gaussian, the noise's standard deviation in units of the embeddings' own.
        seed: of gaussian's noise, and of choices that counterfactual and mean leave open.
    """

    name: str = MISSING
    scale: float | None = None
    seed: int = 0


@dataclass
class MetricSettings:
    """What figures and the page of text show (`conf/metric/*.yaml`); every metric follows from what a run stores.

    Attributes:
        name: probability, log_probability, logit_margin, option_probability, rank, kl (see `analysis.metric`), or all.
    """

    name: str = MISSING


@dataclass
class ObserveSettings:
    """What is looked at in the runs besides, without changing them (`conf/observe/*.yaml`).

    Attributes:
        name: nothing, lens, grounding or everything.
        lens: the logit lens at every layer and position, in the clean and the corrupted run.
        attention: how much attention each segment of the text pays to the audio in the clean run, by layer and head.
    """

    name: str = MISSING
    lens: bool = False
    attention: bool = False


@dataclass
class PromptSettings:
    """Open points of the prompt, stored with every result.

    Attributes:
        layout: null (the model's own), chat, user, flat or fixed.
        order: fixed, or shuffled (seeded per sample).
        seed: seed of the shuffled order.
        target: leading_space (" cat") or bare ("cat").
        correct: a prediction is the largest logit among the options, or over the whole vocabulary.
    """

    layout: str | None = None
    order: str = "fixed"
    seed: int = 0
    target: str = "leading_space"
    correct: str = "options"


@dataclass
class EngineSettings:
    """How cells are computed (`conf/engine/*.yaml`).

    Attributes:
        name: auto (replay where the decoder allows it), replay, or direct; or an approximation, which says how well it
            agrees with exact cells: attribution, integrated_gradients or relevance.
        pack_tokens: most suffix positions that share one forward pass.
        memory_budget: what such a pass may take beside the model, in GiB; null: a share of the free memory.
        spot_checks: cells of a run that the direct engine computes again, two per clip.
        tolerance: largest difference in probability that replay may show; null chooses by dtype.
        licence_cells: of an approximation, cells of every clip that are computed exactly, too.
        steps: of integrated_gradients, points on the line between the two runs.
    """

    name: str = MISSING
    pack_tokens: int = 2048
    memory_budget: float | None = None
    spot_checks: int = 8
    tolerance: float | None = None
    licence_cells: int = 16
    steps: int = 8


@dataclass
class BackendSettings:
    """Where the model runs (`conf/backend/*.yaml`).

    The key for NDIF is no setting: it is read from the environment, `NDIF_API_KEY`, and stored nowhere.

    Attributes:
        name: local (this process), or ndif (a server that has the model; no weights here).
        host: URL of the server; null for `NDIF_HOST`, or without it the public NDIF.
        max_jobs: most clips in flight at once.
        poll_seconds: time between two looks at the jobs' states.
        retries: how often to try again what may pass: no connection, a busy server, a job that the server gave up.
        pause_seconds: pause before the first of these tries; each later pause is twice as long,
        longest_pause_seconds: up to this.
        forget_seconds: a job is sent again if for this long the server knows nothing of it, or leaves it waiting though
            a later one is done, the server was away, or another process had sent it.
        stale_seconds: any job is sent again whose status and description stay the same for this long while no earlier
            one comes back; the next time after twice as long, and so on. The first answer counts.
    """

    name: str = MISSING
    host: str | None = None
    max_jobs: int = 4
    poll_seconds: float = 1.0
    retries: int = 8
    pause_seconds: float = 5.0
    longest_pause_seconds: float = 60.0
    forget_seconds: float = 60.0
    stale_seconds: float = 600.0


@dataclass
class RunSettings:
    """A whole run.

    Attributes:
        transcript: what a model that is given a transcript with the audio reads: clean (the clip's own, in both
            runs), none, upstream (each run's own, as in the original), or a text; null for the model's default.
        dry_run: say what would be run, and run nothing; needs no weights.
        outputs: where run folders are made.
        run_name: the run folder's name, derived from the settings.
        seed: seed of the spot checks and of the bootstrap.
        on_failed_check: stop, or warn (store the failed check and go on).
        threads: CPU threads for torch; null leaves torch's choice.
        shard: null for all clips, or `i/n`: this process does part i (from 1) of the clips, dealt to n processes that
            may run at once; the last one to end writes the run's result.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    attr: AttributeSettings = field(default_factory=AttributeSettings)
    granularity: GranularitySettings = field(default_factory=GranularitySettings)
    site: SiteSettings = field(default_factory=SiteSettings)
    direction: DirectionSettings = field(default_factory=DirectionSettings)
    data: DataSettings = field(default_factory=DataSettings)
    corruption: CorruptionSettings = field(default_factory=CorruptionSettings)
    metric: MetricSettings = field(default_factory=MetricSettings)
    observe: ObserveSettings = field(default_factory=ObserveSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    backend: BackendSettings = field(default_factory=BackendSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    transcript: str | None = None
    dry_run: bool = False
    outputs: str = "outputs"
    run_name: str = ""
    seed: int = 0
    on_failed_check: str = "stop"
    threads: int | None = None
    shard: str | None = None


ON_EMBEDDINGS = ("gaussian", "mean")
"""Corruptions of what the decoder gets; the model hears the clip itself."""

WHOLE_VOCABULARY = ("rank", "kl")
"""Metrics that need more than the options' logits and their sum over the vocabulary."""

# Settings that say where or how fast a run computes, or what is drawn, not what is computed: changing them keeps the
# run's folder.
NOT_PART_OF_A_RUN: tuple[str, ...] = (
    "outputs",
    "run_name",
    "dry_run",
    "threads",
    "shard",
    "on_failed_check",
    "metric.name",
    "model.device",
    "model.device_map",
    "engine.pack_tokens",
    "engine.memory_budget",
    "backend.host",
    "backend.max_jobs",
    "backend.poll_seconds",
    "backend.retries",
    "backend.pause_seconds",
    "backend.longest_pause_seconds",
    "backend.forget_seconds",
    "backend.stale_seconds",
)

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.attn_implementation": ("sdpa", "eager"),
    "model.prompt_layout": ("chat", "user", "flat", "fixed"),
    "site.name": ("resid", "attn", "mlp", "head", "embed", "tower"),
    "direction.name": ("denoising", "noising"),
    "data.name": ("auto", "demo", "sakura"),
    "data.bad_clips": ("stop", "exclude"),
    "corruption.name": (
        "silence",
        "dither",
        "silence_floor",
        "noise",
        "time_shuffle",
        "counterfactual",
        "gaussian",
        "mean",
    ),
    "metric.name": ("probability", "log_probability", "logit_margin", "option_probability", "rank", "kl", "all"),
    "prompt.layout": (None, "chat", "user", "flat", "fixed"),
    "prompt.order": ("fixed", "shuffled"),
    "prompt.target": ("leading_space", "bare"),
    "prompt.correct": ("options", "vocabulary"),
    "engine.name": ("auto", "replay", "direct", *APPROXIMATE),
    "backend.name": ("local", "ndif"),
    "on_failed_check": ("stop", "warn"),
}
"""Settings that take one of a few words; the command line names them when another word comes."""
