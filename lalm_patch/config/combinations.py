"""Settings that are right one by one and not together."""

from __future__ import annotations

from lalm_patch.config.words import nearest
from lalm_patch.errors import ConfigError
from lalm_patch.interventions.grids import GRANULARITIES, SOURCED
from lalm_patch.interventions.segments import KNOCKOUTS, check_edges
from lalm_patch.interventions.spans import Spans, check_spans
from lalm_patch.interventions.ways import STANDARD, check_way
from lalm_patch.models.names import family_names
from lalm_patch.settings import APPROXIMATE, ON_EMBEDDINGS, OWN_QUESTIONS, WHOLE_VOCABULARY, RunSettings
from lalm_patch.settings.ranges import shown
from lalm_patch.stimuli.prompt import Attribute
from lalm_patch.storage.shards import Shard


def check_combinations(settings: RunSettings) -> None:
    """Raises ConfigError for settings that are right one by one and not together, before anything is loaded."""
    site, direction = settings.site, settings.direction.name
    _check_names(settings)
    _check_attribute(settings)
    _check_answers(settings)
    if settings.shard is not None:
        Shard.parse(settings.shard)
    _check_knockout(settings)
    _check_corruption(settings)
    if settings.backend.name == "ndif" and (settings.observe.lens or settings.observe.attention):
        raise ConfigError(
            f"observe={settings.observe.name} looks at states and attention that a server does not send back: use "
            "backend=local, or observe=nothing"
        )
    if settings.backend.name == "ndif" and settings.metric.name in WHOLE_VOCABULARY:
        raise ConfigError(
            f"metric={settings.metric.name} needs the whole vocabulary's logits, which a server does not send back: "
            "use another metric, or backend=local"
        )
    if settings.backend.name == "ndif" and settings.engine.precision not in (None, "as_loaded"):
        raise ConfigError(
            f"engine.precision={settings.engine.precision}: a server computes with its weights as they are loaded; use "
            "as_loaded, or backend=local"
        )
    if settings.backend.name == "ndif" and settings.trace_excluded:
        raise ConfigError("trace_excluded=true: a server computes clips that count only; use backend=local")
    _check_sources(settings)
    _check_paths(settings)
    _check_audio(settings)
    _check_approximation(settings)
    if site.name == "head" and settings.granularity.name not in ("layer", "edge"):
        raise ConfigError(
            f"site=head with granularity={settings.granularity.name}: heads times tokens times layers are more cells "
            "than one can look at; use granularity=layer, or site=attn for single tokens"
        )
    standard = (site.name, site.window, direction) == ("resid", 1, "denoising")
    if settings.backend.name == "ndif" and not standard:
        raise ConfigError(
            f"backend=ndif exchanges the residual stream after single layers, denoising; got site={site.name}, "
            f"site.window={site.window}, direction={direction}: use backend=local for these"
        )


def _check_names(settings: RunSettings) -> None:
    """Names of what can be added from outside the package."""
    for path, name, known in (
        ("model.family", settings.model.family, family_names()),
        ("granularity.name", settings.granularity.name, tuple(GRANULARITIES)),
    ):
        if name not in known:
            expected = ", ".join(known)
            raise ConfigError(f"{path}={name}: expected one of {expected}; the nearest is {nearest(name, known)}")


def _check_attribute(settings: RunSettings) -> None:
    """What can make no prompt: options that are one and the same, for example; or a question for what has its own."""
    data, attr = settings.data.name, settings.attr
    if data == "clip":
        if settings.data.audio is None:
            raise ConfigError("data=clip: expected a recording, got none; give it, as in data.audio=door.wav")
        if attr.answer not in attr.options:
            raise ConfigError(
                f"attr.answer={attr.answer}: expected one of attr.options ({', '.join(attr.options)}): the answer that "
                "is right"
            )
        return
    if settings.data.audio is not None:
        raise ConfigError(f"data.audio={settings.data.audio}: goes with data=clip, not with data={data}")
    if attr.answer is not None:
        raise ConfigError(f"attr.answer={attr.answer}: goes with data=clip, not with data={data}")
    if settings.data.path is not None and data not in ("table", "mmau", "mmar"):
        raise ConfigError(f"data.path={settings.data.path}: goes with data=table, mmau or mmar, not with data={data}")
    if data == "table" and settings.data.path is None:
        raise ConfigError("data=table: expected a file, got none; give it, as in data.path=questions.jsonl")
    if data in ("sakura_multi", "mmau", "mmar") and settings.data.root is None:
        raise ConfigError(f"data={data}: expected a copy on disk, got none; give its folder, as in data.root=FOLDER")
    if data in ("table", "mmau", "mmar") and attr.question:
        raise ConfigError(
            f"attr={attr.name} with data={data}: each clip has a question of its own; leave attr and attr.question out"
        )
    if data in ("table", "mmau", "mmar") and attr.options:
        raise ConfigError(f"attr.options={shown(attr.options)}: with data={data} each clip has options of its own")
    if data in OWN_QUESTIONS:
        return
    if not attr.question and not attr.options:
        raise ConfigError(f"attr={attr.name} has no question: it goes with data=table, mmau or mmar, not data={data}")
    if len(attr.options) < 2:
        has = f"it has {len(attr.options)}" if attr.options else "it is empty"
        raise ConfigError(f"attr.options={shown(attr.options)}: expected a list of texts, at least 2; {has}")
    try:
        Attribute(**vars(attr))
    except ConfigError as error:
        raise ConfigError(f"attr.options: {error}") from None


