"""Keeps the accounts of attempts' ends, their logs and events, with the MLflow run: behind the looks, a few at a time.

A look waits a moment for the account to be kept: usually it is, and where it lies rides on what the look writes. A
store that is slow or away holds up nothing else. Nothing is remembered that the pods and the status do not tell, and an
operator that starts anew takes up what is not kept: all but the logs of pods that it ends itself. Those are read
before, and held in memory until they are kept or ten minutes are over. A pod that somebody else deletes (a drain, a
preemption) loses its log as soon as it has ended, which may be before that is seen: it is listened to from the moment
on at which it was told to end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Final

import structlog

from heimdall_api.contract import ATTEMPTS_DIR, KIND
from heimdall_api.types import TrainingRunStatus
from heimdall_operator.decide import KEEP_LOGS_LIMIT_S, job_name
from heimdall_operator.kube import (
    HTTP_NOT_FOUND,
    LOG_BROKEN_OFF,
    LOG_BYTES,
    ForbiddenError,
    Kube,
    LogGoneError,
    RefusedError,
    answer_of,
    is_no_log,
)
from heimdall_operator.mistakes import about
from heimdall_operator.mlflow_gateway import MlflowGateway
from heimdall_operator.observe import CONTAINER, Observed, PodFacts
from heimdall_operator.statuses import age_s
from heimdall_operator.store import Key, without_managers
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.pauses import doubled_s
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
READ_LIMIT_S: Final = 480.0
"""For how long a log is asked for again before its file says that it could not be read: pods expire later."""
LISTENED: Final = 16
"""Most pods that are listened to, or whose end was heard and is not kept yet, at one time."""
LISTENED_BYTES: Final = 2**20
"""How much of the end of each is kept where its node has removed it."""
LISTEN_S: Final = 30.0
"""How long beyond its grace period a pod is listened to."""
LISTEN_AGAIN_S: Final = 1.0
"""How soon it is listened to again where the connection broke."""
HEARD_WAIT_S: Final = 5.0
"""How long the last lines of a container that has ended may take."""
PIECE: Final = 2**16
"""Characters of a log between two of which everything else goes on."""

log = structlog.get_logger()


class _Heard:
    """What is heard of a pod that is about to end."""

    def __init__(self, follow: Callable[[bytearray, float], Awaitable[None]], for_s: float) -> None:
        """Begin to listen.

        Args:
            follow: Listens to the log, into a buffer and for some seconds.
            for_s: For how long to listen in all.
        """
        self._follow = follow
        self._until = time.monotonic() + for_s
        self._text = bytearray()
        self.task = asyncio.create_task(self._listen())
        # What nobody asks for is no fault.
        self.task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _listen(self) -> None:
        while True:
            again = bytearray()
            if not self._text:
                self._text = again
            try:
                await self._follow(again, self._until - time.monotonic())
            except Exception as error:
                log.debug("listening to a pod that ends failed", **about(error))
                if _is_final(error) or time.monotonic() + LISTEN_AGAIN_S >= self._until:
                    raise
                await asyncio.sleep(LISTEN_AGAIN_S)
            else:
                return
            finally:
                # From its last lines on: it has what was heard before, too.
                self._text = again or self._text

    async def told(self, limit: int) -> str:
        """The end of it, and whether that was all; empty where nothing was heard."""
        await asyncio.wait({self.task}, timeout=HEARD_WAIT_S)
        text = bytes(self._text)
        is_whole = self.task.done() and not self.task.cancelled() and self.task.exception() is None
        lines, _, last = text.rpartition(b"\n")
        if last.startswith(LOG_BROKEN_OFF):
            text, is_whole = lines + b"\n", False
        if not text.strip() or is_no_log(text):
            return ""
        rest = "" if is_whole else "\nWhat came after this could not be read.\n"
        return text[-limit:].decode(errors="replace") + rest


@dataclass
class _Account:
    """What became of keeping one attempt's account."""

    heard: dict[str, _Heard] = field(default_factory=dict)
    """What was heard of pods that somebody has ended, by name."""
    task: asyncio.Task[None] | None = None
    pods_go: bool = False
    """Whether its pods are ended: what was read of them can't be read again."""
    has_turn: asyncio.Event = field(default_factory=asyncio.Event)
    is_read: asyncio.Event = field(default_factory=asyncio.Event)
    is_late: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether what was read is held because it could not be kept at once."""
    result: str | None = None
    """Where it lies; empty where it never can; None while neither is known."""
    kept: set[str] = field(default_factory=set)
    """Names of files that are kept while others could not be read yet."""
    first: datetime | None = None
    """When it was tried first."""
    failures: int = 0
    due: datetime | None = None
    """When it is tried again."""

    @property
    def pause_s(self) -> float:
        """How long after a failure it is tried again."""
        return doubled_s(RETRY_S, self.failures, RETRY_LIMIT_S)

    def is_known(self, now: datetime) -> bool:
        """Whether nothing is to be done about it now."""
        return self.result is not None or self.task is not None or (self.due is not None and self.due > now)

    def forget_heard(self, but: Collection[str] = ()) -> None:
        """Stop to listen, and forget what was heard: it is kept, or of no use.

        Args:
            but: Names of pods that are listened to on.
        """
        for name in self.heard.keys() - set(but):
            self.heard.pop(name).task.cancel()

    def insists(self, now: datetime) -> bool:
        """Whether what can't be read now is asked for again."""
        return not self.pods_go and age_s(self.first, now) + self.pause_s < READ_LIMIT_S


