"""The store: takes in what is newer, and tells whether there is reason to look."""

from __future__ import annotations

from typing import Any

import pytest

from heimdall_api.contract import LABEL_RUN
from heimdall_operator.store import Key, Store
from tests.unit.operator.fakes import owner_of

KEY = Key("team", "one")


def state(version: int, uid: str = "a", name: str = "one") -> dict[str, Any]:
    labels = {LABEL_RUN: "one"}
    return {
        "metadata": {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version), "labels": labels}
    }


def test_an_echo_of_an_own_write_gives_no_reason_to_look() -> None:
    store = Store()
    written = state(7)
    store.put(written)
    store.put_child("Job", written)

    assert store.put(state(7)) is None
    assert store.put_child("Job", state(7)) is None
    assert store.get(KEY) == written


def test_who_set_which_field_is_not_kept() -> None:
    store, item = Store(), state(7)
    item["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    store.put(item)
    store.put_child("Job", item)

    assert [store.get(KEY), *store.children("Job", KEY)] == [state(7), state(7)]
    assert item["metadata"]["managedFields"], "it is somebody else's, too"


def test_versions_are_compared_as_numbers() -> None:
    store = Store()
    store.put(state(9))

    assert store.put(state(10)) == KEY


@pytest.mark.parametrize("take", [Store.put, lambda store, item: store.put_child("Pod", item)], ids=["run", "pod"])
def test_what_is_older_is_left_out_and_a_namesake_is_taken_in(take: object) -> None:
    assert callable(take)
    store = Store()

    assert take(store, state(7)) == KEY
    assert take(store, state(6)) is None
    assert take(store, state(3, uid="b")) == KEY, "another object of the name: versions are not compared"


def test_a_listing_that_began_before_a_deletion_brings_no_older_object_back() -> None:
    store = Store()
    newer, older = state(9, uid="b"), state(5, uid="a")
    newer["metadata"]["creationTimestamp"] = "2026-11-01T12:00:05Z"
    older["metadata"]["creationTimestamp"] = "2026-11-01T12:00:00Z"
    store.put(newer)

    assert store.put(older) is None
    assert store.get(KEY) == newer


@pytest.mark.parametrize("was_known", [True, False], ids=["there before", "come meanwhile"])
def test_what_has_gone_while_it_was_listed_does_not_come_back(was_known: bool) -> None:
    """As a pod that was preempted: its ghost would be waited for until the next listing."""
    store, pod = Store(), state(3, uid="pod", name="one-a1-x")
    before = store.snapshot()
    if was_known:
        store.put(state(2))
        store.put_child("Pod", pod)
        before = store.snapshot()
    listed = ([state(2)], [], [pod])
    store.drop_child("Pod", pod)
    store.drop(KEY, "a")
    store.replace(*listed, before)

    assert (store.get(KEY), store.children("Pod", KEY)) == (None, [])
    store.replace(*listed, store.snapshot())
    assert (store.get(KEY), store.children("Pod", KEY)) == (listed[0][0], [pod]), "only of that listing"


def test_what_has_come_while_it_was_listed_stays() -> None:
    store = Store()
    store.put(state(2))
    store.put_child("Job", state(2, uid="first", name="one-a1"))
    before = store.snapshot()
    store.drop(KEY, "a")
    store.put(state(5, uid="b"))
    store.put_child("Job", state(6, uid="second", name="one-a1"))
    store.replace([], [], [], before)

    assert [item and item["metadata"]["uid"] for item in (store.get(KEY), *store.children("Job", KEY))] == [
        "b",
        "second",
    ]


def test_the_end_of_another_of_its_name_is_not_its_end() -> None:
    store = Store()
    store.put(state(5, uid="b"))
    store.put_child("Job", state(6, uid="second", name="one-a1"))
    store.drop(KEY, "a")
    store.drop_child("Job", state(4, uid="first", name="one-a1"))

    assert store.get(KEY) == state(5, uid="b")
    assert store.children("Job", KEY) == [state(6, uid="second", name="one-a1")]


def pod_of(job: str, name: str, **status: Any) -> dict[str, Any]:
    made = state(3, uid=name, name=name)
    made["metadata"]["labels"]["batch.kubernetes.io/job-name"] = job
    return {**made, "status": status}


ENDED = [{"name": "trainer", "state": {"terminated": {"exitCode": 143}}}]


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        ({"phase": "Failed"}, True),
        ({"phase": "Running", "containerStatuses": ENDED}, True),
        ({"phase": "Running", "containerStatuses": [*ENDED, {"name": "side", "state": {"running": {}}}]}, False),
        ({"phase": "Pending"}, False),
    ],
    ids=["failed", "ended, and gone before it could say so", "still at work", "never started"],
)
def test_how_a_pod_ended_is_known_as_long_as_its_job_is_there(status: dict[str, Any], kept: bool) -> None:
    store = Store()
    job = state(1, uid="job", name="one-a1")
    store.put_child("Job", job)
    gone = pod_of("one-a1", "one-a1-x", **status)
    store.put_child("Pod", gone)
    store.drop_child("Pod", gone)

    assert [item["status"]["phase"] for item in store.children("Pod", KEY)] == (["Failed"] if kept else [])
    store.replace([], [job], [], store.snapshot())
    assert len(store.children("Pod", KEY)) == kept, "a listing knows nothing of it"
    store.drop_child("Job", job)
    assert store.children("Pod", KEY) == []


def test_a_pod_that_had_succeeded_before_it_was_deleted_has_succeeded() -> None:
    store = Store()
    store.put_child("Job", state(1, uid="job", name="one-a1"))
    done = pod_of("one-a1", "one-a1-x", phase="Succeeded")
    store.put_child("Pod", done)
    deleted = pod_of("one-a1", "one-a1-x", phase="Succeeded")
    deleted["metadata"]["deletionTimestamp"] = "2026-11-01T12:00:00Z"
    store.drop_child("Pod", deleted)

    (kept,) = store.children("Pod", KEY)
    assert kept["status"]["phase"] == "Succeeded"
    assert "deletionTimestamp" not in kept["metadata"]


def test_the_end_of_a_pod_of_another_job_of_that_name_is_not_kept() -> None:
    store = Store()
    store.put_child("Job", state(6, uid="second", name="one-a1"))
    for uid in ("first", "second"):
        gone = pod_of("one-a1", f"one-a1-{uid}", phase="Failed")
        gone["metadata"]["ownerReferences"] = [owner_of(state(1, uid=uid, name="one-a1"))]
        store.put_child("Pod", gone)
        store.drop_child("Pod", gone)

    assert [item["metadata"]["name"] for item in store.children("Pod", KEY)] == ["one-a1-second"]


def test_pods_that_go_after_their_job_leave_nothing_behind() -> None:
    store = Store()
    gone = pod_of("one-a1", "one-a1-x", phase="Failed")
    store.put_child("Pod", gone)
    store.drop_child("Pod", gone)

    assert store.children("Pod", KEY) == []
    assert not store._ended
