"""What the documents tell people to type is there: targets, flags, files, links, resources, values, fields."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from heimdall_operator.overrides import refusals
from heimdall_operator.settings import OperatorSettings
from heimdall_trainer.cli import _parser
from heimdall_trainer.config import parse
from tests.unit.documents.documents import (
    CHART,
    DOCUMENTS,
    NOT_RUN,
    ROOT,
    Block,
    Command,
    blocks,
    code_in_text,
    commands,
    commands_in_text,
    is_field,
    is_value,
    values,
)

LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
PLACE = re.compile(r"^(?:\./)?(?:manifests|charts|hack|images|tests|docs)/[\w./-]+$")
PLACEHOLDER = re.compile(r"^[A-Z][A-Z-]*$|^NAME-aN$")
VERBS = {
    *("get", "describe", "apply", "wait", "create", "label", "delete", "patch", "logs", "exec", "rollout", "explain"),
    *("port-forward", "scale", "top", "annotate", "cordon"),
}
KINDS = {
    "configmap": {"configmap", "cm"},
    "crd": {"crd"},
    "deployment": {"deployment", "deployments", "deploy"},
    "endpoints": {"endpoints"},
    "job": {"job", "jobs"},
    "namespace": {"namespace", "ns"},
    "node": {"node", "nodes"},
    "pod": {"pod", "pods"},
    "pvc": {"pvc"},
    "secret": {"secret", "secrets"},
    "service": {"service", "svc"},
    "serviceaccount": {"serviceaccount"},
    "statefulset": {"statefulset"},
    "storageclass": {"storageclass"},
    "trainingrun": {"trainingrun", "trainingruns", "tr"},
    "workload": {"workloads"},
}
WITH_VALUE = {
    *("-n", "-l", "-o", "-f", "-p", "-c", "-U", "--namespace", "--timeout", "--patch-file", "--set", "--revision"),
}
"""Flags whose value is the next word."""
HELM_FLAGS = {
    *("-n", "-f", "--wait", "--create-namespace", "--reset-then-reuse-values", "--reuse-values", "--set", "--timeout"),
    *("-o", "--reset-values", "--revision", "--take-ownership", "--install"),
    "-",  # standard input, as a file of values
}
MOVED = ("tests/e2e/chart/test_external.py", 'section(EXTERNAL, "Move what is there")')
RESTORE = "pg_restore -h db.example.com -U ADMINISTRATOR --exit-on-error --no-owner"
RUN_BY = {
    # A command, with … for what is another word there: where a test runs it, and words by which it is found there.
    "make test": (".ci/run", "make test"),  # by continuous integration
    "make venv": ("Makefile", "test: needs-test venv"),  # by `make test`
    "heimdall-train data generate --sessions 12": ("tests/integration/test_export.py", "heimdall_train(*generate"),
    "heimdall-train run -f manifests/examples/localizer.yaml": (
        *("tests/integration/test_export.py", "heimdall_train(*run_it"),
    ),
    "heimdall-train run -f line.yaml": ("tests/unit/documents/test_own_model.py", '["run", "-f", "line.yaml"]'),
    "heimdall-train validate -f line.yaml": ("tests/unit/documents/test_own_model.py", '["validate", "-f"'),
    "heimdall-train data inspect": ("tests/unit/documents/test_localizer_pages.py", '"data", "inspect"'),
    "heimdall-train plot --model … -o plots": ("tests/integration/test_export.py", "looks = {"),
    "heimdall-train deliver …": ("tests/integration/test_undelivered.py", '"deliver", str(folder)'),
    "python3 hack/images list": ("tests/unit/hack/test_images.py", '"hack/images", "list"'),
    "kubectl create namespace heimdall": ("tests/e2e/conftest.py", '"kubectl", "create", "namespace"'),
    "kubectl label namespace heimdall pod-security.kubernetes.io/enforce=restricted": (
        *("tests/e2e/conftest.py", '"kubectl", "label", "namespace", where.namespace, RESTRICTED'),
    ),
    "kubectl apply -f …": ("tests/e2e/test_localizer.py", 'kubectl("apply", "-f"'),
    "kubectl wait --for=condition=Complete trainingrun/localizer": (
        *("tests/e2e/test_localizer.py", '"wait", "--for=condition=Complete", "trainingrun/localizer"'),
    ),
    "kubectl wait --for=condition=Complete job/generate-recordings": (
        *("tests/e2e/conftest.py", '"wait", "--for=condition=Complete", "job/generate-recordings"'),
    ),
    "kubectl get trainingruns": ("tests/e2e/test_resource.py", '"get", "tr"'),
    "kubectl get trainingrun localizer -o jsonpath={.status.modelURI}": (
        *("tests/e2e/test_localizer.py", '"get", "trainingrun", "localizer", "-o", "jsonpath={.status.modelURI}"'),
    ),
    "kubectl describe trainingrun localizer": ("tests/e2e/test_resource.py", '"describe", "trainingrun"'),
    "kubectl explain trainingrun.spec": ("tests/e2e/test_resource.py", '"explain", "trainingrun.spec"'),
    "kubectl get secret heimdall-tracking -o jsonpath={.data.admin-password}": (
        *("tests/e2e/chart/test_runbooks.py", 'section(PASSWORDS, "A password is lost, refused, or to be changed")'),
    ),
    "kubectl exec -i heimdall-database-0 -- psql -U postgres -v ON_ERROR_STOP=1": (
        *("tests/e2e/chart/test_runbooks.py", 'section(PASSWORDS, "Give everybody the passwords of the Secrets")'),
    ),
    "helm install heimdall charts/heimdall --wait": (
        "tests/e2e/conftest.py",
        '"install", "heimdall", "charts/heimdall"',
    ),
    "helm upgrade heimdall charts/heimdall --reset-then-reuse-values --wait": (
        *("tests/e2e/chart/test_again.py", 'kept = ("--reset-then-reuse-values", *more)'),
    ),
    "helm upgrade heimdall charts/heimdall --reset-then-reuse-values": (
        *("tests/e2e/chart/test_definition.py", 'str(present), "--reset-then-reuse-values")'),
    ),
    "helm test heimdall": ("tests/e2e/chart/test_passwords.py", 'helm("test", "heimdall"'),
    "helm rollback heimdall --wait": ("tests/e2e/chart/test_namespaces.py", 'helm("rollback", "heimdall", "--wait"'),
    "helm get values heimdall --revision … -o yaml": (
        *("tests/e2e/chart/test_again.py", 'section("docs/upgrading.md", "Back")'),
    ),
    "helm upgrade heimdall charts/heimdall --reset-values -f - --wait": (
        *("tests/e2e/chart/test_again.py", 'section("docs/upgrading.md", "Back")'),
    ),
    "kubectl scale deployment heimdall-operator heimdall-tracking --replicas=0": MOVED,
    "kubectl wait --for=delete pod -l app.kubernetes.io/component=tracking": MOVED,
    **{
        f"{RESTORE} --role={owner} -d {database} < {database}.dump": MOVED
        for owner, database in (("mlflow", "mlflow"), ("heimdall_writer", "heimdall"))
    },
    "mc alias set theirs https://s3.example.com": MOVED,
    "mc mirror … …": MOVED,
}
ANY_WORD = "…"
RUN_WHOLE = {
    "docs/howto/backup.md": "tests/e2e/chart/test_backup.py",
    "docs/runbooks/HeimdallVolumeFull.md": "tests/e2e/chart/test_runbooks.py",
    "docs/runbooks/HeimdallAttemptsFail.md": "tests/e2e/chart/test_runbooks.py",
}
"""Pages whose commands a test runs as they stand there."""
NOTHING_TO_RUN = {".", "export", "base64", "eval"}


def typed(program: str, *, in_text: bool = False) -> list[object]:
    found = [*commands(), *(commands_in_text(program) if in_text else [])]
    return [pytest.param(item.words[1:], id=item.where) for item in found if item.words[0] == program]


def plain(words: list[str]) -> list[str]:
    """Words that are neither flags nor their values."""
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--":
            break
        elif word.startswith("-"):
            skip = word in WITH_VALUE
        else:
            found.append(word)
    return found


def test_there_are_commands_to_check() -> None:
    for program in ("make", "heimdall-train", "kubectl", "helm"):
        assert len(typed(program)) > 3, program


@pytest.mark.parametrize("words", typed("make", in_text=True))
def test_a_target_is_there(words: list[str]) -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))

    assert {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("words", typed("heimdall-train", in_text=True))
def test_the_trainer_takes_the_flags(words: list[str]) -> None:
    assert _parser().parse_args([word for word in words if word != "…"]).call


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Names of resources: the chart's, the examples', and those that a document itself tells to make."""
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file())
    found = {f"heimdall-{suffix}" for suffix in re.findall(r'printf "%s-([a-z-]+?)"', templates)}
    found |= {values()["trainer"]["secretName"], values()["trainer"]["writerSecretName"]}
    found |= {f"{name}-0" for name in found}
    found |= {f"data-{name}" for name in found}
    found |= {"heimdall", "argocd", "argocd-cm", "kubernetes", "default", "trainingruns.training.heimdall.dev"}
    manifests = [path.read_text() for path in (ROOT / "manifests/examples").glob("*.yaml")]
    for text in [*manifests, *(block.text for block in blocks("yaml"))]:
        found |= {item["metadata"]["name"] for item in yaml.safe_load_all(text) if item and "metadata" in item}
    return found


