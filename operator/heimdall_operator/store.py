"""The last seen state of every TrainingRun, Job and pod, fed by watches: what observing reads instead of asking."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

from heimdall_api.contract import LABEL_RUN
from heimdall_operator.kube import ConflictError

Manifest = Mapping[str, Any]
"""A Kubernetes object as the API server gives it."""
ChildKind = Literal["Job", "Pod"]
JOB_NAME: Final = "batch.kubernetes.io/job-name"
ENDED: Final = frozenset({"Succeeded", "Failed"})
"""Phases of a pod whose containers have ended."""


class Key(NamedTuple):
    """Names a TrainingRun."""

    namespace: str
    name: str

    def __str__(self) -> str:
        """As people write it."""
        return f"{self.namespace}/{self.name}"


Name = tuple[str, Key, str]
"""Kind, TrainingRun and name of something that is known."""


class Store:
    """A cache: it may be behind the API server, never ahead. Every write is conditional on what was seen here."""

    def __init__(self) -> None:
        self._resources: dict[Key, Manifest] = {}
        self._children: dict[ChildKind, dict[Key, dict[str, Manifest]]] = {
            "Job": defaultdict(dict),
            "Pod": defaultdict(dict),
        }
        self._ended: dict[Key, dict[str, Manifest]] = defaultdict(dict)
        """Pods that are gone, as they ended: an attempt is judged by all of its pods. Kept as long as their Job is."""
        self._gone: set[str] | None = None
        """UIDs of what has gone since a listing began that is still under way."""

    def known(self) -> list[Key]:
        """Every TrainingRun that is known."""
        return list(self._resources)

    def get(self, key: Key) -> Manifest | None:
        """A TrainingRun, or None where there is none."""
        return self._resources.get(key)

    def current(self, key: Key, uid: str, version: str) -> Manifest:
        """A TrainingRun that is still as it was observed.

        A watch may bring a newer state in the middle of a look: what was decided on the older one must not be written
        over it.

        Raises:
            ConflictError: It is gone, or has changed.
        """
        resource = self._resources.get(key)
        if resource is None or resource["metadata"]["uid"] != uid:
            raise ConflictError("the TrainingRun is gone")
        if resource["metadata"]["resourceVersion"] != version:
            raise ConflictError("the TrainingRun has changed since it was looked at")
        return resource

    def children(self, kind: ChildKind, key: Key) -> list[Manifest]:
        """Jobs or pods of a TrainingRun; of pods also those that have ended and are gone."""
        there = list(self._children[kind].get(key, {}).values())
        return [*self._ended.get(key, {}).values(), *there] if kind == "Pod" else there

    def put(self, resource: Manifest) -> Key | None:
        """Take in a TrainingRun; None where it brings nothing new, as a watch's echo of an own write."""
        key = Key(resource["metadata"]["namespace"], resource["metadata"]["name"])
        if not _is_news(resource, self._resources.get(key)):
            return None
        self._resources[key] = without_managers(resource)
        return key

    def drop(self, key: Key, uid: str) -> None:
        """Forget a TrainingRun, unless another of its name is there; its Jobs and pods are forgotten as they go."""
        self._note_gone(uid)
        known = self._resources.get(key)
        if known is not None and known["metadata"]["uid"] == uid:
            del self._resources[key]

    def _note_gone(self, uid: str) -> None:
        if self._gone is not None:
            self._gone.add(uid)

    def put_child(self, kind: ChildKind, child: Manifest) -> Key | None:
        """Take in a Job or pod; None where it belongs to no TrainingRun, or brings nothing new."""
        key = run_of(child)
        if key is None:
            return None
        named = self._children[kind][key]
        if not _is_news(child, named.get(child["metadata"]["name"])):
            return None
        named[child["metadata"]["name"]] = without_managers(child)
        return key

    def drop_child(self, kind: ChildKind, child: Manifest) -> Key | None:
        """Forget a Job or pod, unless another of its name is there."""
        key, metadata = run_of(child), child["metadata"]
        if key is None:
            return None
        self._note_gone(metadata["uid"])
        children = self._children[kind].get(key, {})
        known = children.get(metadata["name"])
        if known is not None and known["metadata"]["uid"] != metadata["uid"]:
            return key
        children.pop(metadata["name"], None)
        if not children:
            self._children[kind].pop(key, None)
        # One that had ended before it was deleted did not end because of that.
        has_ended = known is not None and (known.get("status") or {}).get("phase") in ENDED
        self._keep_or_forget(kind, key, known if known is not None and has_ended else child)
        return key

    def _keep_or_forget(self, kind: ChildKind, key: Key, child: Manifest) -> None:
        """Keep how a pod has ended, unless its Job is gone; forget that with the Job."""
        metadata, status = child["metadata"], child.get("status") or {}
        job = self._children["Job"].get(key, {}).get(job_of(child) or "")
        if kind == "Pod" and job is not None and _is_of(child, job) and _has_ended(status):
            self._ended[key][metadata["name"]] = {**child, "status": _at_the_end(status)}
        elif kind == "Job" and key in self._ended:
            left = {name: pod for name, pod in self._ended[key].items() if job_of(pod) != metadata["name"]}
            self._ended[key] = left
            if not left:
                del self._ended[key]

    def snapshot(self) -> dict[Name, str]:
        """What is known now, with its UID: a listing that begins now may say that it is gone."""
        self._gone = set()
        runs: dict[Name, str] = {
            ("TrainingRun", key, key.name): item["metadata"]["uid"] for key, item in self._resources.items()
        }
        return runs | {
            (kind, key, name): child["metadata"]["uid"]
            for kind, by_run in self._children.items()
            for key, named in by_run.items()
            for name, child in named.items()
        }

    def replace(
        self,
        resources: Iterable[Manifest],
        jobs: Iterable[Manifest],
        pods: Iterable[Manifest],
        before: Mapping[Name, str],
    ) -> None:
        """Take over a fresh listing: what was missed by the watches is mended, what they brought meanwhile stays.

        Args:
            resources: Every TrainingRun.
            jobs: Every Job of ours.
            pods: Every pod of ours.
            before: What was known when the listing began.
        """
        gone, self._gone = self._gone or set(), None
        fresh = {Key(item["metadata"]["namespace"], item["metadata"]["name"]): item for item in resources}
        for (kind, key, _), uid in before.items():
            if kind == "TrainingRun" and key not in fresh:
                self.drop(key, uid)
        for item in fresh.values():
            if item["metadata"]["uid"] not in gone:
                self.put(item)
        self._replace_children("Job", jobs, before, gone)
        self._replace_children("Pod", pods, before, gone)

    def _replace_children(
        self, kind: ChildKind, fresh: Iterable[Manifest], before: Mapping[Name, str], gone: Collection[str]
    ) -> None:
        listed = {(run_of(item), item["metadata"]["name"]): item for item in fresh}
        known = [child for children in list(self._children[kind].values()) for child in children.values()]
        for child in known:
            key, metadata = run_of(child), child["metadata"]
            was_there = key is not None and before.get((kind, key, metadata["name"])) == metadata["uid"]
            if was_there and (key, metadata["name"]) not in listed:
                self.drop_child(kind, child)
        for child in listed.values():
            if child["metadata"]["uid"] not in gone:
                self.put_child(kind, child)


