"""The rows of a learned verbalizer, fitted while the prompt stands still.

With the prompt fixed, the LM's word scores and states are fixed too, and the best rows are a small convex
problem: a logistic regression that starts from the manual prompt. How far it may leave that is chosen by
cross-validation inside the training texts, and costs: of few texts the likeliest choice is half chance.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from .calibration import Calibration, temperature

__all__ = ["HeldOut", "Reading", "choose_reading", "fit_rows", "fit_without_words", "in_folds", "leaves_out_words"]

Array = NDArray[np.float64]

SHARES = (0.2, 0.8)  # of the state at the answer and of the mean state of the text
# Word scales and strengths, from the nearest to the manual prompt to the farthest.
CANDIDATES = ((2.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 0.25), (0.5, 0.25), (0.5, 0.05))
WITHOUT_WORDS = (0.0, 0.25)
UNCHOSEN = (1.0, 0.25)  # where no two classes have two texts
FEW_CLASSES = 10  # of more, rows that are judged while they have seen a quarter less ask for too strong a pull
OF_MANY = (0.5, 0.25)  # its word scale, and its strength where a class has one text; where it has n, an n-th
ENOUGH_OF_MANY = 8  # texts of a class, on average, from which on costly label words of many gain nothing
LEAST_STRENGTH = 0.01
SHARES_OF_MANY = (SHARES, (0.0, 1.0))  # whether the state at the answer tells many classes apart depends on the LM
UNCHOSEN_OF_MANY = (1.0, 0.05)
STEP = 0.5  # nats that each step away costs, of the log-likelihood of all held-out texts together
STEP_TO_LAST = 0.5  # nats that reading texts in the last layer costs, where topics are told apart
BIAS_STRENGTH = 0.1
FOLDS = 4
MOST_CHOOSING = 500


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a learned verbalizer reads of the LM.

    Attributes
    ----------
    word_scale : float
        Weight of the label words' own scores.
    gain : ndarray of shape (S,)
        Factor of every number of the state.
    center : ndarray of shape (S,)
        Taken off the state first.
    strength : float
        Of the rows' pull to zero, which is the manual prompt, in units of one observation.
    last : bool
        Whether texts are read in the LM's last layer, not at five sixths of its depth.
    """

    word_scale: float
    gain: Array
    center: Array
    strength: float
    last: bool

    def features(self, states: Array) -> Array:
        """States (N, S) as the rows read them."""
        return (states - self.center) * self.gain


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What rows that were fitted to other texts say of some.

    Attributes
    ----------
    index : ndarray of shape (M,)
        Which texts.
    scores : ndarray of shape (M, C)
        Their class scores, uncalibrated.
    in_turn : bool
        Whether the rows saw most of these, when they were asked about the others; or else none of them.
    """

    index: NDArray[np.intp]
    scores: Array
    in_turn: bool = True


def fit_rows(
    base: Array, features: Array, y: NDArray[np.intp], weight: Array, *, strength: float
) -> tuple[Array, Array]:
    """Rows and biases of least penalised negative log-likelihood on top of given scores.

    Parameters
    ----------
    base : ndarray of shape (N, C)
        Class scores that the rows add to.
    features : ndarray of shape (N, S)
    y : ndarray of shape (N,)
        Classes as indices.
    weight : ndarray of shape (N,)
    strength : float
        Of the pull of the rows to zero, in units of one observation.

    Returns
    -------
    rows : ndarray of shape (C, S)
    bias : ndarray of shape (C,)
    """
    # The best rows are combinations of the texts: few texts make a small problem, however wide the states are.
    few = 4 * features.shape[0] < features.shape[1]
    axes, read = _axes(features) if few else (None, features)
    n_classes, width = base.shape[1], read.shape[1]
    truth = np.eye(n_classes)[y]

    def loss(theta: Array) -> tuple[float, Array]:
        rows, bias = theta[:-n_classes].reshape(n_classes, width), theta[-n_classes:]
        logs = log_softmax(base + read @ rows.T + bias, axis=1)  # (N, C)
        residual = weight[:, None] * (np.exp(logs) - truth)
        value = (
            -(weight[:, None] * truth * logs).sum()
            + strength * (rows**2).sum() / 2
            + BIAS_STRENGTH * (bias**2).sum() / 2
        )
        return value, np.concatenate(
            [(residual.T @ read + strength * rows).ravel(), residual.sum(axis=0) + BIAS_STRENGTH * bias]
        )

    theta = minimize(loss, np.zeros(n_classes * (width + 1)), jac=True, method="L-BFGS-B", options={"maxiter": 100}).x
    rows = theta[:-n_classes].reshape(n_classes, width)
    return rows if axes is None else rows @ axes, theta[-n_classes:]


def fit_without_words(states: Array, y: NDArray[np.intp], weight: Array, n_classes: int) -> tuple[Array, Array]:
    """Rows (C, S) and biases (C,) of many classes that read states (N, S) as they are, and nothing else."""
    center = states.mean(axis=0)
    gain = 1 / _spread(states)
    with threadpool_limits(1, user_api="blas"):
        rows, bias = fit_rows(
            np.zeros((len(y), n_classes)),
            (states - center) * gain,
            y,
            weight,
            strength=_strength_of_many(n_classes, len(y)),
        )
    rows = rows * gain
    return rows, bias - rows @ center


def _spread(states: Array) -> float:
    """Root of the mean squared distance of states (N, S) from their mean."""
    return float(np.sqrt(((states - states.mean(axis=0)) ** 2).sum(axis=1).mean())) + 1e-9


def _strength_of_many(n_classes: int, n: int) -> float:
    """Of the pull of the rows of many classes, of which there are so many texts."""
    return max(LEAST_STRENGTH, OF_MANY[1] * n_classes / n)


def _axes(features: Array) -> tuple[Array, Array]:
    """Orthonormal axes (N, S) of the space that N texts span, and the texts' coordinates (N, N) there."""
    columns, corner = np.linalg.qr(features.T)  # (S, N), (N, N)
    return columns.T, corner.T


