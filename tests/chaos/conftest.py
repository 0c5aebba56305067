"""Chaos has the release of the e2e tests."""

from tests.e2e.conftest import canaries, cluster, mlflow, release, trainer_loading

__all__ = ["canaries", "cluster", "mlflow", "release", "trainer_loading"]
