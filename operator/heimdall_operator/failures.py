"""Judging an attempt's end: from pod status, exit code and last words to a reason of the fixed list, and its policy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from heimdall_api.contract import MESSAGE_LIMIT, ExitCode, Reason
from heimdall_operator.observe import PodFacts
from heimdall_tracking.redact import redact


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Why an attempt ended, or must end."""

    reason: Reason
    message: str
    exit_code: int | None = None
    ended: datetime | None = None
    """When its pod ended; None where it still has to be ended."""
    pod: str | None = None
    """The pod that tells of it: of a group, the one to look at. None where none does."""
    node: str | None = None
    """Where that pod was."""


FREE: Final = frozenset({Reason.PREEMPTED, Reason.NODE_LOST, Reason.SUSPENDED, Reason.FENCED})
"""Ends that nobody's training is to blame for: another attempt follows and costs no retry."""

FINAL: Final = frozenset(
    {
        Reason.USER_ERROR,
        Reason.INVALID_CONFIGURATION,
        Reason.CUDA_OUT_OF_MEMORY,
        Reason.HOST_OUT_OF_MEMORY,
        Reason.STORAGE_EXCEEDED,
        Reason.IMAGE_PULL,
        Reason.UNSCHEDULABLE,
        Reason.POD_NOT_STARTED,
        Reason.DEADLINE_EXCEEDED,
    }
)
"""Ends that would come back: not tried again."""

_BY_EXIT_CODE: Final = {
    ExitCode.CONFIGURATION: (Reason.INVALID_CONFIGURATION, "The trainer refused the configuration (exit code 78)."),
    ExitCode.FENCED: (Reason.FENCED, "A newer attempt had taken over."),
    ExitCode.CUDA_OUT_OF_MEMORY: (
        Reason.CUDA_OUT_OF_MEMORY,
        "The GPU's memory does not suffice: lower spec.training.batchSize, or use a larger GPU.",
    ),
    ExitCode.UNDELIVERED: (
        Reason.TRACKING_UNAVAILABLE,
        "Training ended, but its results could not be delivered to MLflow in time.",
    ),
    ExitCode.SIGTERM: (Reason.PREEMPTED, "The pod was asked to end (SIGTERM) and made a checkpoint first."),
    137: (Reason.KILLED, "The container was killed (SIGKILL), not for memory: by the node or by hand."),
}
# No word of an image's name or of an address: those are in quotes, or begin within a path.
_NAMES: Final = re.compile(r'"[^"]*"')
_IMAGE_GONE: Final = re.compile(
    r"(?i)(?<![\w./:@-])"
    r"(?:not found|(?:manifest|name) unknown|denied|unauthorized|forbidden|insufficient_scope|40[13])\b"
)
"""How containerd and CRI-O tell that a registry has answered, and does not have an image or does not give it out."""
_UNREACHABLE: Final = re.compile(
    r"(?i)(?<![\w./:@-])"
    r"(?:time-?out|timed out|deadline exceeded|no such host|server misbehaving|temporary failure|connection refused"
    r"|reset by peer|broken pipe|unreachable|no route to host|EOF|too ?many ?requests|429|5\d\d)\b"
)
"""How they tell that the network, or a registry that is not well, is behind it."""
BEGINNING: Final = 320
"""Characters at the beginning of a message that are never cut: what is known of an end stands there."""
_NEVER_STARTS: Final = ("executable file not found", "no such file or directory", "permission denied")
_LOST_NODE: Final = frozenset({"DeletionByTaintManager", "DeletionByPodGC", "NodeLost", "NodeShutdown"})


def judge_group(pods: Sequence[PodFacts], workers: int) -> Outcome | None:
    """Why the attempt of a group ended: one worker that fails ends the others too.

    Args:
        pods: The newest pod of each worker.
        workers: How many there should be.

    Returns:
        What ended the first worker, in the order of causes; success where all succeeded; None while any worker may
        still be training.
    """
    judged = [(pod, outcome) for pod in pods if (outcome := judge_pod(pod)) is not None]
    if len(judged) < len(pods) or not judged:
        return None
    failed = [(pod, outcome) for pod, outcome in judged if outcome.reason != Reason.COMPLETED]
    if not failed:
        return judged[0][1] if len(judged) == workers else None
    _, cause = min(failed, key=lambda item: (_rank(*item), item[1].ended))
    return replace(cause, ended=max(outcome.ended for _, outcome in failed if outcome.ended is not None))


def _rank(pod: PodFacts, outcome: Outcome) -> int:
    """What comes from outside comes first; what one worker's end did to the others comes last."""
    if pod.disruption is not None or outcome.reason in (Reason.HOST_OUT_OF_MEMORY, Reason.KILLED):
        return 0
    return 2 if outcome.reason in (Reason.PREEMPTED, Reason.WORKER_LOST) else 1


