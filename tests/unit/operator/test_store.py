"""The store: takes in what is newer, and tells whether there is reason to look."""

from __future__ import annotations

import pytest

from heimdall_api.contract import LABEL_RUN
from heimdall_operator.store import Key, Store

KEY = Key("team", "one")


def state(version: int, uid: str = "a", name: str = "one") -> dict[str, object]:
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
    assert store.get(KEY) is written


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
