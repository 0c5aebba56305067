"""Parameters of every type become what MLflow takes, whatever they hold."""

from __future__ import annotations

import argparse
import enum
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param, _validate_tag
from pydantic import BaseModel, SecretStr
from structlog.testing import capture_logs

from heimdall_tracking.params import ARRAY_LIMIT, KEY_LIMIT, VALUE_LIMIT, Names, clean_name, clean_text, flatten
from heimdall_tracking.redact import MASK

CANARY = "canary9d41"
some = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Store:
    """Neither frozen nor with slots, as users write them."""

    url: str = "db"
    password: Any = None
    more: list[Any] = field(default_factory=list)


class Options(BaseModel):
    rate: float = 0.5
    secret: SecretStr = SecretStr(CANARY)


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text of this")


class Unreadable(Mapping[str, object]):
    """Like a configuration with a value that is mandatory and missing."""

    def __getitem__(self, key: str) -> object:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(["missing"])

    def __len__(self) -> int:
        return 1


class Tensor:
    """Has what flatten asks of torch's."""

    dtype, shape = "torch.float32", (2,)

    def numel(self) -> int:
        return 2

    def detach(self) -> Tensor:
        return self

    def tolist(self) -> list[float]:
        return [1.0, 2.0]


texts = st.text(st.characters(), max_size=40)  # lone surrogates and NUL among them
arrays = st.sampled_from(
    [
        np.zeros(3),
        np.float32(1.5),
        np.zeros((2, 2), dtype=np.int64),
        np.zeros(5000),
        np.array(["a", None], dtype=object),
    ]
)
leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), texts, st.binary(max_size=20)),
    *(st.datetimes(), st.dates(), st.times(), st.timedeltas(), st.decimals(), st.fractions(), st.uuids(), arrays),
    st.builds(PurePosixPath, st.just("a/b")),
    st.sampled_from([Colour.RED, Colour, Unprintable(), Unreadable(), Options(), Tensor(), object(), print]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple)),
        st.dictionaries(st.one_of(texts, st.integers(), st.none(), st.tuples(texts)), inner, max_size=4),
        st.builds(Store, password=inner, more=st.lists(inner, max_size=2)),
        st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), inner, max_size=3).map(lambda it: argparse.Namespace(**it)),
    ),
    max_leaves=12,
)


def assert_accepted(flat: dict[str, str]) -> None:
    for name, value in flat.items():
        _validate_param(name, value)  # name's characters and path, both lengths
        assert "\0" not in value, "PostgreSQL takes no NUL"
        value.encode()  # half a surrogate pair can't be sent


@some
@given(st.dictionaries(st.one_of(texts, st.integers()), values, max_size=5))
def test_whatever_a_configuration_holds_mlflow_takes_it(params: dict[Any, Any]) -> None:
    flat = flatten(params)

    assert_accepted(flat)
    assert bool(flat) == bool(params), "a parameter was lost"


@some
@given(st.one_of(texts, st.from_regex(r"[./ a]{1,12}"), st.text("./ ", max_size=300)))
def test_any_name_becomes_one_that_mlflow_takes_for_metrics_and_tags(name: str) -> None:
    cleaned = clean_name(name)

    _validate_metric_name(cleaned)
    _validate_tag(cleaned, "")
    assert 0 < len(cleaned) <= KEY_LIMIT


alike = st.one_of(st.text("a@#?/ ._", max_size=3), st.text("a@#", max_size=3).map(lambda end: "x" * KEY_LIMIT + end))
"""Names of which many become the same."""


@some
@given(st.lists(st.one_of(alike, texts), unique=True))
@example(["a@b", "a#b", "a_b", "a b", ""])
@example(["\ud800", "\udfff"])
def test_names_that_differ_stay_apart_and_what_mlflow_takes_as_it_is_stays_so(names: list[str]) -> None:
    logged = Names().of(names)

    assert len(set(logged)) == len(names)
    for name, given_name in zip(names, logged, strict=True):
        _validate_metric_name(given_name)
        assert len(given_name) <= KEY_LIMIT
        assert given_name == name or clean_name(name) != name


@some
@given(st.dictionaries(alike, st.integers()))
def test_no_parameter_takes_the_place_of_another(params: dict[str, int]) -> None:
    flat = flatten(params)

    assert_accepted(flat)
    assert list(flat.values()) == [str(value) for value in params.values()]


def test_a_name_is_the_same_in_every_call_until_one_claims_it_that_needs_no_change() -> None:
    names = Names()

    with capture_logs() as lines:
        first = [*names.of(["loss@train"]), *names.of(["loss#train"]), *names.of(["loss@train"])]
        assert (first[0], first[2]) == ("loss_train", "loss_train")
        assert re.fullmatch(r"loss_train-[0-9a-f]{8}", first[1])
        assert names.of(["loss#train", "loss_train"]) == [first[1], "loss_train"]
        assert names.of(["loss@train"])[0] not in ("loss_train", first[1])
        names.of(["loss@train", "loss#train"])
    assert [line["name"] for line in lines] == ["loss#train", "loss@train"], "each is told once"


def test_two_parameters_of_one_name_are_told() -> None:
    with capture_logs() as lines:
        assert flatten({"a.b": 1, "a": {"b": 2}}) == {"a.b": "2"}
    assert [line["name"] for line in lines] == ["a.b"]


@some
@given(texts.map(lambda text: text * 200), st.integers(min_value=1, max_value=100))
def test_any_text_is_cut_to_its_limit_and_can_be_sent(text: str, limit: int) -> None:
    cleaned = clean_text(text, limit)

    assert len(cleaned) <= limit
    assert "\0" not in cleaned
    cleaned.encode()


