"""Secrets in texts, and names that announce one."""

from __future__ import annotations

import pytest

from heimdall_tracking.redact import described, names_secret, redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("http://alice:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("http://token@host", "http://***@host"),
        ("postgresql+psycopg2://u:p@ss@db:5432/mlflow", "postgresql+psycopg2://***@db:5432/mlflow"),
        ("postgresql://u:pa/ss?w#rd@db/mlflow", "postgresql://***@db/mlflow"),
        pytest.param(f"postgresql://u:{'x' * 5000}@db/mlflow", "postgresql://***@db/mlflow", id="a token as password"),
        ("can't reach http://a:b@h and s3://c:d@e", "can't reach http://***@h and s3://***@e"),
        ("https://s3/b?X-Amz-Signature=abc&x=1", "https://s3/b?X-Amz-Signature=***&x=1"),
        ("https://s3/b?AWSAccessKeyId=abc&token=t", "https://s3/b?AWSAccessKeyId=***&token=***"),
        ("host=db user=u password=hunter2 dbname=x", "host=db user=u password=*** dbname=x"),
        ("host=db password='hunter 2' user=u", "host=db password=*** user=u"),
        ("Server=db;Uid=u;Pwd = hunter2;Port=1", "Server=db;Uid=u;Pwd = ***;Port=1"),
    ],
)
def test_users_passwords_and_signatures_are_masked(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "http://mlflow:5000/#/experiments/1",
        "s3://bucket/models/model@3",
        "http://127.0.0.1:5000/models/name@champion",
        "mail alice@example.org",
        "sqlite:///folder/mlflow.db",
        "passwords=3 and pwd is /home",
        "",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_errors_are_redacted_like_texts() -> None:
    assert redact(ConnectionError("http://u:p@h refused")) == "http://***@h refused"


@pytest.mark.parametrize(
    "name",
    [
        *("password", "db.password", "passwd", "PGPASSWORD", "passphrase", "client_secret", "AWS_SECRET_ACCESS_KEY"),
        *("token", "hf.token", "api_key", "apikey", "access-key", "private_key", "authToken", "credentials"),
        *("headers.Authorization", "hfToken", "pwd", "db_pwd", "db_pass"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("max_tokens", "tokenizer", "keys", "monkey", "passes", "learning_rate", "key", "forward_pass", "maxtoken"),
        "authored",
    ],
)
def test_names_that_only_resemble_one_are_not(name: str) -> None:
    assert not names_secret(name)


def test_an_error_is_described_by_its_kind_and_words_without_secrets() -> None:
    error = ConnectionError("http://alice:hunter2@mlflow is away")
    assert described(error) == "ConnectionError: http://***@mlflow is away"