def choose_reading(
    base: Array,
    states: Array,
    y: NDArray[np.intp],
    weight: Array,
    *,
    split: int,
    seed: int,
    last: Array | None = None,
    costly_words: bool = False,
) -> tuple[Reading, Calibration, HeldOut]:
    """What to read: the likeliest by texts held out in turn, less `STEP` for every nearer reading passed over.

    Each reading is judged at its own best temperature; one in the last layer costs `STEP_TO_LAST` more. Of more than
    `FEW_CLASSES` only the layer and the shares of the two states are chosen, and the strength follows from how many
    texts a class has; with enough of them, words that cost passes of their own are left out.

    Parameters
    ----------
    base : ndarray of shape (N, C)
        The calibrated manual prompt's class scores.
    states : ndarray of shape (N, S)
        The state at the answer, and from column `split` on the mean state of the text.
    y, weight : ndarray of shape (N,)
    split : int
    seed : int
        Decides the folds, and which texts are used if there are many.
    last : ndarray of shape (N, S), optional
        States of which the mean one of the text is that of the last layer, if these may be read as well.
    costly_words : bool
        Whether label words cost passes of their own: then leaving them out, which saves these, is a candidate for
        few classes, and what is done for many (`leaves_out_words`).

    Returns
    -------
    reading : Reading
    calibration : Calibration
        The temperature that suits the held-out scores, tried on them; none of too few.
    held_out : HeldOut
        All texts, held out in turn, but for those that are the only one of their class; of more texts than choose one
        in four, or less, held out once; none where no two classes have two texts, so that nothing is chosen.
    """
    sizes = (split, states.shape[1] - split)
    left_out = costly_words and leaves_out_words(base.shape[1], len(y))
    layers = [states] if last is None else [states, last]
    spread = [[_spread(part) for part in np.split(layer, [split], axis=1)] for layer in layers]

    def reading(scale: float, strength: float, shares: tuple[float, float] = SHARES, layer: int = 0) -> Reading:
        gain = np.repeat(np.sqrt(shares) / spread[layer], sizes)
        return Reading(0.0 if left_out else scale, gain, layers[layer].mean(axis=0), strength, layer > 0)

    few_classes = base.shape[1] <= FEW_CLASSES
    chosen = _of_all_classes(y, min(len(y), MOST_CHOOSING), seed)
    several = chosen[_counts(y[chosen]) > 1]
    many = len(chosen) < len(y)
    if len(np.unique(y[several])) < 2:
        unchosen = reading(*UNCHOSEN) if few_classes else reading(*UNCHOSEN_OF_MANY, layer=len(layers) - 1)
        if many:
            return unchosen, *_held_out_once(base, layers[unchosen.last], y, weight, unchosen, seed)
        return unchosen, Calibration.none(base.shape[1]), HeldOut(np.empty(0, np.intp), np.empty((0, base.shape[1])))
    parts = in_folds(y[several], FOLDS, seed)

    def held_out(tried: Reading) -> tuple[float, Calibration, Array]:
        scores = np.empty((len(several), base.shape[1]))
        for outside in parts:
            inside = chosen[~np.isin(chosen, several[outside])]
            scores[outside] = _unseen(base, layers[tried.last], y, weight, tried, inside, several[outside])
        calibration = temperature(scores, y[several], sample_weight=weight[several])
        logs = log_softmax(calibration.apply(scores), axis=1)[np.arange(len(several)), y[several]]
        return float((weight[several] * logs).sum()), calibration, scores

    if few_classes:
        candidates = [(*candidate, SHARES) for candidate in (*CANDIDATES, *([WITHOUT_WORDS] if costly_words else []))]
    else:
        strength = _strength_of_many(base.shape[1], len(y))
        candidates = [(OF_MANY[0], strength, shares) for shares in SHARES_OF_MANY]
    found = [
        (reading(*candidate, layer), STEP * i + STEP_TO_LAST * layer)
        for layer in range(len(layers))
        for i, candidate in enumerate(candidates)
    ]
    judged = [held_out(tried) for tried, _ in found]
    best = max(range(len(found)), key=lambda i: judged[i][0] - found[i][1])
    chosen_reading, (_, calibration, scores) = found[best][0], judged[best]
    # Those that choose may be few of each of many classes: rows fitted to them are much worse than the final ones.
    if many:
        once = _held_out_once(base, layers[chosen_reading.last], y, weight, chosen_reading, seed)
        return chosen_reading, *once
    return chosen_reading, calibration.tried_on(scores, y[several]), HeldOut(several, scores)