def _check_answers(settings: RunSettings) -> None:
    """Answers of several tokens: what is about the next token alone does not go with them."""
    prompt = settings.prompt
    if prompt.answer != "whole":
        return
    asked = {
        "prompt.correct=vocabulary": prompt.correct == "vocabulary",
        f"granularity={settings.granularity.name}": settings.granularity.name in (*KNOCKOUTS, "path"),
        f"observe={settings.observe.name}": settings.observe.lens,
        f"engine={settings.engine.name}": settings.engine.name in APPROXIMATE,
        "backend=ndif": settings.backend.name == "ndif",
        f"metric={settings.metric.name}": settings.metric.name in WHOLE_VOCABULARY,
    }
    if refused := [setting for setting, is_asked in asked.items() if is_asked]:
        raise ConfigError(
            f"prompt.answer=whole reads all tokens of an answer, and {', '.join(refused)} is about the next token "
            "alone: use prompt.answer=first_token for that"
        )


def _check_approximation(settings: RunSettings) -> None:
    """What a first-order approximation of single patches cannot be asked."""
    engine, site = settings.engine, settings.site
    if engine.name not in APPROXIMATE:
        return
    asked = {
        f"granularity={settings.granularity.name}": settings.granularity.name in KNOCKOUTS,
        f"site.window={site.window}": site.window != 1,
        "site=tower": site.name == "tower",
        "backend=ndif": settings.backend.name == "ndif",
        f"metric={settings.metric.name}": settings.metric.name in WHOLE_VOCABULARY,
        f"model.offload={settings.model.offload}": settings.model.offload != "none",  # gradients come back for weights
    }
    if refused := [setting for setting, is_asked in asked.items() if is_asked]:
        raise ConfigError(
            f"engine={engine.name} approximates what single patches in the decoder do to the options' probabilities, "
            f"not {', '.join(refused)}: use engine=auto for that"
        )


def _check_audio(settings: RunSettings) -> None:
    """Windows of the audio, and the sites before the decoder that only they reach."""
    granularity, site = settings.granularity, settings.site
    if granularity.name != "audio":
        if granularity.seconds is not None or granularity.positions is not None:
            raise ConfigError(
                f"granularity.seconds and granularity.positions go with granularity=audio, not {granularity.name}"
            )
        if site.name in ("embed", "tower"):
            raise ConfigError(
                f"site={site.name} is before the text hears anything: expected granularity=audio, got "
                f"granularity={granularity.name}"
            )
        return
    check_spans(Spans(granularity.seconds, granularity.positions))
    if settings.backend.name == "ndif":
        raise ConfigError("granularity=audio is not sent to servers: use backend=local")
    if site.name == "embed" and (site.window != 1 or granularity.layers is not None):
        raise ConfigError("site=embed is one place, not one per layer: expected site.window=1, granularity.layers=null")
    if site.name == "tower" and granularity.seconds is None:
        raise ConfigError("site=tower has frames, not audio positions: expected granularity.seconds, got null")
    if site.name == "tower" and settings.engine.name == "replay":
        raise ConfigError(
            "site=tower with engine=replay: what changes in the audio encoder changes all it gives, so that no work is "
            "shared; use engine=auto or direct"
        )
    if site.name == "tower" and settings.corruption.name in ON_EMBEDDINGS:
        raise ConfigError(
            f"site=tower with corruption={settings.corruption.name}: both runs have the same audio encoder states; use "
            "a corruption that is sound, or site=embed"
        )


def _check_corruption(settings: RunSettings) -> None:
    corruption = settings.corruption
    if corruption.name == "gaussian" and not (corruption.scale or 0) > 0:
        raise ConfigError(f"corruption.scale={corruption.scale}: expected a positive number for corruption=gaussian")
    if corruption.name != "gaussian" and corruption.scale is not None:
        raise ConfigError(f"corruption.scale goes with corruption=gaussian, not with corruption={corruption.name}")
    if corruption.name in ON_EMBEDDINGS and settings.backend.name == "ndif":
        raise ConfigError(
            f"corruption={corruption.name} replaces audio embeddings, which only this machine can: expected one of "
            "the corruptions that are sound with backend=ndif, or backend=local"
        )


