"""Lists that the documents make of what the code says in many places: conditions, events, metrics, tags, figures."""

from __future__ import annotations

import re

import yaml

from heimdall_operator.manifests import YOUNGER_FIELDS
from tests.unit.documents.documents import ROOT
from tests.unit.documents.test_facts import section, version

CONTRACT = (ROOT / "docs/contract.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_the_contract_names_what_the_run_file_may_lack() -> None:
    given = section(CONTRACT, "What a pod is given")

    assert [field for field in YOUNGER_FIELDS if f"`spec.{'.'.join(field)}`" not in given] == []


def test_the_contract_says_which_user_a_pod_runs_as() -> None:
    """The image's, by number: Kubernetes can't tell whether a name is root."""
    given = section(CONTRACT, "What a pod is given")
    job = yaml.safe_load((ROOT / "tests/unit/operator/golden/own-image-without-gpu.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "runAsUser" not in {**pod["securityContext"], **container["securityContext"]}
    assert "sets `runAsNonRoot` and no `runAsUser`" in given
    assert re.search(r"^USER \d+", (ROOT / "images/contract/Dockerfile").read_text(), re.MULTILINE)


def test_what_a_run_takes_of_the_operators_memory_is_what_was_measured() -> None:
    table = (ROOT / "docs/benchmarks.md").read_text()
    measured = re.findall(r"memory with (\d+) (\w+) runs +([\d.]+) MiB", table)
    alone = float(version("docs/benchmarks.md", r"Without any run the operator takes about (\d+) MiB"))
    kib = {kind: round((float(mib) - alone) * 1024 / int(runs)) for runs, kind, mib in measured}

    for page in ("operating", "runbooks/HeimdallOperatorDown"):
        text = (ROOT / f"docs/{page}.md").read_text()
        assert f"{kib['finished']} KiB for each finished" in text, page
        assert f"{kib['active']} KiB for each active" in text, page


def test_chaos_walks_as_many_lives_as_are_told() -> None:
    found = re.search(r"HEIMDALL_CHAOS_LIVES=(\d+)", (ROOT / "Makefile").read_text())

    assert found is not None
    assert f"writes of {NUMBERS[int(found[1])]} lives" in CONTRIBUTING
