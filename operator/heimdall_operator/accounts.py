"""Keeps the accounts of attempts' ends, their logs and events, with the MLflow run: behind the looks, a few at a time.

A look waits a moment for the account to be kept: usually it is, and where it lies rides on what the look writes. A
store that is slow or away holds up nothing else. Nothing is remembered that the pods and the status do not tell: an
operator that starts anew takes up what is not kept.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final

import structlog

from heimdall_api.contract import ATTEMPTS_DIR, KIND
from heimdall_api.types import TrainingRunStatus
from heimdall_operator.decide import job_name
from heimdall_operator.kube import HTTP_NOT_FOUND, LOG_BYTES, ForbiddenError, Kube, RefusedError, answer_of
from heimdall_operator.mistakes import mistake
from heimdall_operator.mlflow_gateway import MlflowGateway
from heimdall_operator.observe import CONTAINER, Observed, PodFacts
from heimdall_operator.pauses import doubled_s
from heimdall_operator.store import Key
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.redact import redact

LOGS_BYTES: Final = 32 * 2**20
"""Most that is kept of the logs of one attempt's pods in all."""
AT_ONCE: Final = 4
"""Accounts on their way at one time, and in memory unless their pods go: many attempts may end together."""
ROOM_BYTES: Final = AT_ONCE * LOGS_BYTES
"""Most of all accounts in memory at one time."""
WAIT_S: Final = 10.0
"""How long a look waits for an account to be kept."""
TURN_WAIT_S: Final = 1.0
"""How long a look waits for an account's turn: a store that is well gives many a second."""
READ_WAIT_S: Final = 30.0
"""How long a pod that is to be ended waits for its log to be read."""
RETRY_S: Final = 15.0
RETRY_LIMIT_S: Final = 3600.0
READ_TRIES: Final = 6
"""How often a log is asked for, within eight minutes, before its file says that it could not be read."""
PIECE: Final = 2**16
"""Characters of a log between two of which everything else goes on."""

log = structlog.get_logger()


@dataclass
class _Account:
    """What became of keeping one attempt's account."""

    task: asyncio.Task[None] | None = None
    has_turn: asyncio.Event = field(default_factory=asyncio.Event)
    is_read: asyncio.Event = field(default_factory=asyncio.Event)
    result: str | None = None
    """Where it lies; empty where it never can; None while neither is known."""
    failures: int = 0
    unread: int = 0
    """How often its logs could not be read."""
    due: datetime | None = None
    """When it is tried again."""


