"""`python3 hack/demo`: the whole way once, from an empty machine to a registered model.

Cluster, images, chart, recordings, `kubectl apply`, and the finished resource. Each step takes up what an earlier call
left, and where that can go no further it says what to take away. With empty caches most of the time goes into building
what can't be pulled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack/cluster"))

from heimdall_cluster import engine, images, kind  # noqa: E402
from heimdall_cluster.paths import BIN, KUBECONFIG, LOGS  # noqa: E402
from heimdall_cluster.steps import (  # noqa: E402
    INTERRUPT_TIMEOUT_S,
    ClusterError,
    read,
    run,
    say,
    see_through,
    step,
    told,
)

NAMESPACE: Final = "heimdall"
RUN: Final = "localizer"
EXAMPLE: Final = "manifests/examples/localizer.yaml"
JOB: Final = "generate-recordings"
FIXED: Final = ("field is immutable", "once the run exists")
"""What the API server says of a Job or a TrainingRun that is there and would have to be another one."""
PENDING: Final = "another operation (install/upgrade/rollback) is in progress"
"""What Helm says of a release that it is at work on, and of one that it was interrupted at."""
ENVIRONMENT: Final = 'eval "$(python3 hack/cluster env)"'
SMALL_IMAGES: Final = ("operator", "mlflow", "postgresql", "minio")
INSTALL_TIMEOUT_S: Final = 420
RECORDINGS_TIMEOUT_S: Final = 300
TRAINING_TIMEOUT_S: Final = 1800
POLL_S: Final = 2.0


def main() -> None:
    """Go the whole way."""
    began = time.monotonic()
    engine.forget_environment()
    with told("hack/demo"):
        _hack("cluster", "up")
        _hack("images", "build", *SMALL_IMAGES, "trainer")
        references = _references()
        _hack("cluster", "load", *(references[name] for name in SMALL_IMAGES))
        _hack("cluster", "load", "--gpu-node", references["trainer"])
        _install()
        _record()
        _train()
        _show()
    say(f"the whole way: {time.monotonic() - began:.0f} s. Look around: {ENVIRONMENT}")


def _hack(tool: str, *arguments: str) -> None:
    process = subprocess.Popen([sys.executable, ROOT / "hack" / tool, *arguments], text=True)
    # It waits in its turn, so this must wait longer.
    code = see_through(process, what=f"hack/{tool}", interrupt_timeout_s=2 * INTERRUPT_TIMEOUT_S)
    if code != 0:
        raise ClusterError(f"python3 hack/{tool} {' '.join(arguments)} failed; see above")


def _references() -> dict[str, str]:
    listed = read([sys.executable, ROOT / "hack/images", "list"])
    if listed is None:
        raise ClusterError("python3 hack/images list failed")
    return dict(line.split() for line in listed.splitlines())  # type: ignore[arg-type]


def _install() -> None:
    command = ["helm", "upgrade", "--install", "heimdall", "charts/heimdall", "--namespace", NAMESPACE]
    with step(" ".join(command)):
        # Only its own namespace: another operator may be at work beside it.
        options = [
            "--set",
            f"operator.namespaces={{{NAMESPACE}}}",
            "--create-namespace",
            "--wait",
            "--timeout",
            f"{INSTALL_TIMEOUT_S}s",
        ]
        _helm([*command[1:4], ROOT / command[4], *command[5:], *options])
        # Images keep their name when they are built anew: a deployment that was there would go on with the old one.
        if _installed_image() != _built_image():
            _kubectl("rollout", "restart", "deployment/heimdall-operator")
            _kubectl("rollout", "status", "deployment/heimdall-operator", "--timeout=120s")


def _helm(arguments: list[str | Path]) -> None:
    """Call Helm; where an earlier call was interrupted in the midst of its work, tell what to do."""
    timeout_s = INSTALL_TIMEOUT_S + 60
    try:
        run([BIN / "helm", *arguments], log=LOGS / "demo.log", env=_environment(), timeout_s=timeout_s)
    except ClusterError as error:
        status = _release_status()
        if PENDING not in str(error) or not status.startswith("pending"):
            raise
        verb = "uninstall" if status == "pending-install" else "rollback"
        raise ClusterError(
            f"the release heimdall is {status}: another Helm is at work on it, or was interrupted. If none is, take "
            f"back what it began, then call again:\n  {ENVIRONMENT}\n  helm -n {NAMESPACE} {verb} heimdall"
        ) from error


def _release_status() -> str:
    command = [BIN / "helm", "status", "heimdall", "--namespace", NAMESPACE, "--output", "json"]
    said = read(command, env=_environment())
    return str(json.loads(said).get("info", {}).get("status", "")) if said else ""


def _installed_image() -> str | None:
    path = "{.items[0].status.containerStatuses[0].imageID}"
    return kind.kubectl(
        "-n", NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/component=operator", "-o", f"jsonpath={path}"
    )


def _built_image() -> str | None:
    return images.inspect("heimdall/operator:dev", "{{.Id}}")


def _record() -> None:
    with step("generating recordings into PostgreSQL and MinIO (manifests/examples/recordings.yaml)"):
        # The trainer's image is on the node with the GPUs alone: 6 GB are not loaded twice.
        selector = {"kubernetes.io/hostname": kind.GPU_NODE}
        patch = {"spec": {"template": {"spec": {"nodeSelector": selector}}}}
        local = ("patch", "--local", "-f", ROOT / "manifests/examples/recordings.yaml", "--type=merge", "-o", "json")
        manifest = _kubectl(*map(str, local), "-p", json.dumps(patch))
        _apply(f"job/{JOB}", "-", text=manifest)
        _wait_for_recordings()


def _wait_for_recordings() -> None:
    """Until the Job is complete. One that has failed never will be, and `kubectl wait` would wait all the same."""
    deadline = time.monotonic() + RECORDINGS_TIMEOUT_S
    while True:
        status: dict[str, Any] = json.loads(_kubectl("get", "job", JOB, "-o", "json")).get("status", {})
        conditions = {item["type"]: item for item in status.get("conditions", []) if item["status"] == "True"}
        if "Complete" in conditions:
            return
        if failed := conditions.get("Failed"):
            why = f"{failed.get('message', 'it failed')} (its log: kubectl -n {NAMESPACE} logs job/{JOB})"
            raise ClusterError(f"the Job {JOB} failed: {why}. {_again(f'job/{JOB}')}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"the Job {JOB} was not done within {RECORDINGS_TIMEOUT_S} s. See what it waits for, then call again:\n"
                f"  {ENVIRONMENT}\n  kubectl -n {NAMESPACE} describe pods -l batch.kubernetes.io/job-name={JOB}"
            )
        time.sleep(POLL_S)


def _apply(what: str, file: str, text: str | None = None) -> None:
    """Apply a file; where an earlier call applied another content that stays as it is, tell what to do."""
    try:
        _kubectl("apply", "-f", file, text=text)
    except ClusterError as error:
        if not any(words in str(error) for words in FIXED):
            raise
        raise ClusterError(f"{what} is there from another version of its file. {_again(what)}") from error


def _again(what: str) -> str:
    """How to begin anew with something that an earlier call left."""
    return f"Take it away, then call again:\n  {ENVIRONMENT}\n  kubectl -n {NAMESPACE} delete {what}"


def _train() -> None:
    say(f"→ kubectl apply -f {EXAMPLE}")
    _apply(f"trainingrun/{RUN}", str(ROOT / EXAMPLE))
    deadline = time.monotonic() + TRAINING_TIMEOUT_S
    told = ""
    while True:
        status: dict[str, Any] = json.loads(_kubectl("get", "trainingrun", RUN, "-o", "json")).get("status", {})
        line = _line(status)
        if line != told:
            say(f"  {line}")
            told = line
        if status.get("phase") == "Succeeded":
            return
        if status.get("phase") == "Failed":
            raise ClusterError(f"the TrainingRun failed: {_message(status, 'Failed')}\n{_again(f'trainingrun/{RUN}')}")
        if time.monotonic() > deadline:
            raise ClusterError(f"the TrainingRun was not done within {TRAINING_TIMEOUT_S} s: {line}")
        time.sleep(POLL_S)


def _line(status: dict[str, Any]) -> str:
    parts = [status.get("phase", "new")]
    if progress := status.get("progress"):
        done = f"epoch {progress['epoch']}/{progress['epochs']}, step {progress['step']}"
        parts.append(f"{done}, {progress['percent']} %")
    if best := status.get("bestMetric"):
        parts.append(f"best {best['name']} {best['value']}")
    if status.get("phase") != "Running" and (message := _message(status, "Complete")):
        parts.append(message)
    return " · ".join(parts)


def _message(status: dict[str, Any], kind_of: str) -> str:
    return next((item["message"] for item in status.get("conditions", []) if item["type"] == kind_of), "")


def _show() -> None:
    print(_kubectl("get", "trainingrun", RUN), end="")
    print(_kubectl("describe", "trainingrun", RUN).partition("Status:")[2].rstrip())


def _kubectl(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(
        [kind.kubectl_path(), "-n", NAMESPACE, *arguments],
        env=_environment(),
        capture_output=True,
        text=True,
        input=text,
        timeout=TRAINING_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise ClusterError(f"kubectl {' '.join(arguments[:3])} failed: {done.stderr.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, **engine.environment(), "KUBECONFIG": str(KUBECONFIG)}


if __name__ == "__main__":
    main()
