"""What is read from the API server in more than one call."""

from __future__ import annotations

import asyncio
from typing import Any

from heimdall_operator.kube import Kube


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


def test_the_names_of_all_events_are_read_page_by_page() -> None:
    kube = Paged(["a", "b"], [], ["c"])

    names = asyncio.run(kube.event_names(None, "TrainingRun"))

    assert names == {("team", "a"), ("team", "b"), ("team", "c")}
    assert [page.get("continue") for page in kube.asked] == [None, "1", "2"]
    assert {page["fieldSelector"] for page in kube.asked} == {"involvedObject.kind=TrainingRun"}