class _Room:
    """Memory for accounts: who asks first is let in first."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._first = asyncio.Lock()
        self._has_grown = asyncio.Event()

    @asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        """Wait for as many bytes, and take them."""
        async with self._first:
            while self._free < size:
                self._has_grown.clear()
                await self._has_grown.wait()
            self._free -= size
        try:
            yield
        finally:
            self._free += size
            self._has_grown.set()


class Keeper:
    """Keeps accounts; what is under way is forgotten when it ends."""

    def __init__(
        self,
        kube: Kube,
        mlflow: MlflowGateway,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        wait_s: float = WAIT_S,
        turn_wait_s: float = TURN_WAIT_S,
    ) -> None:
        self._kube = kube
        self._mlflow = mlflow
        self._clock = clock
        self._wait_s, self._turn_wait_s = wait_s, turn_wait_s
        self._is_behind = False
        """Whether a look has waited for a turn in vain since an account was last done with."""
        self._turns, self._uploads = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(AT_ONCE)
        self._room = _Room(ROOM_BYTES)
        self._accounts: dict[Key, dict[tuple[str, int], _Account]] = defaultdict(dict)

    def known(self, key: Key, uid: str, status: TrainingRunStatus) -> dict[int, str | None]:
        """What became of the accounts of a run's attempts, by number, without those that are to be tried (again).

        Args:
            key: The TrainingRun.
            uid: Its UID.
            status: Its status: what it tells of need not be remembered.
        """
        written = {attempt.number for attempt in status.attempts if attempt.logs is not None}
        accounts = self._accounts.pop(key, {})
        left = {name: item for name, item in accounts.items() if name[0] == uid and name[1] not in written}
        if left:
            self._accounts[key] = left
        now = self._clock()
        return {number: item.result for (_, number), item in left.items() if item.due is None or item.due > now}

    async def keep(self, observed: Observed, number: int, *, pods_go: bool) -> str | None:
        """Begin to keep an attempt's account, and wait a moment.

        Args:
            observed: The run.
            number: The attempt's number.
            pods_go: Whether its pods are ended next: then it is waited for until their logs are read.

        Returns:
            Where it lies; empty where it never can; None while that goes on, or until it is tried again.
        """
        key = Key(observed.namespace, observed.name)
        account = self._accounts[key].setdefault((observed.uid, number), _Account())
        if account.task is None:
            account.due = None
            account.has_turn.clear()
            account.is_read.clear()
            account.task = asyncio.create_task(self._keep(account, observed, number, pods_go=pods_go))
            account.task.add_done_callback(lambda _: setattr(account, "task", None))
            if number == observed.status.attempt:
                # Of older ones there may be many, where a new operator takes them up.
                await self._wait(account, account.task, pods_go=pods_go)
        return account.result

    def runs(self) -> list[Key]:
        """The TrainingRuns of which accounts are remembered."""
        return list(self._accounts)

    def forget(self, key: Key) -> None:
        """Forget a TrainingRun that is gone."""
        self._accounts.pop(key, None)

    def close(self) -> None:
        """Let go of what is under way; who starts next takes it up."""
        tasks = [account.task for accounts in self._accounts.values() for account in accounts.values()]
        for task in filter(None, tasks):
            task.cancel()

    async def _wait(self, account: _Account, task: asyncio.Task[None], *, pods_go: bool) -> None:
        if not pods_go and not await self._comes_soon(account):
            return
        done, _ = await asyncio.wait({task}, timeout=self._wait_s)
        if done:
            task.result()
        elif pods_go and not account.is_read.is_set():
            reading = asyncio.create_task(account.is_read.wait())
            await asyncio.wait({task, reading}, timeout=READ_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
            reading.cancel()

    async def _comes_soon(self, account: _Account) -> bool:
        """Whether an account's turn comes in a moment: beside a slow store, those that queue would hold up looks."""
        if self._is_behind:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._turn_wait_s):
                await account.has_turn.wait()
        self._is_behind = not account.has_turn.is_set()
        return not self._is_behind

    async def _keep(self, account: _Account, observed: Observed, number: int, *, pods_go: bool) -> None:
        assert observed.status.run_id is not None  # noqa: S101 - an attempt has a run
        # Pods that stay keep their logs until it is their turn; those that go can't be asked later, nor again.
        insist = not pods_go and account.unread < READ_TRIES - 1
        pods = len(observed.pods_of(number))
        async with nullcontext() if pods_go else self._turns, self._room.of(pods * _limit(pods)):
            account.has_turn.set()
            try:
                files = await self._read_counted(account, observed, number, insist=insist)
                folder = f"{ATTEMPTS_DIR}/{number}"
                async with self._uploads:
                    account.result = await self._mlflow.keep_files(observed.status.run_id, folder, files)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again where that can help
                self._failed(account, number, error)
            finally:
                self._is_behind = False

    async def _read_counted(
        self, account: _Account, observed: Observed, number: int, *, insist: bool
    ) -> dict[str, str]:
        try:
            files = await self._read(observed, number, insist=insist)
        except Exception:
            account.unread += 1
            raise
        account.is_read.set()
        return files

    def _failed(self, account: _Account, number: int, error: Exception) -> None:
        words = f"{type(error).__name__}: {redact(error)}"
        if is_permanent(error):
            account.result = ""
            log.warning("the attempt's log was not kept", attempt=number, error=words)
            return
        delay_s = doubled_s(RETRY_S, account.failures, RETRY_LIMIT_S)
        account.failures += 1
        account.due = self._clock() + timedelta(seconds=delay_s)
        log.warning(
            "keeping the attempt's log failed; trying again",
            attempt=number,
            error=words,
            again_in_s=delay_s,
            exc_info=mistake(error),
        )

    async def _read(self, observed: Observed, number: int, *, insist: bool) -> dict[str, str]:
        """Logs of an attempt's pods and events about them, by file name; what can't be read says so in its file.

        Raises:
            Exception: Something could not be read now, and is insisted on.
        """
        namespace, pods = observed.namespace, observed.pods_of(number)
        about = [("Pod", pod.name) for pod in pods] + [("Job", job_name(observed.name, number)), (KIND, observed.name)]
        files: dict[str, str] = {}
        for pod in pods:
            # One after the other, and within bounds: a group of hundreds would not fit into the operator's memory.
            reading = self._kube.read_log(namespace, pod.name, _telling(pod), _limit(len(pods)))
            files[f"{pod.name}.log"] = await _redacted(await _read_or_say(reading, insist=insist))
        events = [await _read_or_say(self._events(namespace, *each), insist=insist) for each in about]
        return {**files, "events.jsonl": await _redacted("".join(events))}

    async def _events(self, namespace: str, kind: str, name: str) -> str:
        events = await self._kube.list_events(namespace, kind, name)
        return "".join(f"{json.dumps(without_bookkeeping(event), sort_keys=True)}\n" for event in events)


def _telling(pod: PodFacts) -> str:
    """The container whose log tells why a pod ended: a trainer that never ran has none."""
    # A sidecar may end with an error beside a trainer that ran.
    return pod.init_failed if pod.init_failed and pod.running_since is None else CONTAINER


def _limit(pods: int) -> int:
    """Most bytes of each log, of so many."""
    return min(LOG_BYTES, LOGS_BYTES // max(pods, 1))


def without_bookkeeping(event: dict[str, Any]) -> dict[str, Any]:
    """An event without the API server's notes about who wrote which field."""
    metadata = {name: value for name, value in event["metadata"].items() if name != "managedFields"}
    return {**event, "metadata": metadata}


async def _read_or_say(reading: Awaitable[str], *, insist: bool) -> str:
    try:
        return await reading
    except Exception as error:
        is_final = isinstance(error, RefusedError | ForbiddenError) or answer_of(error) == HTTP_NOT_FOUND
        if insist and not is_final:
            raise
        return f"could not be read: {type(error).__name__}: {error}\n"


async def _redacted(text: str) -> str:
    """A long text without secrets, a piece at a time: everything else goes on between two."""
    # Cut between lines: what a cut divides would be recognised in neither half.
    cuts = {text.rfind("\n", 0, about) + 1 for about in range(PIECE, len(text), PIECE)}
    redacted = []
    for begin, end in pairwise(sorted({0, *cuts, len(text)})):
        redacted.append(redact(text[begin:end]))
        await asyncio.sleep(0)
    return "".join(redacted)
