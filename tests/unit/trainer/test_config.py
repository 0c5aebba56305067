"""From files and flags to a TrainingRun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from heimdall_api.contract import ENV_RUN_FILE
from heimdall_api.types import TrainingRun
from heimdall_trainer import cli
from heimdall_trainer.commands import training
from heimdall_trainer.config import load_training_config, override, parse
from heimdall_trainer.errors import ConfigurationError

TRAINING = {"epochs": 3, "learningRate": 2.0e-4}
SPEC = {"model": {"backbone": "resnet50"}, "training": TRAINING}
RUN = {
    "apiVersion": "training.heimdall.dev/v1alpha1",
    "kind": "TrainingRun",
    "metadata": {"name": "locate", "namespace": "team", "labels": {"app": "x"}},
    "spec": SPEC,
}


def written(text: str, name: str = "file.yaml") -> Path:
    file = Path(name)
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", yaml.safe_dump(RUN)),
        ("run.json", json.dumps(RUN)),
        ("tabs.json", json.dumps(RUN, indent="\t")),
        ("text-with-scientific-numbers.yaml", yaml.safe_dump(RUN).replace("0.0002", "2e-4")),
    ],
)
def test_a_training_run_is_read_from_yaml_and_json(name: str, text: str) -> None:
    run = load_training_config(written(text, name))
    assert run.metadata.name == "locate"
    assert run.metadata.namespace == "team"
    assert run.spec.model.backbone == "resnet50"
    assert run.spec.training.learning_rate == 2.0e-4
    assert run.spec.training.batch_size == 32


@pytest.mark.parametrize("document", [SPEC, TRAINING])
def test_a_bare_spec_and_its_bare_training_part_will_do(document: dict[str, Any]) -> None:
    run = load_training_config(written(yaml.safe_dump(document), "quick.yaml"))
    assert run.metadata.name == "quick"
    assert run.spec.training.epochs == 3


def test_every_field_of_a_spec_tells_a_bare_spec() -> None:
    assert parse({"activeDeadlineSeconds": 60}).spec.active_deadline_seconds == 60


def test_a_training_run_without_a_spec_has_the_defaults() -> None:
    run = parse({name: value for name, value in RUN.items() if name != "spec"})
    assert run.metadata.name == "locate"
    assert run.spec == TrainingRun(metadata=run.metadata).spec


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"training": {"epochs": "many"}}, "spec.training.epochs"),
        ({"training": {"epochs": 0}}, "spec.training.epochs"),
        ({"training": {"epoch": 3}}, "spec.training.epoch"),
        ({"epochs": 3, "batchSize": -1}, "spec.training.batchSize"),
        ({"metadata": {}, "spec": {}}, "metadata.name"),
        ({"model": "resnet50"}, "spec.model"),
    ],
)
def test_an_error_names_the_field(document: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{field}: "):
        load_training_config(written(yaml.safe_dump(document)))


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"epochs.*batchSize"):
        parse({"training": {"epochs": 0, "batchSize": 0}})


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "neither YAML nor JSON"), ("- 1\n", "holds no TrainingRun"), ("", "holds no TrainingRun")],
)
def test_what_is_no_training_run_is_refused_by_its_name(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"file\.yaml.*{message}"):
        load_training_config(written(text))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml can't be read: No such file"):
        load_training_config("nowhere.yaml")


def test_a_file_that_is_no_text_is_refused() -> None:
    Path("model.ckpt").write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"model\.ckpt"):
        load_training_config("model.ckpt")


def test_a_flag_that_can_not_be_used_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"spec\.training\.epochs"):
        override(parse(RUN), {"training.epochs": 0})


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainingRun, Path]]:
    """What the command line would train, and where."""
    calls: list[tuple[TrainingRun, Path]] = []
    monkeypatch.setattr(training, "_train_locally", lambda run, output_dir, *_: calls.append((run, output_dir)))
    return calls


def call(*arguments: str) -> None:
    parsed = cli._parser().parse_args(arguments)
    parsed.call(parsed)


FLAGS: dict[str, tuple[str, Any, Any, Any]] = {
    "--backbone vit_base_patch16_224": ("model.backbone", None, "resnet50", "vit_base_patch16_224"),
    "--pretrained": ("model.pretrained", False, False, True),
    "--no-pretrained": ("model.pretrained", False, True, False),
    "--freeze-backbone": ("model.freezeBackbone", False, False, True),
    "--no-freeze-backbone": ("model.freezeBackbone", False, True, False),
    "--learning-rate 0.01": ("training.learningRate", 1.0e-3, 2.0e-4, 0.01),
    "--batch-size 4": ("training.batchSize", 32, 8, 4),
    "--epochs 5": ("training.epochs", 100, 3, 5),
    "--run-name mine": ("tracking.runName", None, "ours", "mine"),
}
"""A flag's field in the spec, its default, what the file says, and what the flag says."""


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_beats_the_file_and_the_file_beats_the_default(
    flag: str, trained: list[tuple[TrainingRun, Path]]
) -> None:
    path, default, in_file, asked = FLAGS[flag]
    part, _, field = path.partition(".")

    def run(value: Any, **rest: Any) -> dict[str, Any]:
        return {**RUN, "spec": rest if value is None else {part: {field: value}, **rest}}

    rest = {"data": {"arrivals": True}}
    file = str(written(yaml.safe_dump(run(in_file, **rest))))
    for arguments in ([], flag.split(), ["--config", file], ["--config", file, *flag.split()]):
        call("train", *arguments)
    expected = [run(default), run(asked), run(in_file, **rest), run(asked, **rest)]
    assert [found.spec for found, _ in trained] == [parse(each).spec for each in expected]
    assert trained[-1][0].metadata == parse(RUN).metadata


