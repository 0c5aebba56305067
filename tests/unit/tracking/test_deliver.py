"""What a process had to leave, kept on disk and delivered another day: on a real store, interrupted at every step."""

from __future__ import annotations

import json
import math
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.models import Model
from structlog.testing import capture_logs

from heimdall_api.contract import TAG_ATTEMPT, TAG_CHECKPOINTS, Checkpoint, parse_checkpoints
from heimdall_api.types import RegistrationSpec
from heimdall_tracking import MLflowTracker, TrackingError, TrackingSettings, queue, undelivered
from heimdall_tracking import deliver as module
from heimdall_tracking.checkpoints import sha256_of
from heimdall_tracking.deliver import deliver
from heimdall_tracking.errors import AwayError
from heimdall_tracking.queue import MetricQueue
from heimdall_tracking.undelivered import LeftCheckpoint, lock
from tests.unit.tracking.fakes import PATIENCE_S, AnsweredError

pytestmark = [
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy, not ours.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]

BATCH, STEPS = 100, 250
"""More than two batches."""


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (queue, module):
        monkeypatch.setattr(where, "BATCH", BATCH)


CALLS = (
    *("log_batch", "set_tag", "log_artifact", "log_artifacts", "set_terminated"),
    *("search_logged_models", "create_logged_model"),
)


def away(*args: object, **more: object) -> None:
    raise ConnectionError("http://alice:canary@mlflow does not answer")


class Killed(BaseException):
    """Ends a delivery at once, as SIGKILL would."""


def training_without_server(tracker: MLflowTracker, patch: pytest.MonkeyPatch, folder: Path) -> str:
    """Everything that a training logs, while nothing can be delivered; the run's ID."""
    run_id = tracker.run_id
    (folder / "plots").mkdir()
    (folder / "drawn.txt").write_text("plot")
    (folder / "plots/loss.txt").symlink_to("../drawn.txt")
    (folder / "step-7.ckpt").write_bytes(b"weights")
    (folder / "saved").mkdir()
    Model(run_id=run_id).save(str(folder / "saved/MLmodel"))
    with patch.context() as inside:
        for call in CALLS:
            inside.setattr(tracker.client, call, away)
        inside.setitem(MetricQueue.__init__.__kwdefaults__, "memory_points", 10)
        for step in range(STEPS):
            tracker.log_metrics({"loss": step, "nan": math.nan}, step)
        tracker.log_params({"lr": 0.1, "token": "canary"})
        tracker.put_tag("endpoint", "s3://key:canary@minio")
        tracker.log_artifact(folder / "plots/loss.txt", "single")
        tracker.log_artifacts_dir(folder / "plots", "all")
        tracker.log_model(folder / "saved")
        tracker.leave_checkpoint(
            LeftCheckpoint(file=folder / "step-7.ckpt", checkpoint=checkpoint(7), keep=1, mode="min")
        )
        assert not tracker.close(0.02)
        tracker.leave_registration(RegistrationSpec(model=f"model-{run_id}", aliases=["candidate"]))
        assert not tracker.end_run_in_time("FAILED", PATIENCE_S)
    return run_id


def checkpoint(step: int, metric: float | None = None) -> Checkpoint:
    return Checkpoint(
        step=step, path=f"checkpoints/step-{step}.ckpt", sha256="", size=7, time=datetime.now(UTC), metric=metric
    )


