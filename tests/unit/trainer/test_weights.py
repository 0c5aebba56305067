"""Pretrained weights from a folder of one's own, and from the library's hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.model.net import LocalizationNet, make_backbone
from heimdall_trainer.model.weights import find_weights
from heimdall_trainer.settings import DataSettings
from tests.unit.trainer.builders import data_settings

SMALL = "test_resnet"
FOLDER = Path("weights")


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    """The folder is in the test's own one, and empty."""
    FOLDER.mkdir()
    return data_settings(tmp_path, weights_url=f"file:{FOLDER}")


def state(backbone: str = SMALL) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    made = make_backbone(backbone, pretrained=False)
    return {name: value.contiguous() for name, value in made.state_dict().items()}


def loaded(settings: DataSettings, backbone: str = SMALL) -> dict[str, torch.Tensor]:
    file = find_weights(settings, backbone)
    assert file is not None
    return make_backbone(backbone, pretrained=True, weights=file).state_dict()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_backbone_starts_from_the_file_of_its_name(settings: DataSettings, suffix: str) -> None:
    expected, file = state(), FOLDER / f"{SMALL}.{suffix}"
    if suffix == "pth":
        torch.save(expected, file)
    else:
        save_file(expected, file)
    found = loaded(settings)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_without_a_place_of_one_s_own_the_library_s_weights_are_used(tmp_path: Path) -> None:
    assert find_weights(data_settings(tmp_path), SMALL) is None


def test_safetensors_come_before_pickles(settings: DataSettings) -> None:
    (FOLDER / f"{SMALL}.pth").write_bytes(b"older")
    (FOLDER / f"{SMALL}.safetensors").write_bytes(b"safer")
    file = find_weights(settings, SMALL)
    assert file is not None
    assert file.read_bytes() == b"safer"


def test_weights_that_were_replaced_are_read_anew(settings: DataSettings) -> None:
    contents = []
    for content in (b"first", b"second"):
        (FOLDER / f"{SMALL}.pth").write_bytes(content)
        file = find_weights(settings, SMALL)
        assert file is not None
        assert file.is_relative_to(settings.cache_dir)
        contents.append(file.read_bytes())
    assert contents == [b"first", b"second"]


def test_weights_that_were_spoiled_in_the_cache_are_kept_anew(settings: DataSettings) -> None:
    (FOLDER / f"{SMALL}.pth").write_bytes(b"whole")
    for _ in range(2):
        file = find_weights(settings, SMALL)
        assert file is not None
        assert file.read_bytes() == b"whole"
        file.write_bytes(b"half")


def test_a_name_with_a_slash_is_a_file_of_the_folder(settings: DataSettings) -> None:
    (FOLDER / "hub_model.pth").write_bytes(b"x")
    assert find_weights(settings, "hub/model") is not None


def test_a_folder_without_them_names_the_field_and_both_files(settings: DataSettings) -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"^spec\.model\.pretrained: HEIMDALL_WEIGHTS_URL \(file:weights\) holds neither "
        r"test_resnet\.safetensors nor test_resnet\.pth: put one there, or set pretrained to false",
    ):
        find_weights(settings, SMALL)


def test_a_place_that_is_none_names_its_variable(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^HEIMDALL_WEIGHTS_URL: '/weights' is no place for objects: use s3:"):
        find_weights(data_settings(tmp_path, weights_url="/weights"), SMALL)


@pytest.mark.parametrize(("content", "suffix"), [(b"no weights", "safetensors"), (b"", "pth"), (b"no weights", "pth")])
def test_a_file_that_holds_no_weights_names_field_and_file(settings: DataSettings, content: bytes, suffix: str) -> None:
    (FOLDER / f"{SMALL}.{suffix}").write_bytes(content)
    with pytest.raises(
        ConfigurationError, match=rf"^spec\.model\.pretrained: .*{SMALL}\.{suffix} holds no weights of '{SMALL}'"
    ):
        loaded(settings)


def test_weights_of_another_backbone_name_field_and_file_and_not_every_tensor(settings: DataSettings) -> None:
    save_file(state("test_vit"), FOLDER / f"{SMALL}.safetensors")
    with pytest.raises(ConfigurationError, match=r"^spec\.model\.pretrained: .* holds no weights of") as caught:
        loaded(settings)
    assert len(str(caught.value)) < 600


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the library's own use of torch
@pytest.mark.parametrize(
    ("backbone", "place"), [("test_vit", "pos_embed"), ("test_maxvit", "rel_pos")], ids=["absolute", "relative"]
)
def test_weights_for_the_library_s_own_image_size_are_fitted_to_that_of_spectrograms(
    backbone: str, place: str, settings: DataSettings
) -> None:
    torch.manual_seed(3)
    published = timm.create_model(backbone).state_dict()  # for images of 160 x 160
    save_file(published, FOLDER / f"{backbone}.safetensors")

    found, fresh = loaded(settings, backbone), state(backbone)

    resized = {name for name, value in found.items() if value.shape != published[name].shape}
    assert resized
    assert all(place in name for name in resized)
    assert all(torch.equal(value, published[name]) for name, value in found.items() if name not in resized)
    assert not any(torch.equal(found[name], fresh[name]) for name in resized), "they come from the file as well"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; the hub is not asked: HF_HUB_CACHE and HF_HUB_OFFLINE, as read when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_the_library_s_own_weights_come_from_its_hub_s_cache(hub: Path) -> None:
    torch.manual_seed(3)
    published = timm.create_model(SMALL).state_dict()  # with a classifier, as the library's are
    repository, commit = hub / "models--timm--test_resnet.r160_in1k", "0" * 40
    for folder in ("refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    save_file(published, repository / f"snapshots/{commit}/model.safetensors")

    found = LocalizationNet(SMALL, pretrained=True).backbone.state_dict()

    assert published.keys() - found.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, published[name]) for name, value in found.items())


def test_a_hub_that_is_not_to_be_asked_and_has_no_copy_is_an_error_of_the_configuration(hub: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"the weights of '{SMALL}' can't be had .*HEIMDALL_WEIGHTS_URL"):
        LocalizationNet(SMALL, pretrained=True)
