"""What a run is made of, as typed settings, each with the values it takes.

Everything that is composed from YAML and overrides is checked against these before anything is loaded
(`lalm_patch.config`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from lalm_patch.settings.ranges import (
    LARGEST_SEED,
    Address,
    Allowed,
    Listed,
    Name,
    Number,
    Pattern,
    Place,
    Text,
    Whole,
    allowed,
    one_of,
)

MISSING = "???"
"""Stands for a value that has to be given, in YAML as here."""

APPROXIMATE = ("attribution", "integrated_gradients", "relevance")
"""Engines whose cells are approximate."""

OWN_QUESTIONS = ("clip", "table", "sakura_multi", "mmau", "mmar")
"""Data in which each clip has a question of its own."""

A_DAY = 86_400.0
SEED = Whole(0, LARGEST_SEED)
CHECKPOINT = Place("a hub id like owner/name, or a folder")
DECODER = Place("a hub id like owner/name, a folder, or a GGUF file")
LAYOUT = one_of("chat", "user", "flat", "fixed")
DEVICE = Pattern(r"auto|cpu|(cuda|mps|xpu)(:\d{1,3})?", "auto, cpu, cuda or cuda:<number>")
DEVICE_MAP = Pattern(
    r"auto|balanced|balanced_low_0|sequential|cpu|(cuda|mps|xpu)(:\d{1,3})?",
    "auto, balanced, balanced_low_0, sequential, or a device",
)
SHARD = Pattern(r"\d{1,6}/\d{1,6}", "i/n, part i of n with i from 1 to n, for example 1/4")
CORRUPTION = one_of("silence", "dither", "silence_floor", "noise", "time_shuffle", "counterfactual", "gaussian", "mean")
METRIC = one_of("probability", "log_probability", "logit_margin", "option_probability", "rank", "kl", "all")


@dataclass
class ModelSettings:
    """One checkpoint (`conf/model/*.yaml`).

    Attributes:
        name: short name; part of the run folder's name.
        family: the adapter that knows its processor and prompt (`lalm_patch.models.FAMILIES`).
        id: hub id, or a local folder in the same layout. `demo` is the model shipped with the package.
        revision: branch, tag or commit on the hub; for a folder the fingerprint that results carry (`local:...`), so
            that other files are refused.
        decoder: hub id, folder or GGUF file of the language model, where the checkpoint is only a connector; null for
            the one the checkpoint names (from an installed package, if there is one with its weights).
        encoder: hub id or folder of the audio encoder, likewise.
        transcript: what `transcript=null` means for this model; null for a model that is given none.
        dtype: float32, bfloat16 or float16.
        device: auto (the first GPU, else the CPU), cpu, cuda, cuda:1, ...
        device_map: as in transformers (`auto` spreads the model over all GPUs); needs the extra `gpu`.
        offload: none, or where layers wait until they are brought in, one by one: cpu (for a GPU), or disk.
        attn_implementation: sdpa or eager.
        prompt_layout: where the response phrase goes: chat (assistant prefill), user (end of the user's turn), flat
            (no template; base models), or fixed (chat without the quirks of the original's prompt, where it has any).
        data: the data set used when `data=auto`.
    """

    name: Annotated[str, Name()] = MISSING
    family: str = MISSING
    id: Annotated[str, CHECKPOINT] = MISSING
    revision: str | None = None
    decoder: Annotated[str | None, DECODER] = None
    encoder: Annotated[str | None, CHECKPOINT] = None
    transcript: str | None = None
    dtype: Annotated[str, one_of("float32", "bfloat16", "float16")] = "bfloat16"
    device: Annotated[str, DEVICE] = "auto"
    device_map: Annotated[str | None, DEVICE_MAP] = None
    offload: Annotated[str, one_of("none", "cpu", "disk")] = "none"
    attn_implementation: Annotated[str, one_of("sdpa", "eager")] = "sdpa"
    prompt_layout: Annotated[str, LAYOUT] = "chat"
    data: Annotated[str, one_of("demo", "sakura")] = "sakura"


@dataclass
class AttributeSettings:
    """What is asked (`conf/attr/*.yaml`).

    Attributes:
        name: short name; part of the run folder's name.
        question: the question; null where the data has one for each clip.
        options: the answers to choose from; empty likewise.
        response: how the answer begins.
        folder: the attribute's folder in a copy of SAKURA.
        answer: of data=clip, the right answer, one of the options.
    """

    name: Annotated[str, Name()] = MISSING
    question: str | None = MISSING
    options: Annotated[list[str], Listed(Text(), 0)] = MISSING  # type: ignore[assignment]
    response: str = MISSING
    folder: str = MISSING
    answer: str | None = None


@dataclass
class GranularitySettings:
    """What is changed at once (`conf/granularity/*.yaml`).

    Attributes:
        name: layer (all text positions), token (one), segment (all of a segment), audio (a window of the audio), edge
            (attention between two segments is cut), early_text_only (attention of the text to the audio is cut up to a
            layer), back (the audio's states of one layer written where another begins), ablate (zeros or a mean in
            place of the audio's or a segment's), steer (a direction added to the text's), or path (what a segment's
            attention reads, as a later segment reads it there).
        layers: in which decoder layers; null for all (of granularity=back, nine of them, evenly spaced).
        edges: of granularity=edge, which ones, as SOURCE-TARGET; null for all; site=head takes exactly one.
        seconds: of granularity=audio, length of a window in time; null to count positions.
        positions: of granularity=audio, audio positions in a window; null to measure time.
        sources: of granularity=back, the layers whose states are written into others; null for nine, evenly spaced.
        replacement: of granularity=ablate, what is put in: zero, or mean (the mean over clips of the run).
        strength: of granularity=steer, how much of a direction is added, in units of the difference of class means.
        controls: of granularity=steer, how many random directions of the same length are added instead, for comparison.
        path: of granularity=path, the segments it leads through: SOURCE-RELAY-TARGET, or RELAY-TARGET for all that the
            relay has at the site.
        receivers: of granularity=path, the layers in which the target reads the relay; null for all.
    """

    name: Annotated[str, Name()] = MISSING
    layers: list[int] | None = None
    edges: list[str] | None = None
    seconds: Annotated[float | None, Number(0, 3600)] = None
    positions: Annotated[int | None, Whole(1)] = None
    sources: list[int] | None = None
    replacement: Annotated[str | None, one_of("zero", "mean")] = None
    strength: Annotated[float | None, Number(0, 1000)] = None
    controls: Annotated[int | None, Whole(0, 20)] = None
    path: str | None = None
    receivers: list[int] | None = None


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

    name: Annotated[str, one_of("resid", "attn", "mlp", "head", "embed", "tower")] = MISSING
    window: Annotated[int, Whole(1)] = 1


@dataclass
class DirectionSettings:
    """Which run's states go into which run (`conf/direction/*.yaml`).

    Attributes:
        name: denoising (clean states into the corrupted run; the rate is the share of the gap that returns) or noising
            (corrupted states into the clean run; the rate is the share of the gap that is lost).
    """

    name: Annotated[str, one_of("denoising", "noising")] = MISSING


@dataclass
class DataSettings:
    """Which clips (`conf/data/*.yaml`).

    Attributes:
        name: auto (what the model's YAML names), demo, sakura, clip (one recording), table (a file with a question for
            each clip), or a benchmark with a question for each clip: sakura_multi, mmau, mmar.
        root: folder that holds SAKURA's `data/` tree; null fetches it from the hub (extra `hub`). Of table, the folder
            that its audio lies in, null for the table's own; of mmau and mmar, the copy's folder.
        audio: of data=clip, the recording.
        path: of data=table, the file, .jsonl or .csv; of mmau and mmar, the list, if it is not the copy's only one.
        limit: how many clips, balanced over the classes; null for all.
        seed: which clips, where `limit` leaves a choice.
        bad_clips: stop (name every unusable clip before anything is computed) or exclude (keep the reason instead).
    """

    name: Annotated[str, one_of("auto", "demo", "sakura", *OWN_QUESTIONS)] = MISSING
    root: Annotated[str | None, Place("a folder")] = None
    audio: Annotated[str | None, Place("an audio file")] = None
    path: Annotated[str | None, Place("a file")] = None
    limit: Annotated[int | None, Whole(1)] = None
    seed: Annotated[int, SEED] = 0
    bad_clips: Annotated[str, one_of("stop", "exclude")] = "stop"


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

    name: Annotated[str, CORRUPTION] = MISSING
    scale: Annotated[float | None, Number(0)] = None
    seed: Annotated[int, SEED] = 0


@dataclass
class MetricSettings:
    """What figures and the page of text show (`conf/metric/*.yaml`); every metric follows from what a run stores.

    Attributes:
        name: probability, log_probability, logit_margin, option_probability, rank, kl (see `analysis.metric`), or all.
    """

    name: Annotated[str, METRIC] = MISSING


@dataclass
class ObserveSettings:
    """What is looked at in the runs besides, without changing them (`conf/observe/*.yaml`).

    Attributes:
        name: nothing, lens, grounding or everything.
        lens: the logit lens at every layer and position, in the clean and the corrupted run.
        attention: how much attention each segment of the text pays to the audio in the clean run, by layer and head.
    """

    name: Annotated[str, Name()] = MISSING
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
        options: listed as words (dog, cat), or with letters ((a) dog (b) cat), of which one is the answer.
        answer: what is scored of an answer: its first token, or the whole of it, token after token.
    """

    layout: Annotated[str | None, LAYOUT] = None
    order: Annotated[str, one_of("fixed", "shuffled")] = "fixed"
    seed: Annotated[int, SEED] = 0
    target: Annotated[str, one_of("leading_space", "bare")] = "leading_space"
    correct: Annotated[str, one_of("options", "vocabulary")] = "options"
    options: Annotated[str, one_of("words", "letters")] = "words"
    answer: Annotated[str, one_of("first_token", "whole")] = "first_token"


@dataclass
class EngineSettings:
    """How cells are computed (`conf/engine/*.yaml`).

    Attributes:
        name: auto (replay where the decoder allows it), replay, or direct; or an approximation, which says how well it
            agrees with exact cells: attribution, integrated_gradients or relevance.
        pack_tokens: most positions that go through a layer together; null: as the device likes it.
        memory_budget: what a pass may take beside the model, in GiB; null: a share of the free memory.
        clips: how many clips share replay's passes, so that offloaded weights are brought in for all of them at once;
            null: with `model.offload` as many as fit, else one.
        precision: as_loaded, stream or float32 (docs/method.md); null: float32, on a server as_loaded.
        spot_checks: cells of a run that the direct engine computes again, two per clip.
        float32_clips: where a run computes in less than float32, clips that count of which both runs and some cells
            are computed in float32, too: the run says how precise it is. 0: it does not know.
        float32_cells: cells of each of them.
        tolerance: largest difference in probability that replay may show; null: as measured, see docs/method.md.
        licence_cells: of an approximation, cells of every clip that are computed exactly, too.
        steps: of integrated_gradients, points on the line between the two runs.
    """

    name: Annotated[str, one_of("auto", "replay", "direct", *APPROXIMATE)] = MISSING
    pack_tokens: Annotated[int | None, Whole(1)] = None
    memory_budget: Annotated[float | None, Number(0)] = None
    clips: Annotated[int | None, Whole(1)] = None
    precision: Annotated[str | None, one_of("as_loaded", "stream", "float32")] = None
    spot_checks: Annotated[int, Whole(0)] = 8
    float32_clips: Annotated[int, Whole(0)] = 4
    float32_cells: Annotated[int, Whole(1)] = 16
    tolerance: Annotated[float | None, Number(0, 1)] = None
    licence_cells: Annotated[int, Whole(1)] = 16
    steps: Annotated[int, Whole(1)] = 8


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

    name: Annotated[str, one_of("local", "ndif")] = MISSING
    host: Annotated[str | None, Address()] = None
    max_jobs: Annotated[int, Whole(1)] = 4
    poll_seconds: Annotated[float, Number(0, A_DAY)] = 1.0
    retries: Annotated[int, Whole(0, 100)] = 8
    pause_seconds: Annotated[float, Number(0, A_DAY)] = 5.0
    longest_pause_seconds: Annotated[float, Number(0, A_DAY)] = 60.0
    forget_seconds: Annotated[float, Number(0, A_DAY)] = 60.0
    stale_seconds: Annotated[float, Number(0, A_DAY)] = 600.0


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
        trace_excluded: also trace clips that the model names wrongly, or rightly without the sound; they still do not
            count, and no mean has them.
        min_gap: a clip counts if its gap between clean and corrupted run is at least so many times the measured error
            of a probability; null: whatever its gap.
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
    outputs: Annotated[str, Place("a folder")] = "outputs"
    run_name: Annotated[str, Name(255)] = ""
    seed: Annotated[int, SEED] = 0
    on_failed_check: Annotated[str, one_of("stop", "warn")] = "stop"
    trace_excluded: bool = False
    min_gap: Annotated[float | None, Number(0)] = 5.0
    threads: Annotated[int | None, Whole(1, 4096)] = None
    shard: Annotated[str | None, SHARD] = None


ON_EMBEDDINGS = ("gaussian", "mean")
"""Corruptions of what the decoder gets; the model hears the clip itself."""

WHOLE_VOCABULARY = ("rank", "kl")
"""Metrics that need more than the options' logits and their sum over the vocabulary."""

ALLOWED: dict[str, Allowed] = allowed(RunSettings)
"""What every setting takes, by its path."""

CHOICES: dict[str, tuple[str | None, ...]] = {path: entry.words for path, entry in ALLOWED.items() if entry.words}
"""Settings that take one of a few words."""