class _Room:
    """Memory for accounts: who asks first is let in first."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._first = asyncio.Lock()
        self._has_grown = asyncio.Event()

    @asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[Callable[[int], None]]:
        """Wait for as many bytes, and take them; what it yields gives back those that are not needed."""
        async with self._first:
            while self._free < size:
                self._has_grown.clear()
                await self._has_grown.wait()
            self._free -= size

        def shrink(needed: int) -> None:
            nonlocal size
            left = min(size, needed)
            self._free += size - left
            size = left
            self._has_grown.set()

        try:
            yield shrink
        finally:
            shrink(0)


class Keeper:
    """Keeps accounts; what is under way is forgotten when it ends."""

    def __init__(
        self,
        kube: Kube,
        mlflow: MlflowGateway,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        wait_s: float = WAIT_S,
        turn_wait_s: float = TURN_WAIT_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kube = kube
        self._mlflow = mlflow
        self._clock, self._sleep = clock, sleep
        self._wait_s, self._turn_wait_s = wait_s, turn_wait_s
        self._is_behind = False
        """Whether a look has waited in vain since an account was last done with."""
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
        for name in accounts.keys() - left.keys():
            accounts[name].forget_heard()
        if left:
            self._accounts[key] = left
        now = self._clock()
        return {number: item.result for (_, number), item in left.items() if item.is_known(now)}

    def unread(self, key: Key, uid: str) -> frozenset[int]:
        """Attempts of a run whose account queues, is under way or is to be tried again, and counts on their pods."""
        accounts = self._accounts.get(key, {})
        return frozenset(
            number for (of, number), item in accounts.items() if of == uid and item.result is None and not item.pods_go
        )

    def listen(self, observed: Observed) -> None:
        """Listen to the logs of pods that somebody ends: they may be gone before it is seen that these have ended.

        Args:
            observed: The run.
        """
        key = Key(observed.namespace, observed.name)
        for (_, number), account in self._accounts.get(key, {}).items():
            if account.task is None:
                # Of pods that are forgotten, or have been replaced within their attempt, no account is kept any more.
                account.forget_heard(but={pod.name for pod in observed.pods_of(number)})
        known = {attempt.number for attempt in observed.status.attempts if attempt.logs is not None} | {*observed.logs}
        for number in {attempt.number for attempt in observed.status.attempts} - known:
            for pod in observed.pods_of(number):
                if pod.deleting is not None and pod.alive and pod.running_since is not None:
                    self._listen(self._accounts[key].setdefault((observed.uid, number), _Account()), observed, pod)

    def _listen(self, account: _Account, observed: Observed, pod: PodFacts) -> None:
        if pod.name in account.heard:
            return
        everywhere = [item for accounts in self._accounts.values() for item in accounts.values()]
        if sum(len(item.heard) for item in everywhere) >= LISTENED and not _forget_one(everywhere):
            log.debug("too many pods end at one time: one is not listened to", pod=pod.name)
            return

        async def follow(heard: bytearray, for_s: float) -> None:
            await self._kube.follow_log(
                *(observed.namespace, pod.name, CONTAINER, heard), limit=LISTENED_BYTES, timeout_s=for_s
            )

        left_s = max(0.0, -age_s(pod.deleting, self._clock()))
        account.heard[pod.name] = _Heard(follow, left_s + LISTEN_S)

    async def keep(self, observed: Observed, number: int, *, pods_go: bool) -> str | None:
        """Begin to keep an attempt's account, and wait a moment.

        Args:
            observed: The run.
            number: The attempt's number.
            pods_go: Whether its pods are ended next: then it is waited for until their logs are read.

        Returns:
            Where it lies; empty where it never can; None while that goes on, or until it is tried again.
        """
        key, name = Key(observed.namespace, observed.name), (observed.uid, number)
        account = self._accounts[key].setdefault(name, _Account())
        is_told = pods_go and not account.pods_go
        account.pods_go |= pods_go
        if is_told and account.task is not None and not account.has_turn.is_set():
            account.task.cancel()  # its pods can't wait for its turn
            account.task = None
        is_new = account.task is None
        task = account.task or self._begin(account, observed, number)
        # Of older ones there may be many, where a new operator takes them up.
        if pods_go or (is_new and number == observed.status.attempt):
            await self._wait(account, task, pods_go=pods_go)
        return account.result

    def _begin(self, account: _Account, observed: Observed, number: int) -> asyncio.Task[None]:
        def end(task: asyncio.Task[None]) -> None:
            if account.task is task:
                account.task = None

        account.due = None
        for event in (account.has_turn, account.is_read, account.is_late):
            event.clear()
        account.task = asyncio.create_task(self._keep(account, observed, number))
        account.task.add_done_callback(end)
        return account.task

    def runs(self) -> list[Key]:
        """The TrainingRuns of which accounts are remembered."""
        return list(self._accounts)

    def forget(self, key: Key) -> None:
        """Forget a TrainingRun that is gone."""
        for account in self._accounts.pop(key, {}).values():
            account.forget_heard()

    def close(self) -> None:
        """Let go of what is under way; who starts next takes it up."""
        for account in (account for accounts in self._accounts.values() for account in accounts.values()):
            account.forget_heard()
            if account.task is not None:
                account.task.cancel()

    async def _wait(self, account: _Account, task: asyncio.Task[None], *, pods_go: bool) -> None:
        if pods_go:
            await _either(task, account.is_read, READ_WAIT_S)
            is_soon = account.is_read.is_set() and not self._is_behind
        else:
            is_soon = await self._comes_soon(account)
        if is_soon and not await _either(task, account.is_late, self._wait_s):
            self._is_behind = True
        if task.done():
            task.result()

    async def _comes_soon(self, account: _Account) -> bool:
        """Whether an account's turn comes in a moment: beside a slow store, those that queue would hold up looks."""
        if self._is_behind:
            return False
        with suppress(TimeoutError):
            async with asyncio.timeout(self._turn_wait_s):
                await account.has_turn.wait()
        self._is_behind = not account.has_turn.is_set()
        return not self._is_behind

    async def _keep(self, account: _Account, observed: Observed, number: int) -> None:
        pods = len(observed.pods_of(number))
        # Pods that stay keep their logs until it is their turn; those that go can't be asked later, nor again.
        turn = nullcontext() if account.pods_go else self._turns
        async with turn, self._room.of(pods * _limit(pods)) as shrink:
            account.has_turn.set()
            account.first = account.first or self._clock()
            try:
                account.result = await self._read_and_upload(account, observed, number, shrink)
                account.forget_heard()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again where that can help
                self._failed(account, number, error)
            finally:
                self._is_behind = False

    async def _read_and_upload(
        self, account: _Account, observed: Observed, number: int, shrink: Callable[[int], None]
    ) -> str:
        """Keep what can be read: of a group, one pod whose node does not answer keeps no other's log back.

        Raises:
            Exception: Something could not be read now, and is insisted on; or what was read could not be kept.
        """
        while True:
            files: dict[str, str] = {}
            unread = await self._read(account, observed, number, files)
            if unread is not None and account.pods_go:  # since it was asked for
                unread = await self._read(account, observed, number, files)
            if unread is None:
                account.is_read.set()
                shrink(sum(map(sys.getsizeof, files.values())))
            where = await self._upload(account, observed, number, files)
            if unread is None:
                return where
            account.kept |= files.keys()
            if not account.pods_go:
                raise unread

    async def _upload(self, account: _Account, observed: Observed, number: int, files: dict[str, str]) -> str:
        """What can't be read again is held until it is kept, or until pods that stay would have expired."""
        assert observed.status.run_id is not None  # noqa: S101 - an attempt has a run
        begun, tries = self._clock(), 0
        while True:
            try:
                async with self._uploads:
                    return await self._mlflow.keep_files(observed.status.run_id, f"{ATTEMPTS_DIR}/{number}", files)
            except Exception as error:
                left_s = KEEP_LOGS_LIMIT_S - age_s(begun, self._clock())
                if not account.pods_go or left_s <= 0 or is_permanent(error):
                    raise
                pause_s = min(doubled_s(RETRY_S, tries, RETRY_LIMIT_S), left_s)
                _say_trying_again(number, error, pause_s)
            tries += 1
            account.is_late.set()
            self._is_behind = False
            await self._sleep(pause_s)

    def _failed(self, account: _Account, number: int, error: Exception) -> None:
        if is_permanent(error) or account.pods_go:
            # Pods that are still there, and go on being so, are asked again.
            account.result, account.pods_go = "" if is_permanent(error) else None, False
            if account.result is not None:
                account.forget_heard()
            log.warning("the attempt's log was not kept", attempt=number, **about(error))
            return
        pause_s = account.pause_s
        account.failures += 1
        account.due = self._clock() + timedelta(seconds=pause_s)
        _say_trying_again(number, error, pause_s)

    async def _read(
        self, account: _Account, observed: Observed, number: int, files: dict[str, str]
    ) -> Exception | None:
        """Read the logs of an attempt's pods and events about them; what can't be read says so in its file.

        Args:
            account: The attempt's account: of it, files that are kept are not read again.
            observed: The run.
            number: The attempt's number.
            files: Takes them, by file name; those that it has are not read again.

        Returns:
            Why something could not be read now that is insisted on; it is left out.
        """
        namespace, pods = observed.namespace, observed.pods_of(number)
        job = job_name(observed.name, number)
        subjects = [*(("Pod", pod.name) for pod in pods), ("Job", job), (KIND, observed.name)]
        # One after the other, and within bounds: a group of hundreds would not fit into the operator's memory.
        wanted = {f"{pod.name}.log": [partial(self._log, account, namespace, pod, _limit(len(pods)))] for pod in pods}
        wanted["events.jsonl"] = [partial(self._events, namespace, *each) for each in subjects]
        unread: Exception | None = None
        for name in [name for name in wanted if name not in files and name not in account.kept]:
            try:
                text = "".join([await self._read_or_say(account, reading) for reading in wanted[name]])
            except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again where that can help
                unread = unread or error
            else:
                files[name] = await _redacted(text)
        return unread

    async def _log(self, account: _Account, namespace: str, pod: PodFacts, limit: int) -> str:
        """A pod's log, or what was heard of it where its node has that no more."""
        try:
            return await self._kube.read_log(namespace, pod.name, _telling(pod), limit)
        except Exception as error:
            if not isinstance(error, LogGoneError) and not _is_final(error):
                raise
            heard = account.heard.get(pod.name)
            if heard is not None and (words := await heard.told(min(limit, LISTENED_BYTES))):
                return words
            if isinstance(error, LogGoneError) and (pod.deleting or pod.disruption or pod.exceeded_storage):
                return f"could not be read: the node has removed the container ({error})\n"
            raise  # a node whose containers' runtime starts anew says the same, for a moment

    async def _read_or_say(self, account: _Account, reading: Callable[[], Awaitable[str]]) -> str:
        try:
            return await reading()
        except Exception as error:
            if account.insists(self._clock()) and not _is_final(error):
                raise
            return f"could not be read: {type(error).__name__}: {error}\n"

    async def _events(self, namespace: str, kind: str, name: str) -> str:
        events = await self._kube.list_events(namespace, kind, name)
        return "".join(f"{json.dumps(without_managers(event), sort_keys=True)}\n" for event in events)


