"""Plots of a localizer for people: where it errs, whether its uncertainty is honest, how it learned."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec

import numpy as np

from heimdall_trainer.evaluation import Predictions
from heimdall_trainer.model import metrics

PANELS: Final = 4
"""Sessions that the error map shows: those with the most transmissions."""
DPI: Final = 150
LEVELS: Final = np.linspace(0.01, 0.99, 99)
MARKED: Final = tuple(metrics.LEVELS.values())
"""Levels of one and two standard deviations on a line, which the metrics are named after."""
CHANCE_Z: Final = 1.96
"""The band that chance alone stays within 95 % of the time, in standard deviations of a share."""
# Colours that are told apart by most eyes and in print (Okabe and Ito 2008).
TRUE, PREDICTED, RECEIVER, VALIDATION = "#009E73", "#D55E00", "#333333", "#0072B2"
STYLE: Final[Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "font.size": 10,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}

P = ParamSpec("P")
History = Sequence[tuple[int, float]]
"""Values of a metric by training step."""


def _styled(plot: Callable[P, Path]) -> Callable[P, Path]:
    """Draw in our style; matplotlib's own settings are left alone."""

    @functools.wraps(plot)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Path:
        import matplotlib as mpl

        with mpl.rc_context(STYLE):
            return plot(*args, **kwargs)

    return styled


def draw(predictions: Predictions, history: Mapping[str, History], folder: Path) -> list[Path]:
    """Draw what there is to draw.

    Args:
        predictions: On a test split.
        history: The run's `train/loss_step` and `val/loss`; without them no loss curves are drawn.
        folder: Where the PNGs go; made when missing.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [error_map(predictions, folder / "error_map.png"), calibration(predictions, folder / "calibration.png")]
    if any(history.values()):
        files.append(loss_curves(history, folder / "loss.png"))
    return files


@_styled
def error_map(predictions: Predictions, file: Path) -> Path:
    """True and predicted places with the receivers, a panel for each session."""
    sessions = [name for name, _ in Counter(predictions.sessions).most_common(PANELS)]
    columns = min(2, len(sessions))
    rows = math.ceil(len(sessions) / columns)
    figure = _figure(5.6 * columns, 5.2 * rows + 0.9)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, session in zip(panels, sessions, strict=False):
        _session(panel, predictions, session)
    for panel in panels[len(sessions) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    if len(sessions) > 1:
        left_out = len(set(predictions.sessions)) - len(sessions)
        more = f"; {left_out} more sessions are not shown" if left_out else ""
        figure.suptitle(f"All sessions: {_summary(predictions.errors_m)}{more}")
    return _save(figure, file)


@_styled
def calibration(predictions: Predictions, file: Path) -> Path:
    """How many true places the ellipses of each nominal level hold."""
    squares = predictions.squares
    observed = [float((squares <= metrics.ellipse_bound(level)).mean()) for level in LEVELS]
    chance = CHANCE_Z * np.sqrt(LEVELS * (1 - LEVELS) / len(squares))
    figure = _figure(5.6, 5.8)
    panel = figure.subplots()
    panel.plot([0, 1], [0, 1], "--", color=RECEIVER, linewidth=1, label="perfectly calibrated")
    panel.fill_between(
        LEVELS,
        np.clip(LEVELS - chance, 0, 1),
        np.clip(LEVELS + chance, 0, 1),
        color="#bbbbbb",
        alpha=0.4,
        linewidth=0,
        label=f"chance, {len(squares)} transmissions (95 %)",
    )
    panel.plot(LEVELS, observed, color=PREDICTED, linewidth=2, label="observed")
    for level in MARKED:
        share = float((squares <= metrics.ellipse_bound(level)).mean())
        marker = "o" if level == MARKED[0] else "s"
        label = f"{100 * share:.0f} % within the {100 * level:.0f} % ellipse"
        panel.plot(level, share, marker, color=PREDICTED, markersize=8, label=label, clip_on=False, zorder=4)
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set(xlabel="nominal coverage of the ellipse", ylabel="share of true places within it")
    panel.set_title("Calibration: below the diagonal it is too sure of itself")
    panel.legend(loc="upper left")
    return _save(figure, file)


@_styled
def loss_curves(history: Mapping[str, History], file: Path) -> Path:
    """Training and validation loss over the training's steps."""
    figure = _figure(7.2, 4.4)
    panel = figure.subplots()
    train, validation = _by_step(history.get("train/loss_step", ())), _by_step(history.get("val/loss", ()))
    if len(train):
        panel.plot(*train.T, color=PREDICTED, alpha=0.3, linewidth=0.8)
        panel.plot(train[:, 0], _smoothed(train[:, 1]), color=PREDICTED, linewidth=2, label="training (running mean)")
    if len(validation):
        panel.plot(*validation.T, "o-", color=VALIDATION, linewidth=2, markersize=4, label="validation")
        step, value = validation[validation[:, 1].argmin()]
        panel.plot(step, value, "*", color=VALIDATION, markersize=14, label=f"best: {value:.4g} at step {step:.0f}")
    panel.set(xlabel="training step", ylabel="loss", title="Loss")
    panel.legend()
    return _save(figure, file)


