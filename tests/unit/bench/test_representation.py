"""What spectrograms keep of a delay: little, measured by somebody who knows all else."""

from __future__ import annotations

import pytest

from heimdall_trainer.data import physics
from tests.bench.representation import delay_errors_m


@pytest.mark.slow
@pytest.mark.parametrize(("modulation", "samples_m", "share"), [("fsk", 3.0, 8), ("ofdm", 0.33, 100)])
def test_spectrograms_lose_what_samples_hold(modulation: str, samples_m: float, share: float) -> None:
    from_spectrograms, from_samples = delay_errors_m(modulation)
    # 27 dBm over 1.5 km: some 30 dB above the noise.
    assert from_samples == pytest.approx(samples_m, rel=0.2)
    assert from_spectrograms > share * from_samples


def test_the_estimator_is_one_all_the_same() -> None:
    # Where the spectrogram shows when something happens, it finds the delay to a fraction of a sample.
    error_m, _ = delay_errors_m("fm")
    assert error_m < 0.2 * physics.SPEED_OF_LIGHT_M_S / 200e3
