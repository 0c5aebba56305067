"""Sessions are divided, never shared."""

from __future__ import annotations

import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from heimdall_trainer.data.split import Split, split_sessions
from heimdall_trainer.errors import ConfigurationError

IDS = st.lists(st.text(min_size=1, max_size=8), max_size=40)
FRACTIONS = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).filter(lambda pair: sum(pair) < 1)


def split_or_none(ids: list[str], fractions: tuple[float, float], seed: int) -> Split | None:
    validation, test = fractions
    try:
        return split_sessions(ids, validation_fraction=validation, test_fraction=test, seed=seed)
    except ConfigurationError:
        return None


@settings(deadline=None)
@given(ids=IDS, fractions=FRACTIONS, seed=st.integers(0, 100))
def test_every_session_is_on_exactly_one_side(ids: list[str], fractions: tuple[float, float], seed: int) -> None:
    split = split_or_none(ids, fractions, seed)
    assume(split is not None)
    assert split is not None
    every = [*split.train, *split.validation, *split.test]
    assert sorted(every) == sorted(set(ids))


@settings(deadline=None)
@given(ids=IDS, fractions=FRACTIONS, seed=st.integers(0, 100), order=st.randoms(use_true_random=False))
def test_order_and_doubles_do_not_matter(
    ids: list[str], fractions: tuple[float, float], seed: int, order: random.Random
) -> None:
    shuffled = [*ids, *ids]
    order.shuffle(shuffled)
    assert split_or_none(ids, fractions, seed) == split_or_none(shuffled, fractions, seed)


@settings(deadline=None)
@given(ids=IDS, fractions=FRACTIONS, seed=st.integers(0, 100))
def test_a_fraction_above_zero_is_at_least_one_session_and_zero_is_none(
    ids: list[str], fractions: tuple[float, float], seed: int
) -> None:
    split = split_or_none(ids, fractions, seed)
    assume(split is not None)
    assert split is not None
    assert bool(split.validation) == (fractions[0] > 0)
    assert bool(split.test) == (fractions[1] > 0)
    assert split.train


@settings(deadline=None)
@given(count=st.integers(5, 60), added=st.integers(1, 20))
def test_fractions_are_kept_as_well_as_whole_sessions_allow(count: int, added: int) -> None:
    ids = [f"s{number}" for number in range(count)]
    split = split_sessions(ids, validation_fraction=0.2, test_fraction=0.1, seed=added)
    assert abs(len(split.validation) - 0.2 * count) <= 1
    assert abs(len(split.test) - 0.1 * count) <= 1


def test_another_seed_divides_otherwise() -> None:
    ids = [f"s{number}" for number in range(20)]
    splits = {split_sessions(ids, validation_fraction=0.2, test_fraction=0.1, seed=seed) for seed in range(5)}
    assert len(splits) == 5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_sessions_are_refused_with_how_many_it_takes(count: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{count} .*validationFraction=0.2 .*testFraction=0.1.* 3 are the"):
        split_sessions(["a", "b"][:count], validation_fraction=0.2, test_fraction=0.1, seed=1)


def test_one_session_is_enough_to_train_on_alone() -> None:
    split = split_sessions(["a"], validation_fraction=0, test_fraction=0, seed=1)
    assert split == Split(train=("a",), validation=(), test=())
