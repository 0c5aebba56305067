"""Order and random numbers that depend on seed and place in training alone: who goes on finds them as they were.

A DataLoader of the user's own draws the order of an epoch at its beginning, and Lightning begins the rest of an epoch
that was interrupted with the epoch's first batches again; dropout draws at each step. So generators are seeded for the
order of each pass of each loader, each batch and each step, in every training, stopped or not. Their states in a
checkpoint would do the same for one process. But a group's would have to be collected from every process for each
checkpoint, and how much was drawn between a checkpoint and what comes after it depends on how the process that made it
ended.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from typing import Any, Final

import structlog

log = structlog.get_logger()

END: Final = object()


class Repeatable:
    """A callback: seeds what a training draws from, and has the user's own data loaders go on where they were."""

    def __init__(self, seed: int) -> None:
        """Nothing is seeded yet.

        Args:
            seed: Of the training.
        """
        self._seed = seed
        self._at_start = True
        """Whether this process has not trained a batch yet."""
        self._followed: list[tuple[Any, Any]] = []
        """The data loaders that go on where they were, each with the class that it had."""

    def follow(self, trainer: Any) -> None:
        """Have the training's data loaders go on where they were, once they are there.

        Args:
            trainer: Lightning's, which has not begun.
        """
        process = trainer.strategy.process_dataloader

        def processed(loader: Any) -> Any:
            loader = process(loader)
            if trainer.training and can_leave_out(loader):
                self._make_resumable(loader, trainer)
            return loader

        trainer.strategy.process_dataloader = processed
        _restore_by_count(trainer.fit_loop)

    def leave(self) -> None:
        """Have the data loaders be what they were: a module that keeps one is saved with it, and keeps no trainer."""
        for loader, kind in self._followed:
            loader.__class__ = kind
            del loader.heimdall_places
        self._followed.clear()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """What a module draws here, another attempt that begins with this epoch draws as well.

        And every process of a group the same: what is drawn here may be divided among them.
        """
        del pl_module
        self.seed_for("epoch", trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The step is next.

        What its code decides by Python's and numpy's generators is decided by all of a group as one, or they would wait
        for each other in vain. Dropout, which draws from torch's, is each process's own.
        """
        del pl_module, batch
        self.seed_for("step", trainer.current_epoch, batch_idx)
        seed_torch(number_of("step", self._seed, trainer.global_rank, trainer.current_epoch, batch_idx))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch was trained on: from here on none is left out. A step may have fetched its batch by itself."""
        del trainer, pl_module, outputs, batch, batch_idx
        self._at_start = False

    def _make_resumable(self, loader: Any, trainer: Any) -> None:
        kind = type(loader)
        loader.heimdall_places = _Places(loader, trainer, self, number=len(self._followed))
        loader.__class__ = _resumable(kind)
        self._followed.append((loader, kind))

    def seed_for(self, what: str, *place: int) -> None:
        """Seed what something at a place in training may be drawn from; all processes of a group draw the same."""
        seed_all(number_of(what, self._seed, *place))

    def seed_process(self, what: str, trainer: Any, *place: int) -> None:
        """Seed what something at a place in an epoch draws in this process; each of a group draws its own."""
        seed_all(number_of(what, self._seed, trainer.global_rank, trainer.current_epoch, *place))

    def place_of(self, size: int, trainer: Any) -> tuple[int, int]:
        """Where in an epoch a loader's next pass begins.

        Args:
            size: How many batches the loader has.
            trainer: Lightning's, whose counts say it.

        Returns:
            Which of the epoch's passes it is, and how many of its batches were trained on before this process began.
        """
        if not trainer.training:
            return 0, 0  # somebody else who looks at the data
        loop = trainer.fit_loop
        done = int(loop._data_fetcher.fetched)  # noqa: SLF001 - there is no other way
        # Of several loaders the shorter ones begin again, in Lightning's usual mode.
        cycles = loop._combined_loader._mode == "max_size_cycle"  # noqa: SLF001
        number, left_out = divmod(done, size) if cycles and size else (0, min(done, size))
        return number, left_out if self._at_start else 0


def _restore_by_count(loop: Any) -> None:
    """Have Lightning leave alone what a checkpoint holds of other loaders than there are; it would fail for good.

    As one does that was made when only loaders with a state of their own had one.
    """
    restore = loop._load_combined_loader_states  # noqa: SLF001 - there is no other way

    def restored() -> None:
        states, combined = loop._combined_loader_states_to_load, loop._combined_loader  # noqa: SLF001
        if states and combined is not None and len(states) != sum(map(_is_stateful, combined.flattened)):
            log.warning(
                "the checkpoint is of other data loaders than there are: those with a state of their own begin anew"
            )
            loop._combined_loader_states_to_load = []  # noqa: SLF001
        restore()

    loop._load_combined_loader_states = restored  # noqa: SLF001


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _resumable(kind: Any) -> Any:
    """What a DataLoader of the user's own becomes, beside what it is."""

    class ReplayedLoader(kind):  # type: ignore[misc]
        heimdall_places: _Places

        @property
        def _index_sampler(self) -> _Places:
            return self.heimdall_places

        def __iter__(self) -> Iterator[Any]:
            # A generator: where training goes on, and samplers the epoch, is known when the first batch is asked for.
            self.heimdall_places.begin()
            yield from super().__iter__()

        def state_dict(self) -> dict[str, Any]:
            """Has Lightning see that it can go on: by Lightning's counts, so it keeps nothing of its own."""
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """There is nothing in it."""

    return ReplayedLoader


class _Places:
    """The indices of each batch. Those that are left out are drawn, but nothing of them is loaded."""

    def __init__(self, loader: Any, trainer: Any, repeatable: Repeatable, *, number: int) -> None:
        self._number = number
        """Which of the training's loaders it is: two of one length are to have two orders."""
        self._sampler = loader._index_sampler  # noqa: SLF001 - there is no other way
        self._generators = [(each, each.initial_seed()) for each in _generators(loader)]
        self._divided = [(each, each.seed) for each in _divided(loader)]
        self._trainer = trainer
        self._repeatable = repeatable
        self._pass = self._skip = 0

    def begin(self) -> None:
        """A pass begins."""
        self._pass, self._skip = self._repeatable.place_of(len(self), self._trainer)
        self._seed_for("workers")

    def _seed_for(self, what: str) -> None:
        place = (self._trainer.current_epoch, self._number, self._pass)
        self._repeatable.seed_for(what, *place)
        for generator, initial in self._generators:
            generator.manual_seed(number_of(what, initial, *place))
        for sampler, initial in self._divided:
            sampler.seed = number_of(initial, self._number, self._pass)  # it adds the epoch by itself

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        # Here, where the order is drawn: a loader whose processes stay draws less before it in a later epoch.
        self._seed_for("order")
        places = iter(self._sampler)
        for batch in itertools.count():
            if batch:  # those that are left out, too: a sampler may draw each place only when it is asked for
                self._repeatable.seed_process("batch", self._trainer, self._number, self._pass, batch)
            place = next(places, END)
            if place is END:
                return
            if batch >= self._skip:
                yield place


def can_leave_out(loader: Any) -> bool:
    """Whether a loader can begin in the middle: torch's own, over what has a length, and without a way of its own.

    A stream can't be asked for its places, and who iterates otherwise than torch may not ask a sampler.
    """
    from torch.utils.data import DataLoader, IterableDataset

    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    if hasattr(loader, "load_state_dict") or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    try:
        return len(loader) >= 0
    except (TypeError, NotImplementedError):
        return False


def _generators(loader: Any) -> list[Any]:
    """The generators of a loader and its samplers, where they have some of their own."""
    import torch

    found = (getattr(holder, "generator", None) for holder in (loader, *_samplers(loader)))
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _divided(loader: Any) -> list[Any]:
    """The samplers of a loader that divide the data among the processes of a group, in an order of a seed of theirs."""
    from torch.utils.data import DistributedSampler

    return list({id(each): each for each in _samplers(loader) if isinstance(each, DistributedSampler)}.values())


def _samplers(loader: Any) -> tuple[Any, ...]:
    return loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)


def number_of(*place: object) -> int:
    """A seed for a place, which has nothing to do with that of the next one."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest())


def seed_all(number: int) -> None:
    """Seed the generators that everybody draws from."""
    import numpy as np

    random.seed(number)
    np.random.seed(number)
    seed_torch(number)


def seed_torch(number: int) -> None:
    """Seed torch's generators alone. CUDA's are left alone where there is none yet to be seeded."""
    import torch

    torch.default_generator.manual_seed(number)
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        cuda.manual_seed_all(number)