@pytest.mark.parametrize("words", typed("kubectl", in_text=True))
def test_kubectl_is_asked_for_what_there_is(words: list[str], names: set[str]) -> None:
    verb, *rest = plain(words)
    assert verb in VERBS
    if verb == "rollout":
        rest = rest[1:]
    if verb in ("logs", "exec", "port-forward", "top"):
        rest = [word for word in rest[:1] if not word.isdigit()]
    if verb == "create" and rest[0] in ("secret", "configmap"):
        rest = rest[:1]
    kinds = {alias for aliases in KINDS.values() for alias in aliases}
    for word in rest:
        if "=" in word or word.endswith("-"):
            continue  # a label
        kind, _, name = word.rpartition("/")
        if kind:
            assert kind in kinds, word
        if verb == "explain":
            assert is_field(name.replace("trainingrun.", "")), word
        elif not PLACEHOLDER.match(name):
            assert name in kinds | names, word


@pytest.mark.parametrize("words", typed("kubectl"))
def test_a_selector_chooses_something(words: list[str]) -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file())
    for flag, selector in itertools.pairwise(words):
        if flag == "-l":
            label, _, value = selector.partition("=")
            assert label in templates
            assert label != "app.kubernetes.io/component" or f'"role" "{value}"' in templates


@pytest.mark.parametrize("words", typed("helm", in_text=True))
def test_helm_is_told_values_and_flags_that_there_are(words: list[str]) -> None:
    verb, *rest = plain(words)
    assert verb in {"install", "upgrade", "test", "rollback", "uninstall", "template", "package", "history", "get"}
    if verb == "get":
        assert rest.pop(0) == "values"
    assert {word for word in rest if not PLACE.match(word)} <= {"heimdall"}
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag.startswith("-"):
            assert flag in HELM_FLAGS
        if flag == "--set":
            assert is_value(value.partition("=")[0]), value