def _is_final(error: Exception) -> bool:
    """Whether the API server says the same however often it is asked."""
    return isinstance(error, RefusedError | ForbiddenError) or answer_of(error) == HTTP_NOT_FOUND


def _forget_one(accounts: Iterable[_Account]) -> bool:
    """Forget of one pod what was heard, if one has ended and nobody is about to keep its account; whether there was."""
    for account in accounts:
        if account.task is not None:
            continue
        for name, heard in account.heard.items():
            if heard.task.done():
                account.forget_heard(but=account.heard.keys() - {name})
                return True
    return False


def _telling(pod: PodFacts) -> str:
    """The container whose log tells why a pod ended: a trainer that never ran has none."""
    # A sidecar may end with an error beside a trainer that ran.
    return pod.init_failed if pod.init_failed and pod.running_since is None else CONTAINER


def _limit(pods: int) -> int:
    """Most bytes of each log, of so many."""
    return min(LOG_BYTES, LOGS_BYTES // max(pods, 1))


async def _either(task: asyncio.Task[None], event: asyncio.Event, timeout_s: float) -> bool:
    """Wait until a task has ended or something has happened; whether it has, in time."""
    happening = asyncio.create_task(event.wait())
    done, _ = await asyncio.wait({task, happening}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    happening.cancel()
    return bool(done)


def _say_trying_again(number: int, error: Exception, pause_s: float) -> None:
    log.warning("keeping the attempt's log failed; trying again", attempt=number, again_in_s=pause_s, **about(error))


async def _redacted(text: str) -> str:
    """A long text without secrets, a piece at a time: everything else goes on between two."""
    # Cut between lines: what a cut divides would be recognised in neither half.
    cuts = {text.rfind("\n", 0, at) + 1 for at in range(PIECE, len(text), PIECE)}
    redacted = []
    for begin, end in pairwise(sorted({0, *cuts, len(text)})):
        redacted.append(redact(text[begin:end]))
        await asyncio.sleep(0)
    return "".join(redacted)