def _check_knockout(settings: RunSettings) -> None:
    """Cutting attention is something else than exchanging states: which other settings go with it."""
    granularity, site, direction = settings.granularity, settings.site, settings.direction.name
    if granularity.edges is not None and granularity.name != "edge":
        raise ConfigError(f"granularity.edges goes with granularity=edge, not with granularity={granularity.name}")
    if granularity.name not in KNOCKOUTS:
        return
    sites = ("attn", "head") if granularity.name == "edge" else ("attn",)
    if direction != "noising" or site.name not in sites:
        raise ConfigError(
            f"granularity={granularity.name} cuts attention in the clean run: expected direction=noising and "
            f"site={' or '.join(sites)}, got direction={direction}, site={site.name}"
        )
    if granularity.name == "early_text_only" and site.window != 1:
        raise ConfigError(
            f"granularity=early_text_only cuts all layers up to one; got site.window={site.window}, use 1"
        )
    check_edges(granularity.edges or ())
    if site.name == "head" and len(granularity.edges or ()) != 1:
        raise ConfigError(
            "granularity=edge with site=head cuts one edge, head by head: name it, for example "
            "granularity.edges=[audio-last]"
        )


def _check_sources(settings: RunSettings) -> None:
    """Granularities that put in something else than the other run's state of the same place."""
    granularity, site, direction = settings.granularity, settings.site, settings.direction.name
    name = granularity.name
    for key, its in (("sources", "back"), ("replacement", "ablate"), ("strength", "steer"), ("controls", "steer")):
        if getattr(granularity, key) is not None and name != its:
            raise ConfigError(f"granularity.{key} goes with granularity={its}, not with granularity={name}")
    if name not in SOURCED:
        return
    if settings.engine.name in APPROXIMATE:
        raise ConfigError(
            f"engine={settings.engine.name} follows a gradient from one run's state to the other's at the same place, "
            f"and granularity={name} puts in something else, for which nothing says how far that holds: use engine=auto"
        )
    if settings.backend.name == "ndif":
        raise ConfigError(
            f"granularity={name} puts in something else than the clean run's states of the same place, and a "
            "server is asked for those only: use backend=local"
        )
    if name in ("back", "steer") and (site.name, site.window) != ("resid", 1):
        raise ConfigError(
            f"granularity={name} changes the residual stream at one layer at a time: expected site=resid and "
            f"site.window=1, got site={site.name}, site.window={site.window}"
        )
    if name == "ablate" and direction != "noising":
        raise ConfigError(
            f"granularity=ablate takes states out of the clean run: expected direction=noising, got {direction}"
        )
    if name == "steer" and settings.data.name in OWN_QUESTIONS:
        raise ConfigError(
            f"granularity=steer with data={settings.data.name}: a direction is a class's, and there each clip has "
            "options of its own; use data=demo or data=sakura"
        )
    if name == "steer" and settings.prompt.order != "fixed":
        raise ConfigError(
            f"granularity=steer with prompt.order={settings.prompt.order}: a direction has a vector for each position "
            "of the text, which has to be the same in all clips; use prompt.order=fixed"
        )


def _check_paths(settings: RunSettings) -> None:
    """Path patching: what is sent and read is what attention writes and reads."""
    granularity, name = settings.granularity, settings.granularity.name
    for key in ("path", "receivers"):
        if getattr(granularity, key) is not None and name != "path":
            raise ConfigError(f"granularity.{key} goes with granularity=path, not with granularity={name}")
    if name != "path":
        return
    way, site = granularity.path or STANDARD, settings.site
    check_way(way)
    if way.count("-") == 2 and site.name != "attn":
        raise ConfigError(
            f"granularity.path={way} sends what attention reads: expected site=attn, got site={site.name}; of two "
            "segments, like audio-last, also resid or mlp"
        )
    if site.name not in ("attn", "mlp", "resid") or (site.name == "resid" and site.window != 1):
        raise ConfigError(
            "granularity=path: expected site=attn or mlp, or site=resid with site.window=1, which holds all that is "
            f"below; got site={site.name}, site.window={site.window}"
        )
    if settings.engine.name in APPROXIMATE:
        raise ConfigError(
            f"engine={settings.engine.name} approximates what patches of states do, not single paths: use engine=auto"
        )
    if settings.backend.name == "ndif":
        raise ConfigError("granularity=path is not sent to servers, which patch states: use backend=local")