def is_whole(client: MlflowClient, run_id: str, tmp_path: Path) -> None:
    run = client.get_run(run_id)
    for metric in ("loss", "nan"):
        steps = [point.step for point in client.get_metric_history(run_id, metric)]
        assert sorted(steps) == list(range(STEPS)), "each once"
    assert run.data.params == {"lr": "0.1", "token": "***"}
    assert run.data.tags["endpoint"] == "s3://***@minio"
    found = [item.path for part in ("single", "all") for item in client.list_artifacts(run_id, part)]
    assert found == ["single/loss.txt", "all/loss.txt"]
    (listed,) = parse_checkpoints(run.data.tags[TAG_CHECKPOINTS])
    assert (listed.step, listed.last) == (7, True)
    file = Path(client.download_artifacts(run_id, listed.path, str(tmp_path)))
    assert listed.sha256 == sha256_of(file)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (str(model.status), model.source_run_id) == ("READY", run_id)
    (version,) = client.search_model_versions(f"run_id = '{run_id}'")
    assert (version.name, str(version.version)) == (f"model-{run_id}", "1")
    assert str(client.get_model_version_by_alias(version.name, "candidate").version) == "1"
    assert run.info.status == "FAILED"


def left_by(tracker: MLflowTracker) -> Path:
    assert tracker.undelivered is not None
    return tracker.undelivered.folder


