"""Pictures, drawn with matplotlib if it is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .tuning import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_history", "figure"]


def figure(width: float, height: float) -> Figure:
    """An empty figure that no window and no global state knows of.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib; pip install 'verbtune[bench]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_history(history: History) -> Figure:
    """Loss and validation score, learning rate, and the gradient norm of every prompt token, by step."""
    steps = [s for s in history.steps if s.step > 0]
    drawing = figure(7, 7)
    loss, rate, norms = drawing.subplots(3, 1, sharex=True, height_ratios=(2, 1, 2))
    at = [s.step for s in steps]
    loss.plot(at, [s.loss for s in steps], color="C0", label="training loss")
    checked = [s for s in history.steps if s.validation_score is not None]
    if checked:
        loss.plot([s.step for s in checked], [-(s.validation_score or 0) for s in checked], "o-", color="C1",
                  label="validation loss")
    loss.axvline(history.best_step, color="grey", linestyle=":", label=f"kept: step {history.best_step}")
    loss.set_ylabel("loss (nats)")
    loss.legend()
    rate.plot(at, [s.learning_rate for s in steps], color="C2")
    rate.set_ylabel("learning rate")
    if steps and steps[0].gradient_norms:
        grid = np.array([s.gradient_norms for s in steps]).T  # (P, steps)
        image = norms.imshow(
            grid, aspect="auto", origin="lower", extent=(0.5, len(steps) + 0.5, -0.5, len(grid) - 0.5), cmap="viridis"
        )
        drawing.colorbar(image, ax=norms, label="gradient norm")
    norms.set_ylabel("prompt token")
    norms.set_xlabel("step")
    return drawing
