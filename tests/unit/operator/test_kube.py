"""What is read from the API server in more than one call."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from kubernetes.aio.client.exceptions import ApiException

from heimdall_operator.kube import ConflictError, Kube


class Paged(Kube):
    """An API server that answers page by page."""

    def __init__(self, *pages: list[str]) -> None:
        self.pages = pages
        self.asked: list[dict[str, str]] = []

    async def _call(self, method: str, path: str, *_: Any, query: Any = None, **__: Any) -> dict[str, Any]:
        self.asked.append(dict(query))
        number = int(dict(query).get("continue", "0"))
        items = [{"metadata": {"namespace": "team", "name": name}} for name in self.pages[number]]
        more = {"continue": str(number + 1)} if number + 1 < len(self.pages) else {}
        return {"metadata": more, "items": items}


class Server(Kube):
    """An API server that gives one answer."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(timeout_s=1.0)
        self.sent: list[Any] = []
        self.headers: dict[str, str] = {}
        self._client = self
        self.status, self._body = status, body

    async def param_serialize(self, *words: Any, body: Any, **_: Any) -> tuple[Any, ...]:
        self.sent.append(body)
        return words

    async def call_api(self, *_: Any, **__: Any) -> Server:
        return self

    async def read(self) -> bytes:
        return json.dumps(self._body).encode()


@pytest.mark.parametrize(
    ("reason", "error"), [("AlreadyExists", ConflictError), ("Conflict", ApiException)], ids=["a name", "a quota"]
)
def test_a_name_that_is_taken_is_told_from_a_quota_that_was_just_counted(reason: str, error: type[Exception]) -> None:
    server = Server(409, {"reason": reason, "message": "Operation cannot be fulfilled on resourcequotas"})
    with pytest.raises(error, match="Operation cannot be fulfilled on resourcequotas"):
        asyncio.run(server.create_job("team", {}))


def test_a_change_that_came_too_late_is_a_conflict_whatever_it_is_called() -> None:
    with pytest.raises(ConflictError):
        asyncio.run(Server(409, {"reason": "Conflict", "message": ""}).patch_status("team", "run", {}, "1"))


@pytest.mark.parametrize("uid", ["", "u1"])
def test_a_job_is_deleted_only_if_it_is_the_one_that_was_seen(uid: str) -> None:
    server = Server(200, {})
    asyncio.run(server.delete_job("team", "run-a1", uid))
    assert server.sent[0].get("preconditions") == ({"uid": uid} if uid else None)


def test_the_names_of_all_events_are_read_page_by_page() -> None:
    kube = Paged(["a", "b"], [], ["c"])

    names = asyncio.run(kube.event_names(None, "TrainingRun"))

    assert names == {("team", "a"), ("team", "b"), ("team", "c")}
    assert [page.get("continue") for page in kube.asked] == [None, "1", "2"]
    assert {page["fieldSelector"] for page in kube.asked} == {"involvedObject.kind=TrainingRun"}


def test_events_about_an_object_are_read_page_by_page() -> None:
    kube = Paged(["a"], ["b"])

    events = asyncio.run(kube.list_events("team", "Job", "run-a1"))

    assert [event["metadata"]["name"] for event in events] == ["a", "b"]
    assert {page["fieldSelector"] for page in kube.asked} == {"involvedObject.kind=Job,involvedObject.name=run-a1"}


def test_everything_is_listed_page_by_page() -> None:
    kube = Paged(["a"], ["b", "c"])

    pods = asyncio.run(kube.list_pods("team"))

    assert [pod["metadata"]["name"] for pod in pods] == ["a", "b", "c"]
    assert [page.get("continue") for page in kube.asked] == [None, "1"]
    assert {page["limit"] for page in kube.asked} == {"500"}