def leaves_out_words(n_classes: int, n: int) -> bool:
    """Whether rows of so many classes, of which there are so many texts, do without label words that cost passes."""
    return n_classes > FEW_CLASSES and n >= ENOUGH_OF_MANY * n_classes


def in_folds(y: NDArray[np.intp], n: int, seed: int) -> list[NDArray[np.intp]]:
    """Indices of texts that are held out together: each once, in at most `n` folds that are alike in their classes."""
    folds = StratifiedKFold(min(n, _counts(y).max()), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # its texts are in as many folds
        return [outside for _, outside in folds.split(y, y)]


def _counts(y: NDArray[np.intp]) -> NDArray[np.intp]:
    """How many texts the class of each text has."""
    counts: NDArray[np.intp] = np.bincount(y)[y]
    return counts


def _of_all_classes(y: NDArray[np.intp], n: int, seed: int) -> NDArray[np.intp]:
    """Indices of `n` texts, of every class in proportion, in random order."""
    order = np.random.default_rng(seed).permutation(len(y))
    by_class = np.argsort(y[order], kind="stable")
    return order[np.sort(by_class[np.linspace(0, len(y), n, endpoint=False, dtype=int)])]


def _unseen(
    base: Array,
    states: Array,
    y: NDArray[np.intp],
    weight: Array,
    reading: Reading,
    inside: NDArray[np.intp],
    outside: NDArray[np.intp],
) -> Array:
    """Class scores of some texts by rows that are fitted to others."""

    def read(index: NDArray[np.intp]) -> tuple[Array, Array]:
        return reading.word_scale * base[index], reading.features(states[index])

    rows, bias = fit_rows(*read(inside), y[inside], weight[inside], strength=reading.strength)
    words, features = read(outside)
    scores: Array = words + features @ rows.T + bias
    return scores


def _held_out_once(
    base: Array, states: Array, y: NDArray[np.intp], weight: Array, reading: Reading, seed: int
) -> tuple[Calibration, HeldOut]:
    """At most `MOST_CHOOSING` texts of all classes, and the temperature that suits them, tried on them."""
    outside = _of_all_classes(y, min(len(y) // FOLDS, MOST_CHOOSING), seed)
    outside = outside[_counts(y)[outside] > 1]
    inside = np.setdiff1d(np.arange(len(y)), outside)
    scores = _unseen(base, states, y, weight, reading, inside, outside)
    calibration = temperature(scores, y[outside], sample_weight=weight[outside]).tried_on(scores, y[outside])
    return calibration, HeldOut(outside, scores, in_turn=False)
