"""√f as a sum of iterates of the logistic map: how many, and their weights.

From y₀ = λ/(2 λ_max) in [0, 1/2] the logistic map

    yₖ₊₁ = r yₖ (1 - yₖ)

goes up to r/4, its maximum, and stays below. For r up to about 3 it settles at 1 - 1/r: near
λ = 0 the k-th iterate rises as r^k λ, and from λ_max/r^k on it is of size one and flat. One
product of matrices more is a resolution r times finer, and with weights,

    √f(λ) ≈ c + Σ wₖ yₖ(λ),        f = (c + Σ wₖ yₖ)²

is a sum of such steps at all scales of λ. The square halves the digits that cancel where f
is smallest, which is why it pays. Nothing but the weights depends on α and d (r does,
smoothly), and they are linear: found by minimax (Lawson) in NumPy where α and d are known
while tracing, by least squares in JAX where they are not.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax.solvers._fitting import (
  MAX_REACH,
  MIN_REACH,
  denominator,
  least_squares_of_one,
  points,
)

MAX_STEPS = 30
_POINTS = 240
_TRACED_POINTS = 100
_LAWSON = 40
# Multiples of `rate` that are tried too: one step less in a quarter of the cases, and some that
# MAX_STEPS would not do for.
_STRETCHES = (1.03, 0.96)
# α that a traced one is expected among.
_ALPHAS = np.array([0.5, 0.85, 1.2, 1.6, 2.0, 2.8])


class Expansion(NamedTuple):
  """``√(1/(x^(α/2) + δ)) ≈ weights[0] + Σ weights[k + 1] yₖ`` for a batch.

  Attributes:
    rate: r, (batch,).
    weights: (batch, K + 2), for K steps of the map.
    error: (batch,), the largest relative error of the square over [0, e^R].
  """

  rate: np.ndarray | jax.Array
  weights: np.ndarray | jax.Array
  error: np.ndarray | jax.Array


def rate(alpha: Any, tolerance: float, xp: Any = np) -> Any:
  """The r that takes the fewest steps, to a tenth; a fit that is known looks around it.

  Searched for α from 0.5 to 4 and tolerances from 0.1 to 0.001: a large r is coarse.
  """
  coarse = max(0.2, 1 - 0.3 * math.log10(0.1 / tolerance)) if tolerance < 0.1 else 1.0
  return 2.15 + coarse * (0.25 + 0.65 * xp.minimum(xp.exp((0.5 - alpha) / 1.6), 1))


def iterates(share: Any, r: Any, steps: int) -> list[Any]:
  """[1, y₀ ... y_K] at λ/λ_max = `share`, (batch, num), for r (batch,)."""
  y = share / 2
  found = [share * 0 + 1, y]
  for _ in range(steps):
    y = r[:, None] * y * (1 - y)
    found.append(y)
  return found


def _squared(error: Any) -> Any:
  """The relative error of a square."""
  return 2 * error + error**2


# ---------------------------------------------------------------------------------
# Known while tracing
# ---------------------------------------------------------------------------------


def _columns(alpha, reach, delta, r, steps, num=_POINTS):
  """Iterates over √f, (batch, num, K + 2)."""
  x = points(alpha, reach, delta, num)
  root = np.sqrt(x ** (alpha[:, None] / 2) + delta[:, None])
  share = np.minimum(x * np.exp(-reach)[:, None], 1)
  return np.stack(iterates(share, r, steps), axis=-1) * root[:, :, None]


def _minimax(columns):
  """Weights with columns @ weights ≈ 1, the largest error least (Lawson); and that error."""
  batch, num, count = columns.shape
  lawson = np.ones((batch, num))
  best, least = np.zeros((batch, count)), np.full(batch, np.inf)
  for _ in range(_LAWSON):
    weighted = columns * lawson[:, :, None]
    scale = np.sqrt((weighted**2).mean(1))
    weighted = weighted / scale[:, None]
    normal = weighted.transpose(0, 2, 1) @ weighted + 1e-11 * num * np.eye(count)
    right = (weighted * lawson[:, :, None]).sum(1)
    weights = np.linalg.solve(normal, right[..., None])[..., 0] / scale
    error = np.abs((columns @ weights[..., None])[..., 0] - 1)
    largest = error.max(1)
    best = np.where((largest < least)[:, None], weights, best)
    least = np.minimum(least, largest)
    lawson = lawson * np.maximum(error / largest[:, None], 1e-2) ** 0.5
    lawson = np.maximum(lawson / np.sqrt((lawson**2).mean(1, keepdims=True)), 1e-4)
  return best, least


@functools.lru_cache(maxsize=256)
def _fit(
  problems: tuple[tuple[float, float, float], ...],
  tolerance: float,
  stretches: tuple[float, ...] = _STRETCHES,
) -> Expansion:
  alpha, reach, delta = np.asarray(problems, np.float64).T
  # No fit within 0.3 has less than half a step for each e-fold of λ.
  first = max(1, int(0.5 * reach.max())) if tolerance < 0.3 else 0
  usual = rate(alpha, tolerance)

  def with_steps(steps):
    r, (weights, error) = usual, _minimax(_columns(alpha, reach, delta, usual, steps))
    for other in (usual * stretch for stretch in stretches):
      # From more than four times too much, no other r helps.
      if tolerance < _squared(error.max()) < 4 * tolerance or steps == MAX_STEPS:
        tried, least = _minimax(_columns(alpha, reach, delta, other, steps))
        better = least < error
        r, error = np.where(better, other, r), np.where(better, least, error)
        weights = np.where(better[:, None], tried, weights)
    return r, weights, error

  r, weights, error = with_steps(first)
  for steps in range(first + 1, MAX_STEPS + 1):
    if _squared(error.max()) <= tolerance:
      break
    r, weights, error = with_steps(steps)
  return Expansion(r, weights, _squared(error))


def fit(alpha: np.ndarray, reach: np.ndarray, delta: np.ndarray, tolerance: float) -> Expansion:
  """As few steps as let every error meet `tolerance`, for NumPy (batch,).

  If `MAX_STEPS` are not enough, what they give; `error` says how good it is.
  """
  problems = np.stack([alpha, reach, delta], axis=1).round(6)
  unique, place = np.unique(problems, axis=0, return_inverse=True)
  found = _fit(tuple(map(tuple, unique.tolist())), float(tolerance))
  place = place.reshape(-1)
  return Expansion(*(z[place] for z in found))


# ---------------------------------------------------------------------------------
# Traced
# ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def usual_steps(reach: float, tolerance: float) -> int:
  """Steps that meet `tolerance` for α from 0.5 to 2.8 and this R."""
  reach = float(np.clip(reach, MIN_REACH, MAX_REACH))
  ones = np.ones_like(_ALPHAS)
  problems = tuple(zip(_ALPHAS.tolist(), (reach * ones).tolist(), ones.tolist(), strict=True))
  # At the r that `traced_fit` takes. Least squares are off by up to this much more than a minimax.
  return _fit(problems, tolerance / 1.5, ()).weights.shape[1] - 2


def traced_fit(
  alpha: jax.Array, reach: jax.Array, delta: jax.Array, *, tolerance: float, usual_reach: float
) -> Expansion:
  """For traced (batch,) values, with a number of steps that is not."""
  x = points(alpha, reach, delta, _TRACED_POINTS, jnp)
  steps, r = usual_steps(usual_reach, tolerance), rate(alpha, tolerance, jnp)
  share = jnp.minimum(x * jnp.exp(-reach)[:, None], 1)
  columns = jnp.stack(iterates(share, r, steps), axis=-1)
  root = jnp.sqrt(denominator(x, alpha, delta))
  weights, error = least_squares_of_one(columns * root[:, :, None])
  return Expansion(r, weights, _squared(error))