def test_what_is_left_is_told_in_one_sentence_with_the_command_and_delivered_by_it(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.keep_undelivered_in(tmp_path / "out put/undelivered")
    with capture_logs() as lines:
        run_id = training_without_server(tracker, monkeypatch, tmp_path)
    folder = left_by(tracker)

    assert folder == tmp_path / "out put/undelivered"
    assert lines[-1]["event"] == (
        f"500 metric points, 2 calls for tags and parameters, 2 artifacts, 1 model, 1 checkpoint, the registration "
        f"as model-{run_id} and the end (FAILED) of run {run_id} could not be delivered to "
        f"{tracker.settings.tracking_uri} and are kept on disk; deliver them when it answers again with: "
        f"heimdall-train deliver {shlex.quote(str(folder))}"
    )
    for file in folder.rglob("*"):
        assert file.is_dir() or b"canary" not in file.read_bytes(), f"{file} holds a secret"

    told = deliver(folder, tracker.settings)
    assert "500 metric points" in told
    assert f"Registered as version 1 of model-{run_id} with alias candidate" in told
    is_whole(client, run_id, tmp_path)
    assert not folder.exists()


@pytest.mark.parametrize("killed_at", range(14))
def test_a_delivery_killed_at_any_step_and_begun_again_delivers_everything_once(
    killed_at: int,
    tracker: MLflowTracker,
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after the server has taken something, and before the manifest says so."""
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    folder = left_by(tracker)
    writes = iter(range(1000))
    write = module.Manifest.write

    def killed_there(manifest: Any, place: Path) -> None:
        if next(writes) == killed_at:
            raise Killed
        write(manifest, place)

    with monkeypatch.context() as patch:
        patch.setattr(module.Manifest, "write", killed_there)
        with pytest.raises(Killed):
            deliver(folder, tracker.settings)

    deliver(folder, tracker.settings)
    is_whole(client, run_id, tmp_path)
    assert not folder.exists()


def test_without_settings_the_server_that_the_folder_names_is_asked(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    deliver(left_by(tracker))

    is_whole(client, run_id, tmp_path)


def test_a_server_that_is_still_away_takes_nothing_from_the_folder(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    folder = left_by(tracker)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        with pytest.raises(AwayError, match=r"nothing is lost: run `heimdall-train deliver") as caught:
            deliver(folder, tracker.settings)
    assert "canary" not in str(caught.value)

    deliver(folder, tracker.settings)
    is_whole(client, run_id, tmp_path)


def test_what_a_killed_process_spilled_can_be_delivered(
    tracker: MLflowTracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never came to its end: the folder is as the spill made it, and the last line may be half of one."""
    from heimdall_tracking.points import Point, to_lines
    from heimdall_tracking.undelivered import UndeliveredFolder

    folder = UndeliveredFolder(Path("left"), run_id=tracker.run_id, tracking_uri=tracker.settings.tracking_uri)
    file = folder.open() / "metrics-00000001.jsonl"
    file.write_bytes(to_lines([Point("loss", float(step), step, step) for step in range(10)])[:-5])
    with pytest.raises(TrackingError, match="is in use"):
        deliver("left", tracker.settings)
    folder._release()  # as its end does

    deliver("left", tracker.settings)

    assert [point.step for point in client.get_metric_history(tracker.run_id, "loss")] == list(range(9))


def test_a_step_that_no_mlflow_takes_does_not_keep_the_others(tracker: MLflowTracker, client: MlflowClient) -> None:
    """As an older version has put it away."""
    from heimdall_tracking.points import Point, to_lines
    from heimdall_tracking.undelivered import UndeliveredFolder

    folder = UndeliveredFolder(Path("left"), run_id=tracker.run_id, tracking_uri=tracker.settings.tracking_uri)
    points = [Point("loss", 1.0, step, 1) for step in (1, 2**63, 2)]
    (folder.open() / "metrics-00000001.jsonl").write_bytes(to_lines(points))
    folder._release()

    deliver("left", tracker.settings)

    assert [point.step for point in client.get_metric_history(tracker.run_id, "loss")] == [1, 2]
    assert not Path("left").exists()


def test_an_overtaken_attempt_delivers_nothing(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.keep_undelivered_in(tmp_path / "undelivered", attempt=1)
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    client.set_tag(run_id, TAG_ATTEMPT, "2")

    with pytest.raises(TrackingError, match=r"attempt 2 has taken over.*remove"):
        deliver(left_by(tracker), tracker.settings)
    assert client.get_run(run_id).data.metrics == {}


def test_a_checkpoint_comes_before_those_that_were_made_since(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    newer = checkpoint(9, 0.5).model_copy(update={"last": True})
    client.set_tag(run_id, TAG_CHECKPOINTS, json.dumps([newer.model_dump(mode="json")]))
    folder = left_by(tracker)

    deliver(folder, tracker.settings)

    listed = parse_checkpoints(client.get_run(run_id).data.tags[TAG_CHECKPOINTS])
    assert [(item.step, item.last) for item in listed] == [(9, True)]


def test_an_artifact_that_is_gone_holds_nothing_up_and_is_named(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_without_server(tracker, monkeypatch, tmp_path)
    folder = left_by(tracker)
    (folder / "artifacts/0001/loss.txt").unlink()

    with pytest.raises(TrackingError, match=r"all but this .*loss\.txt \(it was removed\)"):
        deliver(folder, tracker.settings)

    assert parse_checkpoints(client.get_run(tracker.run_id).data.tags[TAG_CHECKPOINTS])
    assert folder.exists()


def test_what_no_proxy_lets_through_holds_nothing_up_and_is_told_with_the_remedy(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    folder = left_by(tracker)

    def too_large(*_: object) -> None:
        raise AnsweredError(413)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", too_large)
        told = r"all but this .*loss\.txt \(413 .*raise the largest body.*step-7\.ckpt \(413 .*deliver again"
        with pytest.raises(TrackingError, match=told):
            deliver(folder, tracker.settings)
    assert client.list_artifacts(run_id, "all")
    deliver(folder, tracker.settings)
    assert parse_checkpoints(client.get_run(run_id).data.tags[TAG_CHECKPOINTS])
    assert not folder.exists()


def test_a_deleted_run_is_told_with_a_remedy(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    client.delete_run(run_id)

    with pytest.raises(TrackingError, match="was deleted: restore it"):
        deliver(left_by(tracker), tracker.settings)


def test_a_run_that_was_ended_meanwhile_keeps_its_status(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = training_without_server(tracker, monkeypatch, tmp_path)
    client.set_terminated(run_id, "FINISHED")

    deliver(left_by(tracker), tracker.settings)

    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_folder_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(TrackingError, match=r"has no manifest\.json"):
        deliver(tmp_path)
    with pytest.raises(TrackingError, match="is no folder"):
        deliver(tmp_path / "nowhere")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    for content in (b"{}", b"\xff"):
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(TrackingError, match=r"manifest\.json can't be read"):
            deliver(tmp_path)


def test_a_model_that_somebody_else_registers_is_delivered_and_told_of(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved").mkdir()
    Model(run_id=tracker.run_id).save(str(tmp_path / "saved/MLmodel"))
    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "search_logged_models", away)
        tracker.log_model(tmp_path / "saved")
        assert not tracker.close(0.02)
    told = deliver(left_by(tracker), tracker.settings)
    assert "its model is in the run, and not registered by this" in told
    assert [str(model.status) for model in client.search_logged_models([tracker.experiment_id])] == ["READY"]


def test_a_registration_without_its_model_is_named_and_kept(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.leave_registration(RegistrationSpec(model=f"model-{tracker.run_id}"))
    folder = left_by(tracker)
    with pytest.raises(TrackingError, match=r"all but this .* the registration as model-.*no logged model"):
        deliver(folder, tracker.settings)
    assert folder.exists()


def test_two_deliveries_at_once_are_one(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_without_server(tracker, monkeypatch, tmp_path)
    with lock(left_by(tracker)), pytest.raises(TrackingError, match="is in use"):
        deliver(left_by(tracker), tracker.settings)


def test_an_address_kept_without_its_password_is_asked_for(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_without_server(tracker, monkeypatch, tmp_path)
    manifest = left_by(tracker) / "manifest.json"
    kept = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**kept, "tracking_uri": "https://***@mlflow"}))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI"):
        deliver(left_by(tracker))


def test_where_everything_arrives_nothing_is_left(tracker: MLflowTracker, tmp_path: Path) -> None:
    tracker.keep_undelivered_in(tmp_path / "undelivered")
    tracker.log_metrics({"loss": 1}, 1)

    assert tracker.end_run(timeout_s=PATIENCE_S)
    assert tracker.undelivered is None
    assert not (tmp_path / "undelivered").exists()


def test_what_another_process_left_is_not_written_over(
    tracker: MLflowTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "undelivered").mkdir()
    tracker.keep_undelivered_in(tmp_path / "undelivered")
    training_without_server(tracker, monkeypatch, tmp_path)

    assert left_by(tracker) == tmp_path / "undelivered-2"


def test_the_setting_chooses_the_folder(
    own: MlflowClient, store_uri: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrackingSettings(tracking_uri=store_uri, experiment_name=name, undelivered_dir=tmp_path / "kept")
    tracker = MLflowTracker(settings, own)
    run_id = tracker.start_run("run")
    tracker.keep_undelivered_in(tmp_path / "output")
    training_without_server(tracker, monkeypatch, tmp_path)

    assert left_by(tracker) == tmp_path / "kept" / run_id


def test_a_kill_while_files_are_put_away_loses_none_of_them(
    tracker: MLflowTracker, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies may take longer than the process has left: the manifest names the files as they lie before."""

    def kill(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(undelivered, "_take", kill)
    tracker.keep_undelivered_in(tmp_path / "undelivered")
    with pytest.raises(Killed):
        training_without_server(tracker, monkeypatch, tmp_path)

    manifest = json.loads((tmp_path / "undelivered/manifest.json").read_text())
    assert [item["path"] for item in manifest["checkpoints"]] == [str(tmp_path / "step-7.ckpt")]
    assert {item["path"] for item in manifest["uploads"]} == {
        str(tmp_path / "plots/loss.txt"),
        str(tmp_path / "plots"),
        str(tmp_path / "saved"),
    }
    assert manifest["calls"]
    tracker.discard()


def test_a_folder_whose_manifest_can_not_be_written_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = undelivered.UndeliveredFolder(tmp_path / "undelivered", run_id="run", tracking_uri="sqlite://")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(undelivered.Manifest, "write", full)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left"):
                folder.open()
    assert list(tmp_path.iterdir()) == []
    assert folder.open() == tmp_path / "undelivered"
    folder.discard()