SECRET_NAMES = ["password", "db_passwd", "api_key", "AWS_SECRET_ACCESS_KEY", "token", "credentials", "private-key"]


def around(secret: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Structures of mappings, lists, dataclasses and namespaces around something."""
    return st.recursive(
        secret,
        lambda inner: st.one_of(
            st.tuples(st.from_regex(r"\A[a-z]{1,6}\Z"), inner).map(lambda it: {it[0]: it[1]}),
            st.lists(inner, min_size=1, max_size=2),
            inner.map(lambda it: Store(more=[it])),
            inner.map(lambda it: argparse.Namespace(inner=it)),
            inner.map(lambda it: (1, it)),
        ),
        max_leaves=3,
    )


carriers = st.one_of(
    st.sampled_from(SECRET_NAMES).map(lambda name: {name: CANARY}),
    st.sampled_from(SECRET_NAMES).map(lambda name: {name: {"inner": [CANARY]}}),
    st.sampled_from(SECRET_NAMES).map(lambda name: {name: np.array([CANARY])}),
    st.just(Store(password=CANARY)),
    st.just(Options()),
    st.just(argparse.Namespace(password=CANARY)),
    st.just(f"postgresql://alice:{CANARY}@db/mlflow"),
)


@some
@given(around(carriers))
@example({"token": {"inner": [CANARY]}})
def test_secrets_are_masked_wherever_they_lie(value: Any) -> None:
    flat = flatten({"value": value})

    assert CANARY not in str(flat)
    assert "*" in str(flat)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (1e-3, "0.001"),
        (float("nan"), "nan"),
        ([1, (2, None)], "[1, [2, None]]"),
        ({3, 1, 2}, "[1, 2, 3]"),
        ({}, "{}"),
        ([], "[]"),
        (Colour.RED, "red"),
        ([Colour.RED], "[red]"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (time(3, 4), "03:04:00"),
        (timedelta(hours=1), "1:00:00"),
        (Path("/data/x"), "/data/x"),
        (Decimal("1.50"), "1.50"),
        (Fraction(1, 3), "1/3"),
        (np.float32(0.5), "0.5"),
        (np.arange(3), "[0, 1, 2]"),
        (np.zeros(ARRAY_LIMIT + 1), f"ndarray(shape=({ARRAY_LIMIT + 1},), dtype=float64)"),
        (Tensor(), "[1.0, 2.0]"),
        (Unprintable(), "<Unprintable>"),
        pytest.param(10**5000, "<int>", id="more digits than Python prints"),
        ([{"a": 1}], "[{a: 1}]"),
        ([Store(url="x")], f"[{{url: x, password: {MASK}, more: []}}]"),
        ("a\0b\ud800", "a\ufffdb?"),
    ],
)
def test_a_value_reads_as_one_would_write_it(value: object, text: str) -> None:
    assert flatten({"value": value}) == {"value": text}


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({"a": {"b": {"c": 1}}, "d": 2}, ["a.b.c", "d"]),
        ({"store": Store()}, ["store.url", "store.password", "store.more"]),
        ({"options": Options()}, ["options.rate", "options.secret"]),
        ({"args": argparse.Namespace(lr=1)}, ["args.lr"]),
        (OrderedDict({1: "x", None: "y"}), ["1", "None"]),
        ({"": 1}, ["_"]),
        ({"a b/c:d": 1}, ["a b/c:d"]),
        ({"a?b": 1}, ["a_b"]),
        ({" a ": 1}, ["a"]),
        ({"/a//../b/": 1}, ["a/b"]),
    ],
)
def test_nested_names_are_joined_by_dots(params: dict[Any, Any], names: list[str]) -> None:
    assert list(flatten(params)) == names


@pytest.mark.parametrize("name", ["a/ ", ". ", " .", "..", "../..", "/", " ", "..a", "./..", "a/."])
def test_names_that_are_no_plain_path_are_made_one(name: str) -> None:
    _validate_metric_name(clean_name(name))


def test_a_structure_that_contains_itself_ends() -> None:
    many: dict[str, Any] = {}
    many.update({f"k{index}": many for index in range(9)})
    array: list[Any] = [1]
    array.append(array)
    store = Store()
    store.more.append(store)

    flat = flatten({"many": many, "array": array, "store": store})

    assert_accepted(flat)
    assert len(flat) == 13
    assert flat["array"] == "[1, …]"


def test_a_deep_structure_is_printed_from_some_depth_on() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = {"a": [deep]}

    assert_accepted(flatten({"deep": deep}))


def test_what_is_huge_is_cut() -> None:
    flat = flatten({"text": "x" * 10**6, "list": list(range(10**6)), "nested": [[["y" * 10**5] * 50] * 50] * 50})

    assert_accepted(flat)
    assert all(len(value) == VALUE_LIMIT for value in flat.values())
    assert flat["text"].endswith("…")


def test_a_value_of_just_the_limit_is_kept_whole() -> None:
    assert flatten({"text": "x" * VALUE_LIMIT})["text"] == "x" * VALUE_LIMIT


def test_long_names_that_differ_at_their_end_alone_stay_apart() -> None:
    stem = "layer." * 60

    assert len(flatten({stem + "a": 1, stem + "b": 2})) == 2


def test_ten_thousand_parameters_keep_their_values() -> None:
    flat = flatten({f"group{index % 10}": {str(index): index} for index in range(10_000)} | {"x": {}})

    assert len(flat) == 11
    assert flatten({f"p{index}": index for index in range(10_000)})["p9999"] == "9999"


def test_an_empty_secret_is_seen_to_be_empty() -> None:
    assert flatten({"password": "", "token": None}) == {"password": "", "token": "None"}
