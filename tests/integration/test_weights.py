"""Pretrained weights from a bucket of a real MinIO."""

from __future__ import annotations

import io
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch

from heimdall_trainer.data import recordings
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.model.net import make_backbone
from heimdall_trainer.model.weights import find_weights
from heimdall_trainer.settings import DataSettings
from tests.integration.servers import Minio

BACKBONE = "test_resnet"


@pytest.fixture
def bucket(minio: Minio) -> str:
    name = f"weights-{secrets.token_hex(4)}"
    minio.s3.create_bucket(Bucket=name)
    return name


def settings(minio: Minio, bucket: str, folder: Path, **more: Any) -> DataSettings:
    values: dict[str, Any] = {
        "weights_url": f"s3://{bucket}/backbones",
        "s3_endpoint_url": minio.url,
        "s3_access_key": minio.access_key,
        "s3_secret_key": minio.secret_key,
        "cache_dir": folder / "cache",
    }
    return DataSettings(**(values | more))


def put(minio: Minio, bucket: str, content: bytes) -> None:
    minio.s3.put_object(Bucket=bucket, Key=f"backbones/{BACKBONE}.pth", Body=content)


def test_a_backbone_starts_from_the_object_of_its_name(minio: Minio, bucket: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = make_backbone(BACKBONE, pretrained=False).state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    put(minio, bucket, buffer.getvalue())

    file = find_weights(settings(minio, bucket, tmp_path), BACKBONE)

    assert file is not None
    assert file.read_bytes() == buffer.getvalue()
    loaded = make_backbone(BACKBONE, pretrained=True, weights=file).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_a_bucket_without_them_and_a_missing_one_name_the_field(minio: Minio, bucket: str, tmp_path: Path) -> None:
    for place in (bucket, "there-is-none"):
        with pytest.raises(ConfigurationError, match=rf"spec\.model\.pretrained: .*s3://{place}/backbones\) holds"):
            find_weights(settings(minio, place, tmp_path), BACKBONE)


def test_an_object_that_holds_no_weights_names_the_field(minio: Minio, bucket: str, tmp_path: Path) -> None:
    put(minio, bucket, b"no weights")
    file = find_weights(settings(minio, bucket, tmp_path), BACKBONE)
    with pytest.raises(ConfigurationError, match=rf"spec\.model\.pretrained: .*{BACKBONE}\.pth holds no weights"):
        make_backbone(BACKBONE, pretrained=True, weights=file)


def test_wrong_keys_are_named_without_their_values(minio: Minio, bucket: str, tmp_path: Path) -> None:
    wrong = settings(minio, bucket, tmp_path, s3_secret_key="not-the-key")
    with pytest.raises(ConfigurationError, match=r"refuses .*HEIMDALL_S3_SECRET_KEY") as caught:
        find_weights(wrong, BACKBONE)
    assert "not-the-key" not in str(caught.value)


def test_a_store_that_is_away_is_no_error_of_the_configuration(
    minio: Minio, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "PATIENCE_S", 0.0)
    minio.stop()
    with pytest.raises(ConnectionError, match="can't be reached"):
        find_weights(settings(minio, bucket, tmp_path), BACKBONE)