def without_managers(item: Manifest) -> Manifest:
    """An object without who has set which of its fields: nobody here asks, and it is as large as all the rest."""
    metadata = {name: value for name, value in item["metadata"].items() if name != "managedFields"}
    return {**item, "metadata": metadata}


def run_of(child: Manifest) -> Key | None:
    """The TrainingRun that a Job or pod was made for."""
    metadata = child["metadata"]
    name = (metadata.get("labels") or {}).get(LABEL_RUN)
    return Key(metadata["namespace"], name) if name else None


def job_of(pod: Manifest) -> str | None:
    """The Job that a pod belongs to."""
    name: str | None = (pod["metadata"].get("labels") or {}).get(JOB_NAME)
    return name


def owner_uid(manifest: Manifest) -> str | None:
    """UID of the object that controls another."""
    owners = manifest["metadata"].get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), None)


def _is_of(pod: Manifest, job: Manifest) -> bool:
    """Whether a pod with a Job's name is not of one of before."""
    return owner_uid(pod) in (None, job["metadata"]["uid"])


def _has_ended(status: Manifest) -> bool:
    """Whether a pod's containers were seen to end."""
    if status.get("phase") in ENDED:
        return True
    states = [item.get("state") or {} for item in status.get("containerStatuses") or ()]
    return bool(states) and all("terminated" in state for state in states)


def _at_the_end(status: Manifest) -> Manifest:
    """A status whose phase may still be Running: what is gone does not run."""
    return status if status.get("phase") in ENDED else {**status, "phase": "Failed"}


def _is_news(state: Manifest, known: Manifest | None) -> bool:
    """Whether a state is newer than the known one of its name (versions are comparable since Kubernetes 1.35)."""
    if known is None:
        return True
    if state["metadata"].get("uid") != known["metadata"].get("uid"):
        # A listing that began before a deletion may tell of the one before.
        return bool(state["metadata"].get("creationTimestamp", "") >= known["metadata"].get("creationTimestamp", ""))
    return int(state["metadata"].get("resourceVersion", 0)) > int(known["metadata"].get("resourceVersion", 0))