@pytest.mark.parametrize("block", [pytest.param(item, id=item.where) for item in blocks("yaml")])
def test_a_manifest_or_a_file_of_values_can_be_used(block: Block) -> None:
    for document in yaml.safe_load_all(block.text):
        if "kind" not in document:
            assert [path for path in leaves(document) if not is_value(path)] == []
        elif document["kind"] == "TrainingRun":
            assert refusals(parse(document).spec.pod_template) == []


def leaves(part: Any, path: str = "") -> list[str]:
    """Paths of a mapping's values."""
    if not isinstance(part, dict) or not part:
        return [path]
    return [leaf for name, below in part.items() for leaf in leaves(below, f"{path}.{name}" if path else name)]


def test_values_that_are_named_are_there() -> None:
    roles = set(values())
    named = {
        code.rstrip(".")
        for _, code in code_in_text()
        if code.partition(".")[0] in roles and re.fullmatch(r"[a-zA-Z]+(\.[a-zA-Z]+)+", code)
    }

    assert len(named) > 30
    assert {name for name in named if not is_value(name) and ".ROLE" not in name} == set()


def test_fields_that_are_named_are_there() -> None:
    named = {code for _, code in code_in_text() if re.fullmatch(r"(?:spec|status)(\.[a-zA-Z]+(\[\w*])?)+", code)}

    assert len(named) > 20
    assert {name for name in named if not is_field(name)} == set()


