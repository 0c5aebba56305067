"""What a training draws depends on its seed and on the place in it alone, and is another at each place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from structlog.testing import capture_logs
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from heimdall_trainer.callbacks import HOOKS_OF_A_STEP, as_callback
from heimdall_trainer.repeatable import Repeatable

pytestmark = [
    pytest.mark.filterwarnings("ignore:[\\s\\S]*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
EPOCHS, LONG, SHORT = 2, 12, 4
Loaders = Callable[[], Any]


class Drawn(Sampler[int]):
    """Draws each place when it is asked for, from the one before."""

    def __iter__(self) -> Iterator[int]:
        place = 0
        for _ in range(LONG):
            place = (place + random.randrange(10 * LONG)) % (10 * LONG)
            yield place

    def __len__(self) -> int:
        return LONG


class Seen(pl.LightningModule):
    """Notes each batch that it is given."""

    def __init__(self, loaders: Loaders) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.loaders = loaders
        self.seen: list[Any] = []

    def train_dataloader(self) -> Any:
        return self.loaders()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        named = batch if isinstance(batch, dict) else {"only": batch}
        self.seen.append({name: int(each) for name, each in named.items()})
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Fetching(Seen):
    """Fetches its batches by itself."""

    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


class Saving:
    """Makes a checkpoint at a step where the trainer's own callback would."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.is_last_batch and trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)

    def on_train_epoch_end(self, trainer: Any, _: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


def test_lightning_calls_those_hooks_of_a_step_alone_that_do_something() -> None:
    """Each call of one that does nothing takes it some microseconds, six times in a step and callback."""
    callback = as_callback(pl, Repeatable(seed=7))
    called = {name for name in HOOKS_OF_A_STEP if callable(getattr(callback, name))}
    assert called == {"on_train_batch_start", "on_train_batch_end"}
    assert callable(callback.on_train_epoch_start)
    assert {name for name in HOOKS_OF_A_STEP if not hasattr(pl.Callback, name)} == set()


def train(module: Seen, folder: Path, *callbacks: Any, follow: bool = True, **more: Any) -> None:
    repeatable = Repeatable(seed=7)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[as_callback(pl, each) for each in (repeatable, *callbacks)],
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    if follow:
        repeatable.follow(trainer)
    trainer.fit(module, weights_only=False, **more)
    repeatable.leave()


def seen(loaders: Loaders, folder: Path, kind: type[Seen] = Seen) -> list[Any]:
    module = kind(loaders)
    train(module, folder)
    return module.seen


def seen_when_stopped(loaders: Loaders, folder: Path, step: int, kind: type[Seen] = Seen) -> list[Any]:
    first, second, file = kind(loaders), kind(loaders), folder / "x.ckpt"
    train(first, folder, Saving(file, step))
    train(second, folder, ckpt_path=file)
    return first.seen[:step] + second.seen


def shuffled(length: int, how: str = "shuffle") -> Any:
    data = range(length)
    if how == "divided":  # as Lightning divides every shuffled one in a group
        return DataLoader(data, batch_size=1, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    generator = torch.Generator().manual_seed(3) if how == "generator" else None
    return DataLoader(data, batch_size=1, shuffle=True, generator=generator)


@pytest.mark.parametrize("how", ["shuffle", "generator", "divided"])
def test_two_loaders_of_one_length_have_orders_of_their_own(how: str, tmp_path: Path) -> None:
    batches = seen(lambda: {"a": shuffled(LONG, how), "b": shuffled(LONG, how)}, tmp_path)
    orders = [tuple(each[name] for each in batches[:LONG]) for name in ("a", "b")]
    assert [sorted(order) for order in orders] == 2 * [list(range(LONG))]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("how", ["shuffle", "generator", "divided"])
def test_each_pass_of_a_loader_that_begins_again_in_an_epoch_has_an_order_of_its_own(how: str, tmp_path: Path) -> None:
    batches = seen(lambda: {"long": shuffled(LONG), "short": shuffled(2 * SHORT - 2, how)}, tmp_path)
    passes = [tuple(each["short"] for each in batches[start : start + LONG // 2]) for start in (0, LONG // 2, LONG)]
    assert [sorted(order) for order in passes] == 3 * [list(range(LONG // 2))]
    assert len(set(passes)) == 3


@pytest.mark.parametrize("step", [1, SHORT - 1, SHORT, SHORT + 2, LONG - 1, LONG, LONG + SHORT + 1])
@pytest.mark.parametrize("how", ["shuffle", "generator", "divided"])
def test_several_loaders_go_on_where_they_were(how: str, step: int, tmp_path: Path) -> None:
    def loaders() -> Any:
        return {"a": shuffled(LONG, how), "b": shuffled(LONG, how), "short": shuffled(SHORT, how)}

    assert seen_when_stopped(loaders, tmp_path, step) == seen(loaders, tmp_path)


@pytest.mark.parametrize("step", [1, 5, LONG + 3])
def test_a_sampler_that_draws_each_place_by_itself_goes_on_where_it_was(step: int, tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(range(10 * LONG), batch_size=1, sampler=Drawn())

    assert seen_when_stopped(loader, tmp_path, step) == seen(loader, tmp_path)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
@pytest.mark.parametrize("step", [1, 5, LONG + 3])
def test_a_module_that_fetches_its_batches_goes_on_where_it_was(step: int, tmp_path: Path) -> None:
    def loader() -> Any:
        return shuffled(LONG)

    assert seen_when_stopped(loader, tmp_path, step, Fetching) == seen(loader, tmp_path, Fetching)


def test_a_loader_that_somebody_keeps_is_left_as_it_was(tmp_path: Path) -> None:
    kept = shuffled(LONG)
    before = dict(vars(kept))
    first = seen(lambda: kept, tmp_path)
    assert (type(kept), vars(kept)) == (DataLoader, before)
    assert seen(lambda: kept, tmp_path) == first, "it can be followed again"


class Stateful(DataLoader):  # type: ignore[type-arg]
    """Knows by itself where it was."""

    def __iter__(self) -> Any:
        return iter([0] * LONG)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing in it."""


def test_a_checkpoint_of_other_loaders_states_is_gone_on_from(tmp_path: Path) -> None:
    """As one that was made before the ordinary loader had one, too."""

    def loaders() -> Any:
        return {"mine": Stateful(range(LONG)), "ordinary": shuffled(LONG)}

    first, second, file = Seen(loaders), Seen(loaders), tmp_path / "x.ckpt"
    train(first, tmp_path, Saving(file, 3), follow=False)
    with capture_logs() as lines:
        train(second, tmp_path, ckpt_path=file)
    assert [line["event"].partition(":")[0] for line in lines] == [
        "the checkpoint is of other data loaders than there are"
    ]
    assert len(second.seen) == EPOCHS * LONG - 3


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_processes_of_a_group_decide_the_same_and_drop_each_its_own() -> None:
    """Where one of them would take another turn, all would wait for each other in vain."""
    begun, stepped, again = (
        [
            hook(Repeatable(seed=7), SimpleNamespace(global_rank=rank, current_epoch=1), batch) or drawn()
            for rank in range(2)
        ]
        for hook, batch in (
            (lambda each, trainer, _: each.on_train_epoch_start(trainer, None), 0),
            (lambda each, trainer, batch: each.on_train_batch_start(trainer, None, None, batch), 0),
            (lambda each, trainer, batch: each.on_train_batch_start(trainer, None, None, batch), 1),
        )
    )
    assert begun[0] == begun[1]
    for first, second in (stepped, again):
        assert first[:2] == second[:2]
        assert first[2] != second[2]
    assert not set(stepped[0]) & set(again[0])