def judge_pod(pod: PodFacts) -> Outcome | None:
    """Why a pod's attempt ended.

    Args:
        pod: The attempt's pod.

    Returns:
        The outcome, or None while the pod may still be training.
    """
    if pod.alive:
        return None
    reason, message = _reason(pod)
    return Outcome(
        reason=reason,
        message=shorten(message),
        exit_code=pod.exit_code,
        ended=pod.finished or pod.created,
        pod=pod.name,
        node=pod.node,
    )


def _reason(pod: PodFacts) -> tuple[Reason, str]:
    if pod.killed_for_memory:
        text = (
            "The pod used more memory than spec.resources.memory allows (OOMKilled): raise it in a new TrainingRun, "
            "or lower spec.training.batchSize or dataLoaderWorkers."
        )
        return Reason.HOST_OUT_OF_MEMORY, with_last_words(text, pod)
    if pod.exceeded_storage:
        text = (
            f"{pod.exceeded_storage.strip()} Raise the limit (ephemeral-storage of the container, sizeLimit of the "
            "volume) in spec.podTemplate of a new TrainingRun, or write less."
        )
        return Reason.STORAGE_EXCEEDED, with_last_words(text, pod)
    if pod.start_error:
        # A driver that does not answer is another node's no trouble; a command that is not in the image is in none.
        final = any(words in pod.start_error for words in _NEVER_STARTS)
        text = f"The container could not be started: {pod.start_error}"
        return (Reason.POD_NOT_STARTED if final else Reason.UNKNOWN), text
    if pod.disruption is not None:
        lost = pod.disruption in _LOST_NODE
        text = f"The node {pod.node} was lost" if lost else "Kubernetes took the pod's place for something else"
        reason = Reason.NODE_LOST if lost else Reason.PREEMPTED
        return reason, with_last_words(f"{text} ({pod.disruption}).", pod)
    if pod.lost_track:
        return Reason.NODE_LOST, f"The node {pod.node} went away, and does not know what became of the container."
    if pod.exit_code is None:
        return _never_ran(pod)
    if pod.exit_code == ExitCode.SUCCESS:
        # Many trainers exit 0 on SIGTERM: while the pod was being deleted that is no sign of success.
        if pod.deleting:
            return Reason.PREEMPTED, "The pod was deleted while it was training."
        return Reason.COMPLETED, "Training finished."
    return _from_last_words(pod)


def _never_ran(pod: PodFacts) -> tuple[Reason, str]:
    if pod.deleting:
        return Reason.PREEMPTED, "The pod was deleted before its container ran."
    return Reason.UNKNOWN, redact(pod.init_error) or f"The pod ended before its container ran. {pod.refusal}".strip()


def _from_last_words(pod: PodFacts) -> tuple[Reason, str]:
    said_reason, said = parse_last_words(pod.last_words)
    if said_reason == Reason.COMPLETED:
        said_reason = None  # written before it failed all the same: its exit code is what counts
    if pod.exit_code in _BY_EXIT_CODE:
        reason, default = _BY_EXIT_CODE[pod.exit_code]
        if pod.exit_code == 137 and pod.deleting:  # noqa: PLR2004 - 128 + SIGKILL
            text = "The pod was deleted and did not end within its grace period."
            return Reason.PREEMPTED, with_last_words(text, pod)
        return reason, said if said_reason is not None else with_last_words(default, pod)
    words = said or "It left no last words: see the pod's log."
    if said_reason is not None:
        return said_reason, words
    return Reason.UNKNOWN, f"The trainer ended with exit code {pod.exit_code}. {words}"


def is_image_gone(message: str) -> bool:
    """Whether an image is not there or may not be pulled: waiting alone does not mend that.

    Args:
        message: Why it could not be pulled, in the container runtime's words.
    """
    words = _NAMES.sub("", message)
    return _IMAGE_GONE.search(words) is not None and _UNREACHABLE.search(words) is None


def with_last_words(text: str, pod: PodFacts) -> str:
    """What is known of a pod's end, and behind it what the pod itself left: its message, or the last lines of its log.

    Args:
        text: What is known.
        pod: The pod.
    """
    # A node that does not know the container any more says so in their place.
    _, said = parse_last_words("" if pod.lost_track else pod.last_words)
    return text if said in text else f"{text} {said}"


def parse_last_words(text: str) -> tuple[Reason | None, str]:
    """Read a termination message.

    Args:
        text: JSON `{"reason", "message"}` by the contract, or the last lines of a log.

    Returns:
        The reason, or None where the text is not by the contract, and the message.
    """
    try:
        data = json.loads(text)
        # JSON can hold halves of surrogate pairs (of a file name, say), which no status can.
        return Reason(data["reason"]), redact(data["message"]).encode(errors="replace").decode()
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, redact(text.strip())


def shorten(message: str) -> str:
    """A message cut to what a status carries: what is known stands at its beginning, and of a log the end matters."""
    if len(message) <= MESSAGE_LIMIT:
        return message
    cut = " … "
    return f"{message[:BEGINNING]}{cut}{message[BEGINNING + len(cut) - MESSAGE_LIMIT :]}"
