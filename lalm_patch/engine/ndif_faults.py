"""What a server's words mean: does the fault pass by itself, or would the same job end in it again?

NDIF tells a job's fate in a sentence of its own, or in a traceback of what ran. Its sentences are read by how they
begin or by what they promise; of a traceback the exception's line counts, and from its kind follows whose fault it is:
a session of this package opens no connection and starts no process, so an error of these is the server's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SHOWN_CHARACTERS = 300


@dataclass(frozen=True)
class Fault:
    """A failed job, understood.

    Attributes:
        passes: whether the same job may succeed later.
        reason: what happened and what to do: the rest of a sentence that begins with the server's name.
    """

    passes: bool
    reason: str


_PASSING_WORDS = re.compile(
    # "Error submitting request to model deployment", "Error provisioning model", "Error starting model", "Replica was
    # evicted while ...", "Critical server error": all of NDIF's sentences about itself end in this advice.
    r"try again|cancelled or preempted by the server|preempted|reconnecting|truncated or corrupted in transit",
    re.IGNORECASE,
)
_NO_ROOM_NOW = re.compile(r"CANT_ACCOMMODATE|Could not accommodate|No GPU nodes available")
_HUB_AWAY = re.compile(
    r"Max retries exceeded|Connection ?(Error|refused|reset|aborted)|timed? ?out|Too Many Requests|couldn't connect"
    r"|\b(429|50[0234])\b.*(Error|Unavailable|Gateway)",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(r"OutOfMemory|out of memory|MemoryError|Cannot allocate memory", re.IGNORECASE)
_SERVERS_OWN_ERRORS = re.compile(
    # Runner, shard or actor process gone, its socket closed; Redis, Ray or object store away while the result is put
    # there; a device that the actor restarts to mend; a block of somebody else's that still holds the model's thread.
    r"^(\w+\.)*(Connection\w*Error|BrokenPipeError|EOFError|IncompleteReadError|TimeoutError|RunnerError|ShardError"
    r"|RanksDiverged|AbortedError|Endpoint\w*Error|Connect\w*Error|\w*TimeoutError)\b"
    r"|^(ray|redis|botocore|boto3|urllib3)\."
    r"|runner process exited|different thread|device-side assert|illegal memory access"
    r"|No space left on device|Too many open files"
)
_OTHER_VERSIONS = re.compile(
    r"payload could not be read \((ModuleNotFound|Import|Attribute|Unpickling)|architecture on"
)
_TIMEOUT = re.compile(r"exceeded the execution timeout of ([\d.]+) ?s")


def understand(text: str, model: str, versions: str) -> Fault:
    """What the description of a failed job means.

    Args:
        text: the server's words, a sentence or a traceback.
        model: how the server calls the model.
        versions: of the libraries here that have to go together with the server's.
    """
    said = essence(text)
    if _OTHER_VERSIONS.search(text):
        return Fault(False, f"cannot read what {versions} send; use the versions that are there: {said}")
    if text.startswith("Could not deploy this model"):
        return _not_deployed(text.removeprefix("Could not deploy this model.").strip(), model)
    if "Repository Not Found" in text:
        return Fault(False, f"does not have the model {model}: {said}")
    if timeout := _TIMEOUT.search(text):
        return Fault(
            False,
            f"stops jobs after {timeout[1]} s and this clip takes longer; use a coarser granularity, ask its "
            "operator for more time, or use backend=local",
        )
    if "cancelled by operator" in text:
        return Fault(False, "says that its operator cancelled the job; ask there before it is sent again")
    if "Traceback (most recent call last)" not in text and _PASSING_WORDS.search(text):
        return Fault(True, f"gave the job up: {said}")
    if _OUT_OF_MEMORY.search(said):
        return Fault(False, f"ran out of memory; give a smaller engine.pack_tokens: {said}")
    if _SERVERS_OWN_ERRORS.search(said):
        return Fault(True, f"gave the job up: {said}")
    return Fault(False, f"could not run the job: {said}")


def _not_deployed(reason: str, model: str) -> Fault:
    said = essence(reason)
    if _NO_ROOM_NOW.search(reason):
        return Fault(True, f"has no room for the model {model} now: {said}")
    if "describe_checkpoint" in reason:
        return Fault(
            False,
            f"cannot deploy a model on demand, because its ndif and its nnsight do not go together; ask its operator "
            f"to deploy {model} first: {said}",
        )
    if _HUB_AWAY.search(said):
        return Fault(True, f"cannot fetch the model {model} now: {said}")
    return Fault(False, f"does not have the model {model} and cannot deploy it: {said}")


def essence(text: str) -> str:
    """The one line of a server's text that says what went wrong, at most `SHOWN_CHARACTERS` long.

    Of a traceback that is the line that names the exception; the lines after it are advice, those before it are paths
    on the server. A text that leads into a traceback has said it before, and so has one whose traceback is cut off.
    """
    lead, _, rest = text.strip().partition("Traceback (most recent call last)")
    line = _first_line(lead)
    if not line and rest:
        lines = rest.splitlines()
        last_frame = max((number for number, one in enumerate(lines) if one.startswith('  File "')), default=0)
        after = (one.strip() for one in lines[last_frame + 1 :] if one.strip() and not one.startswith("    "))
        line = next(after, "a traceback that is cut off")
    line = line.rstrip(".") or "no reason given"
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1].rstrip() + "…"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def looks_like_a_web_page(text: str) -> bool:
    """Whether an answer is made for a browser; NDIF answers in JSON, whatever happens."""
    return text.lstrip()[:200].lower().startswith(("<!doctype html", "<html", "<?xml", "<head", "<body", "<center"))
