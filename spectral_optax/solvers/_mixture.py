"""T as a mixture of damped Newton steps: where the poles are, and their weights.

For 0 ≤ α ≤ 2 the ratio T(σ)/σ = f(λ) = 1/(λ^(α/2) + d), λ = σ², is a Stieltjes function,

    f(λ) = c₀ + ∫ dμ(p) / (λ + p),        μ ≥ 0,

so that the map of any such α is a positive mixture of α = 2 maps with other dampings p.
A few of them are enough, and how few depends on how far λ reaches above the turning point
λ* = d^(2/α), below which f is flat. In units of it, x = λ/λ*,

    f = λ*^(-α/2) / (x^(α/2) + δ),        x in [0, e^R],    δ = 1

(δ is another number only where λ* is held inside of what float32 can tell apart), and

    1/(x^(α/2) + δ) ≈ c + Σ wᵢ / (1 + x/xᵢ).

`fit` finds poles xᵢ and weights so that the largest relative error is least: in NumPy,
cached, for α and d that are known while tracing. `traced_fit` is for those that are not:
the poles are interpolated between such fits, and the weights found by least squares, in
JAX.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax.solvers._fitting import MIN_REACH, denominator, least_squares_of_one, points

MAX_POLES = 10
_POINTS = 200


class Mixture(NamedTuple):
  """``1/(x^(α/2) + δ) ≈ constant + Σ weights / (1 + x/poles)`` for a batch of (α, R, δ).

  Attributes:
    poles: (batch, count).
    weights: (batch, count): what each pole contributes at x = 0.
    constant: (batch,).
    error: (batch,), the largest relative error over [0, e^R].
  """

  poles: np.ndarray | jax.Array
  weights: np.ndarray | jax.Array
  constant: np.ndarray | jax.Array
  error: np.ndarray | jax.Array


# ---------------------------------------------------------------------------------
# Known while tracing
# ---------------------------------------------------------------------------------


def _relative(theta, count, x, target):
  """Relative error of the mixture with logarithms θ of poles, weights, constant; and ∂/∂θ."""
  weights = np.exp(theta[:, count:])
  x_over_pole = x[:, :, None] * np.exp(-theta[:, None, :count])
  parts = weights[:, None, :-1] / (1 + x_over_pole) / target[:, :, None]
  constant = weights[:, None, -1:] / target[:, :, None]
  error = parts.sum(-1) + constant[..., 0] - 1
  return error, np.concatenate([parts * x_over_pole / (1 + x_over_pole), parts, constant], axis=-1)


def _improve(theta, count, alpha, reach, delta, steps):
  """Fewer errors at the same count.

  Levenberg-Marquardt on logarithms, which keeps everything positive, under Lawson's
  weights, which turn least squares into least maximum.
  """
  x = points(alpha, reach, delta, _POINTS)
  target = 1 / (x ** (alpha[:, None] / 2) + delta[:, None])
  error, jacobian = _relative(theta, count, x, target)
  lawson, damping = np.ones_like(x), np.full(len(alpha), 1e-3)
  best, best_error = theta, np.abs(error).max(1)
  for _ in range(steps):
    weighted = jacobian * lawson[:, :, None]
    normal = weighted.transpose(0, 2, 1) @ weighted
    diagonal = np.einsum('bii->bi', normal)
    ridge = damping[:, None] * (diagonal + 1e-9)
    right = -(weighted * (lawson * error)[:, :, None]).sum(1)
    step = np.linalg.solve(normal + ridge[:, None] * np.eye(theta.shape[1]), right[..., None])
    trial = theta + np.clip(step[..., 0], -1, 1)
    trial_error, trial_jacobian = _relative(trial, count, x, target)
    better = ((lawson * trial_error) ** 2).sum(1) <= ((lawson * error) ** 2).sum(1)
    theta = np.where(better[:, None], trial, theta)
    error = np.where(better[:, None], trial_error, error)
    jacobian = np.where(better[:, None, None], trial_jacobian, jacobian)
    damping = np.clip(np.where(better, damping * 0.3, damping * 4), 1e-12, 1e6)
    largest = np.abs(error).max(1)
    best = np.where((largest < best_error)[:, None], theta, best)
    best_error = np.minimum(best_error, largest)
    # Roots of Lawson's factors, slowed down and kept away from zero.
    factor = np.maximum(np.abs(error) / np.maximum(largest, 1e-300)[:, None], 1e-3) ** 0.25
    factor = lawson * np.where(better[:, None], factor, 1)
    lawson = np.maximum(factor / np.sqrt((factor**2).mean(1, keepdims=True)), 1e-4)
  return best, best_error


def _one_more(theta, count):
  """A start for count + 1 poles: the row of `count`, stretched at both ends."""
  poles, weights = theta[:, :count], theta[:, count:-1]
  order = np.argsort(poles, axis=1)
  poles, weights = (np.take_along_axis(z, order, axis=1) for z in (poles, weights))
  if count == 1:
    poles = np.concatenate([poles - 1.5, poles + 2.5], axis=1)
    weights = np.concatenate([weights - 0.5, weights - 1.5], axis=1)
  else:
    position = np.linspace(0.55, count + 0.15, count + 1)
    left = position.astype(int)
    share = position - left

    def stretch(z):
      z = np.concatenate([2 * z[:, :1] - z[:, 1:2], z, 2 * z[:, -1:] - z[:, -2:-1]], axis=1)
      return z[:, left] * (1 - share) + z[:, left + 1] * share

    poles, weights = stretch(poles), stretch(weights) - np.log1p(1 / count)
  return np.concatenate([poles, weights, theta[:, -1:] - 0.5], axis=1)


def _sorted(theta, count, error) -> Mixture:
  order = np.argsort(theta[:, :count], axis=1)
  poles, weights = (
    np.exp(np.take_along_axis(z, order, axis=1)) for z in (theta[:, :count], theta[:, count:-1])
  )
  return Mixture(poles, weights, np.exp(theta[:, -1]), error)


def _chain(alpha, reach, delta, steps=70):
  """Mixtures of 1, 2, 3, ... poles, each started from the one before."""
  theta = np.stack(
    [0.3 * reach * (2 - alpha), -np.log1p(delta), -np.log(np.exp(alpha / 2 * reach) + delta)],
    axis=1,
  )
  for count in range(1, MAX_POLES + 1):
    theta, error = _improve(theta, count, alpha, reach, delta, steps)
    yield _sorted(theta, count, error)
    theta = _one_more(theta, count)


@functools.lru_cache(maxsize=256)
def _fit(problems: tuple[tuple[float, float, float], ...], tolerance: float) -> Mixture:
  alpha, reach, delta = np.asarray(problems, np.float64).T
  exact = (alpha == 2) & (delta == 1)
  mixture = best = None
  for mixture in _chain(alpha, reach, delta):
    error = np.where(exact, 0, mixture.error)
    if best is None or error.max() < best.error.max():
      best = mixture._replace(error=error)
    if best.error.max() <= tolerance:
      break
  assert best is not None
  # At α = 2 one pole at the turning point is all there is.
  first = np.arange(best.poles.shape[1]) == 0
  return Mixture(
    np.where(exact[:, None], 1, best.poles),
    np.where(exact[:, None], first, best.weights),
    np.where(exact, 0, best.constant),
    best.error,
  )


def fit(alpha: np.ndarray, reach: np.ndarray, delta: np.ndarray, tolerance: float) -> Mixture:
  """Mixtures with as few poles as let every error meet `tolerance`, for NumPy (batch,).

  If `MAX_POLES` are not enough, the best that was found; `error` says how good it is.
  """
  problems = np.stack([alpha, reach, delta], axis=1).round(6)
  unique, place = np.unique(problems, axis=0, return_inverse=True)
  found = _fit(tuple(map(tuple, unique.tolist())), float(tolerance))
  place = place.reshape(-1)
  return Mixture(*(z[place] for z in found))


# ---------------------------------------------------------------------------------
# Traced
# ---------------------------------------------------------------------------------

# Between these, poles are interpolated.
_ALPHAS = np.array([0.25, 0.5, 0.85, 1.2, 1.6, 1.95])
_REACHES = np.array([1.0, 4.0, 8.0, 12.0, 16.0])


@functools.lru_cache(maxsize=16)
def _table(tolerance: float, reach: float) -> np.ndarray:
  """Logarithms of the poles, (alphas, reaches, poles): as many as meet `tolerance`.

  For all α of the table, and reaches up to `reach`.
  """
  alpha, reaches = (z.ravel() for z in np.meshgrid(_ALPHAS, _REACHES, indexing='ij'))
  asked = (reaches <= max(reach, MIN_REACH)) & (alpha >= 0.5)
  mixture = None
  for mixture in _chain(alpha, reaches, np.ones_like(alpha), steps=50):
    # Least squares, and poles from in between, are off by up to this much more.
    if mixture.error[asked].max() <= tolerance / 1.3:
      break
  assert mixture is not None
  return np.log(mixture.poles).reshape(len(_ALPHAS), len(_REACHES), -1)


def usual_poles(reach: float, tolerance: float) -> int:
  """How many `traced_fit` takes."""
  return _table(tolerance, reach).shape[-1]


def _interpolate(table: jax.Array, rows: np.ndarray, columns: np.ndarray, r, c) -> jax.Array:
  """Bilinear, and constant beyond the ends: (batch, poles) at r, c (batch,)."""

  def hats(grid, at):  # (batch, grid)
    at = jnp.clip(at, grid[0], grid[-1])[:, None]
    gap = np.diff(grid)
    left, right = np.append(np.inf, gap)[None], np.append(gap, np.inf)[None]
    grid = grid[None]
    return jnp.maximum(1 - jnp.where(at < grid, (grid - at) / left, (at - grid) / right), 0)

  return jnp.einsum('br,bc,rcp->bp', hats(rows, r), hats(columns, c), table, precision='highest')


def traced_fit(
  alpha: jax.Array, reach: jax.Array, delta: jax.Array, *, tolerance: float, usual_reach: float
) -> Mixture:
  """Mixtures for traced (batch,) values, with a number of poles that is not.

  As many as meet `tolerance` for α from 0.5 to 2 and R up to `usual_reach`. Beyond,
  the error grows; above α = 2 too, where weights become negative. `error` says how
  large it is.
  """
  table = jnp.asarray(_table(tolerance, usual_reach), alpha.dtype)
  rows, columns = _ALPHAS.astype(alpha.dtype), _REACHES.astype(alpha.dtype)
  log_poles = _interpolate(table, rows, columns, alpha, reach)
  # At α = 2 the pole at the turning point is exact and alone: one has to be there.
  nearest = jnp.abs(log_poles) == jnp.min(jnp.abs(log_poles), axis=1, keepdims=True)
  close = jnp.clip((2 - alpha) / (2 - rows[-1]), 0, 1)[:, None]
  log_poles = jnp.where(nearest, log_poles * close, log_poles)
  poles = jnp.exp(log_poles)

  x = points(alpha, reach, delta, _POINTS // 2, jnp)
  columns = jnp.concatenate(
    [1 / (1 + x[:, :, None] / poles[:, None]), jnp.ones_like(x)[:, :, None]], axis=-1
  )
  solution, error = least_squares_of_one(columns * denominator(x, alpha, delta)[:, :, None])
  return Mixture(poles, solution[:, :-1], solution[:, -1], error)