def test_the_train_command_has_no_other_flags_than_these_and_where_to_read_and_write() -> None:
    names = {flag.partition(" ")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for flag in FLAGS}
    known = vars(cli._parser().parse_args(["train"])).keys() - {"command", "call"}
    assert known == names | {"config", "output_dir", "resume"}


def test_the_output_folder_is_the_flag_s_or_the_default(trained: list[tuple[TrainingRun, Path]]) -> None:
    call("train")
    call("train", "--output-dir", "out")
    assert [output_dir for _, output_dir in trained] == [Path("outputs"), Path("out")]


def test_the_validate_command_says_that_a_file_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    call("validate", "-f", str(written(yaml.safe_dump(RUN))))
    assert capsys.readouterr().out == "file.yaml: locate is valid\n"


def test_the_validate_command_refuses_what_the_api_server_would() -> None:
    spec = {"model": {"backbone": "resnet50", "module": "a:B"}}
    file = written(yaml.safe_dump({**RUN, "metadata": {"name": "Locate!"}, "spec": spec}))
    with pytest.raises(ConfigurationError, match=r"spec\.model: set either backbone .* or module"):
        call("validate", "-f", str(file))
    with pytest.raises(ConfigurationError, match=r"^metadata\.name becomes the name of Jobs and Pods"):
        call("validate", "-f", str(written(yaml.safe_dump({**RUN, "metadata": {"name": "Locate!"}}))))


@pytest.mark.parametrize(
    ("document", "said"), [(SPEC, "a bare spec, valid for"), (TRAINING, "a bare spec.training, valid for")]
)
def test_the_validate_command_says_of_what_kubectl_does_not_take_that_it_does_not(
    document: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    call("validate", "-f", str(written(yaml.safe_dump(document))))
    assert capsys.readouterr().out == f"file.yaml: {said} heimdall-train; kubectl takes a whole TrainingRun alone\n"


def test_the_validate_command_refuses_a_training_run_that_does_not_say_that_it_is_one() -> None:
    for lacks, words in (
        ({"kind"}, "kind: TrainingRun"),
        ({"kind", "apiVersion"}, "apiVersion: training.heimdall.dev/v1alpha1 and kind: TrainingRun"),
    ):
        document = {name: value for name, value in RUN.items() if name not in lacks}
        with pytest.raises(ConfigurationError, match=rf"^file\.yaml lacks {words}: the API server refuses"):
            call("validate", "-f", str(written(yaml.safe_dump(document))))
        assert load_training_config("file.yaml").metadata.name == "locate", "it can be trained all the same"


def test_where_no_file_is_named_and_no_pod_has_one_the_option_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^name a TrainingRun with -f FILE: /etc/heimdall/trainingrun\.json"):
        call("run")
    monkeypatch.setenv(ENV_RUN_FILE, "nowhere.json")
    with pytest.raises(ConfigurationError, match=r"^nowhere\.json can't be read"):
        call("run")


@pytest.mark.parametrize(("file", "name"), [("My_Config v2.yaml", "my-config-v2"), ("2026.yaml", "run")])
def test_a_bare_spec_is_named_after_its_file(file: str, name: str) -> None:
    assert load_training_config(written(yaml.safe_dump(SPEC), file)).metadata.name == name
