"""The few calls to the API server that the operator makes. Objects stay plain dictionaries."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from urllib.request import getproxies

from heimdall_api.contract import GROUP, LABEL_MANAGED_BY, LABEL_UID, MANAGED_BY, PLURAL, VERSION
from heimdall_operator import metrics
from heimdall_operator.clock import ServerClock

PAGE: Final = 500
"""Objects that one call lists."""
LOG_LINES: Final = 10_000
LOG_BYTES: Final = 4 * 2**20
"""Most of a log that is kept: its end."""
LOG_GONE: Final = (
    b"unable to retrieve container logs for ",
    b"failed to try resolving symlinks in path ",
    b"failed to open log file ",
)
"""How a kubelet begins what it writes, as if that were the log, where it has removed the container or its log."""
LOG_BROKEN_OFF: Final = (b"rpc error: ", b"context cancel")
"""How it begins what it appends, without an end of line, to a log that it could not follow to the end."""
OURS: Final = {LABEL_MANAGED_BY: MANAGED_BY}
"""Labels of the Jobs and pods that the operator made."""
SELECTOR: Final = f"{LABEL_MANAGED_BY}={MANAGED_BY}"
HTTP_ERROR: Final = 400
HTTP_FORBIDDEN: Final = 403
HTTP_NOT_FOUND: Final = 404
HTTP_CONFLICT: Final = 409
HTTP_REFUSED: Final = frozenset({400, 413, 422})
"""What the API server will never take, however often it is asked."""


class ConflictError(Exception):
    """The object is not what it was when it was read, or its name is taken."""


class ForbiddenError(Exception):
    """The operator may not do this; the message says what."""


class LogGoneError(Exception):
    """The node has no log: most likely it has removed the container."""


class RefusedError(Exception):
    """The API server will never take this object; the message says why."""

    def __init__(self, message: str, fields: tuple[str, ...] = ()) -> None:
        """What was refused.

        Args:
            message: The API server's own words.
            fields: Paths of the fields that it names.
        """
        super().__init__(message)
        self.fields = fields


class Kube:
    """Calls to the API server, each bounded in time."""

    def __init__(self, *, timeout_s: float) -> None:
        self.clock = ServerClock()
        self._timeout_s = timeout_s
        self._client: Any = None

    async def __aenter__(self) -> Self:
        from kubernetes.aio import client, config

        if "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config()  # type: ignore[no-untyped-call]
        else:
            await config.load_kube_config()  # type: ignore[no-untyped-call]
        settings = client.Configuration.get_default_copy()
        if not getproxies():
            # Looking for proxies and a .netrc costs two changes of thread, half of the time of a call.
            settings.client_session_kwargs = {"trust_env": False}
        self._client = client.ApiClient(settings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def list_training_runs(self, namespace: str | None = None) -> list[dict[str, Any]]:
        """Every TrainingRun of a namespace, or of all."""
        return await self._list(_path(f"/apis/{GROUP}/{VERSION}", namespace, PLURAL))

    async def list_jobs(self, namespace: str | None = None) -> list[dict[str, Any]]:
        """Every Job that the operator made."""
        return await self._list(_path("/apis/batch/v1", namespace, "jobs"), labelled=True)

    async def list_pods(self, namespace: str | None = None, uid: str | None = None) -> list[dict[str, Any]]:
        """Every pod of those Jobs, or of those of the TrainingRun with a UID."""
        return await self._list(_path("/api/v1", namespace, "pods"), labelled=True, uid=uid)

    async def get_training_run(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A TrainingRun, or None where there is none."""
        return await self._get(_path(f"/apis/{GROUP}/{VERSION}", namespace, PLURAL, name))

    async def get_job(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A Job, or None where there is none."""
        return await self._get(_path("/apis/batch/v1", namespace, "jobs", name))

    async def create_job(self, namespace: str, job: dict[str, Any]) -> dict[str, Any]:
        """Create a Job.

        Raises:
            ConflictError: Its name is taken.
            RefusedError: It is not valid.
        """
        return await self._call("POST", _path("/apis/batch/v1", namespace, "jobs"), job)

    async def create_service(self, namespace: str, service: dict[str, Any]) -> None:
        """Create a Service.

        Raises:
            ConflictError: Its name is taken.
            RefusedError: It is not valid.
        """
        await self._call("POST", _path("/api/v1", namespace, "services"), service)

    async def get_service(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A Service, or None where there is none."""
        return await self._get(_path("/api/v1", namespace, "services", name))

    async def read_log(self, namespace: str, pod: str, container: str, limit: int = LOG_BYTES) -> str:
        """The end of a container's log.

        Args:
            namespace: The pod's.
            pod: Its name.
            container: Of which of its containers.
            limit: Most bytes of it.

        Raises:
            LogGoneError: Its node has no log of it.
        """
        text = b""
        for lines in (LOG_LINES, LOG_LINES // 4, LOG_LINES // 16, LOG_LINES // 64):
            # The server counts bytes from the first of the lines on: of more than these, the end would be missing.
            query = [("container", container), ("tailLines", str(lines)), ("limitBytes", str(2 * limit))]
            text = await self._text(_path("/api/v1", namespace, "pods", pod, "log"), query)
            if len(text) < 2 * limit:
                break
        if is_no_log(text):
            raise LogGoneError(text.decode(errors="replace"))
        return text[-limit:].decode(errors="replace")

    async def follow_log(
        self, namespace: str, pod: str, container: str, heard: bytearray, *, limit: int, timeout_s: float
    ) -> None:
        """Listen to a container's log, from its last lines on, until the container ends.

        Args:
            namespace: The pod's.
            pod: Its name.
            container: Which of its containers.
            heard: Takes what is heard, of which the end is left.
            limit: How many bytes are left at least.
            timeout_s: For how long to listen.
        """
        query = [("container", container), ("follow", "true"), ("tailLines", str(LOG_LINES))]
        path = _path("/api/v1", namespace, "pods", pod, "log")
        response = await self._send("GET", path, query=query, timeout_s=timeout_s)
        try:
            async for piece in response.response.content.iter_any():
                heard += piece
                if len(heard) > 2 * limit:
                    del heard[:-limit]
        finally:
            response.response.close()

    async def list_events(self, namespace: str, kind: str, name: str) -> list[dict[str, Any]]:
        """Events about an object."""
        query = [("fieldSelector", f"involvedObject.kind={kind},involvedObject.name={name}")]
        return [item async for page in self._pages(_path("/api/v1", namespace, "events"), query) for item in page]

    async def event_names(self, namespace: str | None, kind: str) -> set[tuple[str, str]]:
        """Namespace and name of every Event about objects of a kind; page by page, there may be tens of thousands."""
        query = [("fieldSelector", f"involvedObject.kind={kind}")]
        pages = self._pages(_path("/api/v1", namespace, "events"), query)
        return {(item["metadata"]["namespace"], item["metadata"]["name"]) async for page in pages for item in page}

    async def delete_job(self, namespace: str, name: str, uid: str = "") -> None:
        """Delete a Job and its pods, which get their grace period.

        Args:
            namespace: The Job's.
            name: Its name.
            uid: Its UID, where it is known: another one of this name is left alone.

        Raises:
            ConflictError: It is another one.
        """
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        await self._call("DELETE", _path("/apis/batch/v1", namespace, "jobs", name), options, missing_ok=True)

    async def patch_finalizers(
        self, namespace: str, name: str, finalizers: list[str], resource_version: str
    ) -> dict[str, Any]:
        """Replace a TrainingRun's finalizers.

        Raises:
            ConflictError: It changed since it was read.
        """
        patch = {"metadata": {"finalizers": finalizers, "resourceVersion": resource_version}}
        return await self._call("PATCH", _path(f"/apis/{GROUP}/{VERSION}", namespace, PLURAL, name), patch)

    async def patch_status(
        self, namespace: str, name: str, status: dict[str, Any], resource_version: str
    ) -> dict[str, Any]:
        """Merge into a TrainingRun's status.

        Raises:
            ConflictError: It changed since it was read.
        """
        patch = {"metadata": {"resourceVersion": resource_version}, "status": status}
        return await self._call("PATCH", _path(f"/apis/{GROUP}/{VERSION}", namespace, PLURAL, name, "status"), patch)

    async def create_event(self, namespace: str, event: dict[str, Any]) -> None:
        """Create an Event; one of the same name counts as created."""
        try:
            await self._call("POST", _path("/apis/events.k8s.io/v1", namespace, "events"), event)
        except ConflictError:
            return

    async def _list(self, path: str, *, labelled: bool = False, uid: str | None = None) -> list[dict[str, Any]]:
        selector = SELECTOR + (f",{LABEL_UID}={uid}" if uid is not None else "")
        query = [("labelSelector", selector)] if labelled else []
        return [item async for page in self._pages(path, query) for item in page]

    async def _pages(self, path: str, query: list[tuple[str, str]]) -> AsyncIterator[list[dict[str, Any]]]:
        """What a listing holds, page by page: no answer is larger than one page, however many objects there are."""
        onward: list[tuple[str, str]] = []
        while True:
            page = await self._call("GET", path, query=[*query, ("limit", str(PAGE)), *onward])
            yield page["items"]
            if not (token := page["metadata"].get("continue")):
                return
            onward = [("continue", token)]

    async def _get(self, path: str) -> dict[str, Any] | None:
        return await self._call("GET", path, missing_ok=True) or None

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: list[tuple[str, str]] | None = None,
        missing_ok: bool = False,
    ) -> dict[str, Any]:
        response = await self._send(method, path, body, query=query, missing_ok=missing_ok)
        result: dict[str, Any] = {} if response.status == HTTP_NOT_FOUND else json.loads(await response.read())
        return result

    async def _text(self, path: str, query: list[tuple[str, str]] | None = None) -> bytes:
        text: bytes = await (await self._send("GET", path, query=query)).read()
        return text

    async def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: list[tuple[str, str]] | None = None,
        missing_ok: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """An answer whose body is still to be read, unless it tells of an error."""
        from kubernetes.aio.client.exceptions import ApiException

        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": kind}
        request = await self._client.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        asked = self.clock()
        response = await self._client.call_api(*request, _request_timeout=timeout_s or self._timeout_s)
        self.clock.hear(response.headers.get("Date"), asked)
        if method != "GET":
            metrics.WRITES.labels(method, _resource(path)).inc()
        if response.status < HTTP_ERROR:
            return response
        text = await response.read()
        if response.status == HTTP_NOT_FOUND and missing_ok:
            return response
        answer = _answer(text)
        # A creation that is in conflict with something else's (a quota's count, say) is no name that is taken.
        is_conflict = response.status == HTTP_CONFLICT and (method != "POST" or answer.reason == "AlreadyExists")
        if is_conflict or (response.status == HTTP_NOT_FOUND and method == "PATCH"):
            raise ConflictError(answer.message)  # changed, or gone
        if response.status in HTTP_REFUSED:
            raise RefusedError(answer.message, answer.fields)
        if response.status == HTTP_FORBIDDEN:
            raise ForbiddenError(answer.message)
        raise ApiException(status=response.status, reason=answer.message)


def is_no_log(text: bytes) -> bool:
    """Whether it is a kubelet that says, in the log's place, that there is none."""
    return text.startswith(LOG_GONE) and b"\n" not in text


def answer_of(error: Exception) -> int | None:
    """The status of the API server's answer; None where there was none, or an error of this module tells more."""
    from kubernetes.aio.client.exceptions import ApiException

    return error.status if isinstance(error, ApiException) and error.status else None


def _path(base: str, namespace: str | None, *parts: str) -> str:
    scope = [] if namespace is None else ["namespaces", namespace]
    return "/".join([base, *scope, *parts])


def _resource(path: str) -> str:
    """What a path is about, such as `jobs` or `trainingruns/status`."""
    parts = path.partition("/namespaces/")[2].split("/")
    return "/".join([parts[1], *parts[3:]]) if len(parts) > 1 else path


class _Answer(NamedTuple):
    """What the API server says of what it has not done."""

    message: str
    reason: str = ""
    """Its word for what is wrong."""
    fields: tuple[str, ...] = ()
    """The fields that it finds fault with; none where it names none."""


def _answer(text: bytes) -> _Answer:
    """An error's answer; of something in between, such as a proxy, it is not the API server's."""
    try:
        status = json.loads(text)
        causes = (status.get("details") or {}).get("causes") or ()
        fields = dict.fromkeys(str(cause["field"]) for cause in causes if "field" in cause)
        return _Answer(str(status["message"]), str(status.get("reason", "")), tuple(fields))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _Answer(text[:200].decode(errors="replace"))