def test_variables_that_are_named_are_read_by_something() -> None:
    named = {name for _, code in code_in_text() for name in re.findall(r"HEIMDALL_[A-Z0-9_]*[A-Z0-9]", code)}
    sources = [
        path
        for room in ("api", "tracking", "operator", "trainer", "tests", "hack")
        for path in (ROOT / room).rglob("*.py")
    ]
    code = "\n".join(path.read_text() for path in sources if "unit/documents" not in str(path))
    fields = {f"HEIMDALL_{name.upper()}" for name in re.findall(r"^    (\w+): ", code, re.MULTILINE)}
    fields |= {f"HEIMDALL_OPERATOR_{name.upper()}" for name in OperatorSettings.model_fields}

    assert len(named) > 15
    assert {name for name in named if name not in code and name not in fields} == set()


def test_tests_that_are_named_are_there() -> None:
    named = {code for _, code in code_in_text() if re.match(r"tests/.*\.py(::|$)", code)}

    assert len(named) > 20
    for code in named:
        path, _, test = code.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(), code


@pytest.mark.parametrize("command", [pytest.param(item, id=item.where) for item in commands()])
def test_a_file_of_the_repository_is_there(command: Command) -> None:
    places = [word.removeprefix("@") for word in command.words if PLACE.match(word)]

    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("command", [pytest.param(item, id=item.where) for item in commands()])
def test_a_command_is_run_by_a_test_or_marked_as_not(command: Command) -> None:
    """In another namespace and with another bound there, unless the test runs the whole page."""
    if command.is_marked or command.words[0] in NOTHING_TO_RUN:
        return
    if command.where.partition(":")[0] in RUN_WHOLE:
        return  # the next test looks at these
    found = [where for run, where in RUN_BY.items() if is_run(command.words, run.split())]
    assert found, f"no test runs it: begin its block with `{NOT_RUN}: WHY`"
    for file, words in found:
        assert words in (ROOT / file).read_text(), f"{file} runs it no more"


def is_run(words: list[str], run: list[str]) -> bool:
    """Whether a command is one that a test runs."""
    own = re.sub(r" (-n heimdall|--timeout[ =]\S+)(?= |$)", "", " ".join(words)).split()
    return len(own) == len(run) and all(there in (ANY_WORD, word) for word, there in zip(own, run, strict=True))


def test_every_command_that_tests_are_said_to_run_is_in_the_documents() -> None:
    typed = [item.words for item in commands()]
    assert [run for run in RUN_BY if not any(is_run(words, run.split()) for words in typed)] == []


@pytest.mark.parametrize(
    "more", ["kubectl exec deployment/heimdall-tracking -- env", "helm install heimdall charts/heimdall -f values.yaml"]
)
def test_another_command_of_a_program_that_tests_call_is_not_taken_for_run(more: str) -> None:
    assert not any(is_run(more.split(), run.split()) for run in RUN_BY)


@pytest.mark.parametrize(("page", "test"), RUN_WHOLE.items(), ids=RUN_WHOLE)
def test_a_page_that_is_run_whole_has_each_section_typed_by_its_test(page: str, test: str) -> None:
    headings = {block.heading for block in blocks("sh") if block.where == page and not block.is_marked}
    text = (ROOT / test).read_text()

    assert headings
    assert [words for words in [page, *headings] if f'"{words}"' not in text] == []


def test_a_mark_says_why() -> None:
    marks = [block.text.splitlines()[0] for block in blocks("sh") if block.is_marked]

    assert marks
    assert [mark for mark in marks if not re.fullmatch(rf"{NOT_RUN}( in these words)?: .+", mark)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = LINK.findall(document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []
