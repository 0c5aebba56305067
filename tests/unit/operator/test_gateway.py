"""The operator's conversation with MLflow: what is refused for good, and promotions that wait for each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST
from mlflow.store.entities import PagedList

from heimdall_operator import mlflow_gateway
from heimdall_operator.mlflow_gateway import MlflowGateway, MlflowSilentError
from heimdall_tracking import registry, runs
from heimdall_tracking.registry import Registration
from tests.unit.operator.builders import UID, observed, run, spec
from tests.unit.operator.fakes import KEY, World, controller, look


@pytest.fixture
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Lets each registration wait so long for another one to begin; the list's last one is the most there were."""
    most = [0]
    under_way = 0
    changed = threading.Condition()

    def wait_for_another(patience_s: float) -> list[int]:
        def register(client: Any, facts: Any, wanted: Any) -> Registration:
            nonlocal under_way
            with changed:
                under_way += 1
                most.append(max(most[-1], under_way))
                changed.notify_all()
                changed.wait_for(lambda: most[-1] > 1, patience_s)
                under_way -= 1
            return Registration(name=wanted.model, version="1", message="Registered.")

        monkeypatch.setattr(registry, "register", register)
        return most

    monkeypatch.setattr(runs, "read_facts", lambda client, run_id: run())
    return wait_for_another


async def register_at_once(*models: str) -> None:
    gateway = MlflowGateway("http://127.0.0.1:9")
    try:
        await asyncio.gather(
            *(gateway.register(observed(spec=spec(registration={"model": model}), run=run())) for model in models)
        )
    finally:
        gateway.close()


def test_registrations_of_one_model_wait_for_each_other(most_at_once: Callable[[float], list[int]]) -> None:
    most = most_at_once(0.05)
    asyncio.run(register_at_once("localizer", "localizer", "localizer"))

    assert most == [0, 1, 1, 1]


def test_registrations_of_different_models_do_not(most_at_once: Callable[[float], list[int]]) -> None:
    most = most_at_once(30)
    asyncio.run(register_at_once("one", "other"))

    assert most[-1] == 2


def test_a_server_that_hangs_is_asked_by_one_look_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all looks to wait for it, no other run would be looked after."""
    now, asked = 100.0, 0
    hangs = True
    monkeypatch.setattr(mlflow_gateway, "time", SimpleNamespace(monotonic=lambda: now))

    def read_facts(client: Any, run_id: str) -> Any:
        nonlocal now, asked
        asked += 1
        if hangs:
            now += mlflow_gateway.SILENT_AFTER_S
            raise ConnectionError("timed out")
        return run()

    monkeypatch.setattr(runs, "read_facts", read_facts)
    gateway = MlflowGateway("http://127.0.0.1:9")

    async def scenario() -> None:
        nonlocal now, hangs
        with pytest.raises(ConnectionError):
            await gateway._read("r1")
        for _ in range(5):
            with pytest.raises(MlflowSilentError):
                await gateway._read("r1")
        assert asked == 1

        now += mlflow_gateway.PAUSE_S
        answers = await asyncio.gather(*(gateway._read("r1") for _ in range(5)), return_exceptions=True)
        assert sorted(type(each).__name__ for each in answers) == ["ConnectionError", *["MlflowSilentError"] * 4]

        now += mlflow_gateway.PAUSE_S
        hangs = False
        await gateway._read("r1")
        await asyncio.gather(*(gateway._read("r1") for _ in range(5)))

    try:
        asyncio.run(scenario())
    finally:
        gateway.close()


class SlowStore(BaseHTTPRequestHandler):
    """An MLflow server whose object store takes its time, and whose search never answers."""

    uploading, released = threading.Event(), threading.Event()
    kept: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        if "get-by-name" in self.path:
            self.released.wait()
        run = {"run_id": "r1", "artifact_uri": "mlflow-artifacts:/1/r1/artifacts", "status": "RUNNING"}
        self._answer(json.dumps({"run": {"info": run, "data": {}}}).encode())

    def do_PUT(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        self.uploading.set()
        self.released.wait()
        self.kept.append(text)
        self._answer(b"{}")

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # who asked may have given up
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def test_an_upload_may_take_longer_than_what_looks_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    async def scenario(uri: str) -> str:
        gateway = MlflowGateway(uri)
        try:
            upload = asyncio.create_task(gateway.keep_files("r1", "attempts/1", {"x.log": "last words"}))
            await asyncio.to_thread(SlowStore.uploading.wait)
            with pytest.raises(MlflowException, match="timeout"):
                await gateway.active_facts({"r": "lab"})
            SlowStore.released.set()
            return await upload
        finally:
            SlowStore.released.set()
            gateway.close()

    with ThreadingHTTPServer(("127.0.0.1", 0), SlowStore) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert asyncio.run(scenario(f"http://127.0.0.1:{server.server_port}")) == "runs:/r1/attempts/1"
        finally:
            server.shutdown()
    assert SlowStore.kept == [b"last words"]


def test_a_store_that_hangs_does_not_keep_mlflow_from_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now, uploads = 100.0, 0
    monkeypatch.setattr(mlflow_gateway, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(runs, "read_facts", lambda client, run_id: run())

    def hang(*_: object) -> None:
        nonlocal now, uploads
        uploads += 1
        now += mlflow_gateway.SILENT_AFTER_S
        raise ConnectionError("timed out")

    monkeypatch.setattr(mlflow_gateway, "_log_text", hang)
    gateway = MlflowGateway("http://127.0.0.1:9")

    async def scenario() -> None:
        with pytest.raises(ConnectionError):
            await gateway.keep_files("r1", "attempts/1", {"x.log": ""})
        with pytest.raises(MlflowSilentError):
            await gateway.keep_files("r2", "attempts/1", {"x.log": ""})
        assert uploads == 1
        assert (await gateway._read("r1")).run_id == "r1"

    try:
        asyncio.run(scenario())
    finally:
        gateway.close()


class AskedMlflow:
    """A client of a server on which some runs train; it tells what was asked."""

    def __init__(self, run_ids: list[str]) -> None:
        self.asked: list[str] = []
        self._run_ids = run_ids

    def get_experiment_by_name(self, name: str) -> Any:
        self.asked.append(f"experiment {name}")
        return SimpleNamespace(experiment_id=name)

    def search_runs(
        self, experiment_ids: list[str], *, filter_string: str, max_results: int, page_token: str | None
    ) -> Any:
        self.asked.append(f"runs of {', '.join(experiment_ids)}")
        first = int(page_token or 0)
        page = self._run_ids[first : first + max_results]
        token = str(first + max_results) if self._run_ids[first + max_results :] else None
        return PagedList([self._run(run_id) for run_id in page], token)

    def _run(self, run_id: str) -> Any:
        info = SimpleNamespace(run_id=run_id, experiment_id="1", status="RUNNING")
        return SimpleNamespace(info=info, data=SimpleNamespace(tags={}, metrics={}))


def test_the_progress_of_many_runs_is_read_in_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(mlflow_gateway, "time", SimpleNamespace(monotonic=lambda: now))
    run_ids = [f"r{number}" for number in range(50)]
    server = AskedMlflow(run_ids)
    gateway = MlflowGateway("http://127.0.0.1:9")
    gateway._client = server  # type: ignore[assignment]

    async def scenario() -> list[list[str]]:
        nonlocal now
        operator = controller(World())
        operator.progress._mlflow = gateway
        for number, run_id in enumerate(run_ids):
            metadata = {"namespace": "team", "name": run_id, "uid": run_id, "resourceVersion": "1"}
            spec = {"tracking": {"experiment": f"lab{number % 3}"}}
            operator.store.put({"metadata": metadata, "spec": spec, "status": {"phase": "Running", "runID": run_id}})
        asked = []
        for after_s in (0, 10, mlflow_gateway.EXPERIMENT_AGE_S):
            now += after_s
            server.asked = []
            await operator.progress.poll()
            asked.append(sorted(server.asked))
        assert len(operator.queue) == len(run_ids), "each was told of"
        return asked

    try:
        first, second, later = asyncio.run(scenario())
    finally:
        gateway.close()

    assert first == ["experiment lab0", "experiment lab1", "experiment lab2", "runs of lab0, lab1, lab2"]
    assert second == ["runs of lab0, lab1, lab2"]
    assert later == first, "somebody may have renamed them"


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own use
def test_new_runs_go_into_the_experiment_that_has_the_name_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(mlflow_gateway, "time", SimpleNamespace(monotonic=lambda: now))
    gateway = MlflowGateway(f"sqlite:///{tmp_path}/mlflow.db")
    made: list[str] = []

    async def scenario() -> str:
        nonlocal now
        for after_s in (0, 40, 40):  # what is known gets no younger by being used
            now += after_s
            new = observed(uid=f"made at {now}", spec=spec(tracking={"experiment": "lab"}), is_fresh=True)
            made.append((await gateway.ensure_run(new)).experiment_id)
            if after_s == 0:
                gateway._connect().rename_experiment(made[0], "lab, the old one")
        return str(gateway._connect().get_experiment_by_name("lab").experiment_id)

    try:
        fresh = asyncio.run(scenario())
    finally:
        gateway.close()
    assert made == [made[0], made[0], fresh]
    assert fresh != made[0]


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own use
def test_only_a_run_that_runs_is_ended(tmp_path: Path) -> None:
    gateway = MlflowGateway(f"sqlite:///{tmp_path}/mlflow.db")
    orphan = observed(spec=spec())

    async def scenario() -> tuple[str, str]:
        await gateway.end_running(orphan, "KILLED")  # none was made
        made = await gateway.ensure_run(orphan)
        await gateway.end_running(orphan, "KILLED")
        killed = (await gateway._read(made.run_id)).status
        gateway._connect().set_terminated(made.run_id, "FINISHED")
        await gateway.end_running(orphan, "KILLED")
        return killed, (await gateway._read(made.run_id)).status

    try:
        assert asyncio.run(scenario()) == ("KILLED", "FINISHED")
    finally:
        gateway.close()


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own use
def test_a_run_is_followed_whatever_its_experiment_is_called_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that has just started knows the experiment by its first name alone."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mine = observed(spec=spec(tracking={"experiment": "lab"}))
    before, after = MlflowGateway(uri), MlflowGateway(uri)
    asked: list[str] = []
    read = runs.read_facts

    def counted(client: Any, run_id: str) -> Any:
        asked.append(run_id)
        return read(client, run_id)

    monkeypatch.setattr(runs, "read_facts", counted)

    async def scenario() -> None:
        made = await before.ensure_run(mine)
        before._connect().rename_experiment(made.experiment_id, "lab, the old one")
        before._connect().create_experiment("lab")
        for _ in range(3):
            assert (await after.active_facts({made.run_id: "lab"})).keys() == {made.run_id}
        assert asked == [made.run_id], "afterwards it is in the one query for all"
        before._connect().delete_run(made.run_id)
        for _ in range(3):
            assert await after.active_facts({made.run_id: "lab"}) == {}
        assert len(asked) == 1

    try:
        asyncio.run(scenario())
    finally:
        before.close()
        after.close()


def test_an_overdue_deletion_lets_go_when_mlflow_was_asked_not_when_it_was_not() -> None:
    world = World()
    world.apply({})
    why: list[Exception] = [MlflowSilentError("not asked"), ConnectionError("away")]

    async def scenario() -> None:
        await look(world)
        world.jobs.clear()
        world.ask_for_deletion("2026-01-01T00:00:00Z")
        operator = controller(world)
        await operator.refresh()

        async def end_run(observed: Any, status: Any, *, fence: bool) -> Any:
            raise why.pop(0)

        operator._mlflow.end_run = end_run  # type: ignore[method-assign]
        with pytest.raises(MlflowSilentError):
            await operator.reconcile(KEY)
        assert world.run is not None
        assert world.run["metadata"]["finalizers"]
        await operator.reconcile(KEY)

    asyncio.run(scenario())
    assert not why
    assert not (world.run or {"metadata": {}})["metadata"].get("finalizers")


def test_a_run_that_mlflow_refuses_for_good_fails_with_its_words() -> None:
    world = World()
    world.apply({"tracking": {"tags": {"team": "rf"}}})

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()

        async def refuse(observed: Any) -> Any:
            raise MlflowException("Invalid value for tag 'team'", INVALID_PARAMETER_VALUE)

        operator._mlflow.ensure_run = refuse  # type: ignore[method-assign]
        await operator.reconcile(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    failed = next(item for item in world.run["status"]["conditions"] if item["type"] == "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "InvalidConfiguration")
    assert "Invalid value for tag 'team'" in failed["message"]
    assert UID not in world.mlflow_runs


def test_what_may_come_right_is_no_refusal() -> None:
    """As when somebody deletes the experiment in the same moment: the next look makes it anew."""
    world = World()
    world.apply({})

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()
        original = operator._mlflow.ensure_run

        async def gone(observed: Any) -> Any:
            raise MlflowException("No such experiment", RESOURCE_DOES_NOT_EXIST)

        operator._mlflow.ensure_run = gone  # type: ignore[method-assign]
        with pytest.raises(MlflowException):
            await operator.reconcile(KEY)
        operator._mlflow.ensure_run = original  # type: ignore[method-assign]
        await operator.reconcile(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    assert world.run["status"]["runID"] == "r1"