def _session(panel: Any, predictions: Predictions, session: str) -> None:
    from matplotlib.patches import Ellipse

    mine = [index for index, name in enumerate(predictions.sessions) if name == session]
    truth, said, sigma = predictions.truth[mine], predictions.position[mine], predictions.sigma[mine]
    receivers = np.unique(np.concatenate([predictions.receivers[index] for index in mine]), axis=0)
    for place, spread in zip(said, sigma, strict=True):
        size = 2 * math.sqrt(metrics.ellipse_bound(MARKED[0])) * spread
        panel.add_patch(Ellipse(place, *size, facecolor=PREDICTED, alpha=0.08, linewidth=0))
    for true, place in zip(truth, said, strict=True):
        panel.plot(*np.stack([true, place]).T, color="#999999", linewidth=0.9, zorder=2)
    panel.scatter(*truth.T, s=34, color=TRUE, zorder=3, label="true")
    panel.scatter(*said.T, s=34, color=PREDICTED, marker="X", linewidths=0, zorder=3, label="predicted")
    panel.scatter([], [], s=160, color=PREDICTED, alpha=0.2, label="68 % ellipse")
    panel.scatter(*receivers.T, s=70, color=RECEIVER, marker="^", zorder=4, label="receiver")
    # What is looked at are places: an ellipse of one that is very unsure may go beyond the edge.
    seen = np.concatenate([truth, said, receivers])
    low, high = seen.min(0), seen.max(0)
    middle, reach = (low + high) / 2, 0.56 * max(1.0, float((high - low).max()))
    panel.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
    panel.set(aspect="equal", xlabel="east of the session's origin (m)", ylabel="north (m)")
    panel.set_title(f"{session}\n{_summary(predictions.errors_m[mine])}")


def _by_step(history: Iterable[tuple[int, float]]) -> Any:
    """Steps and values in order, shape (N, 2): of a step that was made twice the newer value, of numbers only."""
    values = {step: value for step, value in history if math.isfinite(value)}
    return np.array(sorted(values.items()), dtype=float).reshape(-1, 2)


def _smoothed(values: Any) -> Any:
    """A running mean over about a fiftieth of the values, which does not reach beyond the ends."""
    width = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _summary(errors_m: Any) -> str:
    median, most = (_metres(np.quantile(errors_m, share)) for share in (0.5, 0.9))
    return f"median error {median}, 90 % within {most}, {len(errors_m)} transmissions"


def _metres(value: Any) -> str:
    return f"{value / 1000:.2f} km" if value >= 10_000 else f"{value:.0f} m"  # noqa: PLR2004 - beyond, km read better


def _figure(width_in: float, height_in: float) -> Any:
    # Neither pyplot nor a display: figures are objects of their own, drawn by Agg.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file)
    return file
