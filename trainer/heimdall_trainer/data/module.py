"""The localizer's data as Lightning wants it: sessions found, checked, divided, loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any

import pytorch_lightning as L  # noqa: N812 - the name its users know
import structlog
import torch

from heimdall_api.types import DataSpec
from heimdall_trainer import group
from heimdall_trainer.data.arrival_source import ArrivalSource
from heimdall_trainer.data.augment import Augmentation
from heimdall_trainer.data.cache import Caches
from heimdall_trainer.data.dataset import HeimdallDataset, readable
from heimdall_trainer.data.features import FeatureSource
from heimdall_trainer.data.loader import ResumableLoader
from heimdall_trainer.data.recordings import RecordingStore
from heimdall_trainer.data.sessions import NAMED_IDS, SessionStore, Transmission
from heimdall_trainer.data.split import SESSIONS, Split, divide
from heimdall_trainer.errors import DataError
from heimdall_trainer.settings import DataSettings

log = structlog.get_logger(__name__)


class HeimdallDataModule(L.LightningDataModule):
    """Training, validation and test data of recording sessions."""

    def __init__(
        self,
        settings: DataSettings,
        data: DataSpec,
        *,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 42,
        augmentation: Augmentation | None = None,
        augment: bool = True,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is read before `setup`.

        Args:
            settings: Database, store and cache.
            data: Which sessions, and how they are divided.
            batch_size: Transmissions in a batch, per device.
            num_workers: Processes that load data, per device.
            seed: Seed of split, order and augmentation.
            augmentation: How training samples are varied; the usual way if None.
            augment: Whether they are varied at all.
            beat: Is called after each recording that was looked at, so that somebody hears that it goes on.
        """
        super().__init__()
        self._beat = beat
        self._settings = settings
        self._data = data
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._seed = seed
        self._augmentation = (augmentation or Augmentation()) if augment else None
        store, caches = RecordingStore.open(settings), Caches.open(settings)
        self._source = FeatureSource(store, caches)
        self._arrivals = ArrivalSource(store, caches) if data.arrivals else None
        self._kept: Split | None = None
        """The split of the training that goes on."""
        self._found: tuple[Split, list[Transmission]] | None = None
        self._agreed = False

    @property
    def split(self) -> Split:
        """Which session is on which side."""
        return self._load()[0]

    def prepare_data(self) -> None:
        """Compute all features, once per node.

        Raises:
            ConfigurationError: Sessions are missing, not approved, or too few.
            DataError: Too many recordings can't be read.
            ConnectionError: Database or store do not answer.
        """
        # Without the others: Lightning asks one process of each node alone, which they wait for as long as it takes.
        self._found = self._found or self._find()

    def setup(self, stage: str | None = None) -> None:
        """Find the data: in a group, one process of each node, for the node's cache; all take what the first has found.

        Raises what `prepare_data` does.
        """
        del stage
        self._load()

    def train_dataloader(self) -> ResumableLoader:
        """Batches for training, in an order that depends on seed and epoch alone."""
        return self._loader(self.split.train, training=True)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches for validation; empty where the spec keeps no sessions for it."""
        return self._loader(self.split.validation) if self.split.validation else []

    def test_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches for the test; empty where the spec keeps no sessions for it."""
        return self._loader(self.split.test) if self.split.test else []

    def dataset(self, session_ids: tuple[str, ...], *, training: bool = False) -> HeimdallDataset:
        """The dataset of some of the sessions.

        Raises:
            DataError: No recording of theirs can be read.
        """
        chosen = [item for item in self._load()[1] if item.session_id in set(session_ids)]
        if not chosen:
            raise DataError(f"the recording sessions {', '.join(session_ids)} hold no readable recording")
        return HeimdallDataset(
            chosen,
            self._source,
            augmentation=self._augmentation if training else None,
            arrivals=self._arrivals,
            seed=self._seed,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint and the model hold of the data: whoever evaluates them must know what they have seen."""
        return {SESSIONS: self.split.sides}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep to the sessions of the checkpoint that training goes on from, whatever was approved since.

        Lightning calls it when the data is there already. Called before, nothing is found in vain.

        Args:
            state: What `state_dict` gave; of an older checkpoint that told of no sessions, nothing.
        """
        if SESSIONS not in state:
            return
        self._kept = Split.of(state[SESSIONS])
        if self._found is not None and self._found[0] != self._kept:
            self._found, self._agreed = None, False

    def dataset_identity(self) -> dict[str, Any]:
        """What was trained on, for tracking.

        Returns:
            `digest` (see `digest_of`), counts, and each side's sessions.
        """
        split, transmissions = self._load()
        return {
            "digest": digest_of(transmissions),
            "transmissions": len(transmissions),
            "recordings": sum(len(sent.recordings) for sent in transmissions),
            "train_sessions": list(split.train),
            "validation_sessions": list(split.validation),
            "test_sessions": list(split.test),
        }

    def _load(self) -> tuple[Split, list[Transmission]]:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._found is None and (group.is_first_of_node() or not together):
            self._found = self._find()
        if together and not self._agreed:
            # Not each its own, which may differ: a session may be approved between two queries.
            self._found, self._agreed = group.from_first(self._found), True
        assert self._found is not None  # noqa: S101 - the first has found it
        return self._found

    def _find(self) -> tuple[Split, list[Transmission]]:
        with closing(SessionStore.open(self._settings)) as database:
            split = self._kept
            split = divide(database, self._data, self._seed) if split is None else _still_there(split, database)
            transmissions = database.transmissions(split.ids)
        kept = readable(transmissions, self._source, self._arrivals, self._settings, self._beat)
        _check_sides(split, {item.session_id for item in kept})
        log.info("data ready", train=len(split.train), validation=len(split.validation), test=len(split.test))
        return split, kept

    def _loader(self, session_ids: tuple[str, ...], *, training: bool = False) -> ResumableLoader:
        trainer = self.trainer
        return ResumableLoader(
            self.dataset(session_ids, training=training),
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            seed=self._seed,
            shuffle=training,
            replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            pin_memory=torch.cuda.is_available(),
        )


def digest_of(transmissions: Iterable[Transmission]) -> str:
    """SHA-256 of all that a training is told by transmissions, in any order: recordings, and what is true of them.

    A place that was corrected is another truth, and a scale or a rate another input, of the same samples.
    """
    facts = [
        [
            *(sent.session_id, sent.id, sent.latitude, sent.longitude, *sent.origin, sent.center_frequency_hz),
            *(about.receiver_id, about.latitude, about.longitude, about.altitude_m, about.noise_figure_db),
            *(heard.sha256, heard.sample_count, heard.full_scale_dbm, heard.sample_rate_hz),
        ]
        for sent in transmissions
        for heard in sent.recordings
        for about in (heard.receiver,)
    ]
    return hashlib.sha256("\n".join(sorted(map(json.dumps, facts))).encode()).hexdigest()


def _still_there(split: Split, database: SessionStore) -> Split:
    """The split of a training that goes on, if it still can.

    Raises:
        DataError: Sessions were removed.
    """
    gone, withdrawn = database.changed(split.ids)
    if gone:
        raise DataError(
            f"the checkpoint to go on from was trained with recording sessions that the database no longer holds: "
            f"{', '.join(gone[:NAMED_IDS])}{' …' if len(gone) > NAMED_IDS else ''}; restore them, or begin a new run"
        )
    if withdrawn:
        log.warning(
            "recording sessions are approved no longer; the training that has begun goes on", sessions=withdrawn
        )
    return split


def _check_sides(split: Split, heard: set[str]) -> None:
    """A side that nothing can be read of is told before training: the test would find out hours later.

    Raises:
        DataError: A side has sessions, and none of them has a readable recording.
    """
    for side, ids in split.sides.items():
        if ids and not heard & set(ids):
            raise DataError(
                f"no recording of the sessions kept for {side} can be read ({', '.join(ids)}): bring them back, or "
                "leave these sessions out with spec.data.sessions.ids"
            )
    silent = sorted(set(split.ids) - heard)
    if silent:
        log.warning("these recording sessions have no readable recording", sessions=silent)
