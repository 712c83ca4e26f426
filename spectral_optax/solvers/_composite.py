"""T as a sum of the iterates of a composite polynomial: its steps and weights, in NumPy.

On σ in [0, S], with x₀ = σ/S,

    xₖ₊₁ = xₖ (1 + b xₖ² + c xₖ⁴) / m,        T(σ) ≈ Σ wₖ xₖ(σ).

Each step is scaled (m) so that |xₖ| ≤ 1 and rises from zero about 2.6 (c = 0) or 4 times
as steeply as the one before: xₖ is linear up to there and then stays of size one. The
iterates are a basis with every resolution from S down to the turning point σ* = d^(1/α),
and the degree of their sum grows as 3^K or 5^K with K steps.

In units of σ*, with x = σ/σ*,

    T = σ*^(1-α) x / (x^α + δ),        x in [0, e^R],        δ = 1

(δ is another number only where σ* is held inside of what float32 can tell apart), so that
α and R are all that a fit depends on. `fit` makes the largest relative error least over b,
c and w, and takes as few steps as a tolerance needs.
"""

import functools
from typing import NamedTuple

import numpy as np

# σ* is held between e^-MAX_REACH and e^-MIN_REACH of the largest σ.
MAX_REACH = 11.0
MIN_REACH = 0.5
# R is rounded up to a multiple of this, so that matrices of like sizes share a fit.
REACH_GRID = 0.0625
MAX_STEPS = {3: 16, 5: 11}
# Below e^-LOWEST of the largest σ no iterate turns.
LOWEST = 17.0
# Growth per step, in log σ, that no fit within 0.1 has done with more of.
_STEEPEST = {3: 0.85, 5: 1.25}
_POINTS = 300
_FINE_POINTS = 6000
_ITERATIONS = 70
_GRID = np.linspace(0, 1, 129)
# Where a search starts: (b,) and (b, c) alike at every step, from ones that rise and stay
# there to ones that come back to zero.
_STARTS = {
  3: ((-0.4,), (-0.55,), (-0.7,), (-0.85,), (-1.0,), (-1.15,)),
  5: ((-2.0, 1.2), (-2.3, 1.5), (-2.6, 1.8), (-3.0, 2.2), (-2.0, 1.0), (-3.4, 2.6)),
}
# Below this many tolerances a fit is tried again, from steps that differ by up to that.
_CLOSE, _AROUND = 2.0, 0.05
# Weights may cancel: Σ |wₖ xₖ| up to about the inverse of this root, in units of T.
_RIDGE = 1e-5


class Composite(NamedTuple):
  """Steps and weights for a batch.

  Attributes:
    steps: (batch, K, 2 or 3), factors of xₖ, xₖ³ (and xₖ⁵) in xₖ₊₁.
    weights: (batch, K + 1), in units of σ*^(1-α).
    error: (batch,), the largest relative error over [0, S].
  """

  steps: np.ndarray
  weights: np.ndarray
  error: np.ndarray


def turning_point(
  alpha: np.ndarray, damping: np.ndarray, largest: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(log σ*, R, δ) of maps on σ² in [0, largest], R rounded up."""
  top = np.log(largest) / 2
  with np.errstate(divide='ignore'):
    log_damping = np.maximum(np.log(damping), -1e4)
  turn = log_damping / np.maximum(alpha, 1e-3)
  held = np.clip(turn, top - MAX_REACH, top - MIN_REACH)
  reach = np.ceil((top - held) / REACH_GRID - 1e-9) * REACH_GRID
  with np.errstate(over='ignore'):
    delta = np.exp(log_damping - alpha * held)
  return held, reach, delta


def points(alpha: float, reach: float, delta: float, num: int) -> tuple[np.ndarray, np.ndarray]:
  """x₀ = σ/S in three stretches of (0, 1], and T in units of σ*^(1-α) there.

  Logarithmic where T bends; below that a few, since nothing else keeps steps that reach
  further from turning again; and even at the top, where iterates turn as often per σ.
  Where σ* is held from below, T starts with the line that it would have with σ* there.
  """
  seen = delta > 0.99
  low = -7 / max(alpha, 0.5) if seen else 0.0
  tenth, third = num // 10, num // 3
  below = np.linspace(min(low, reach - LOWEST), low, tenth, endpoint=False)
  middle = np.linspace(low, reach, num - tenth - third)
  top = reach + np.log(np.linspace(0.06, 0.999, third))
  log_x = np.sort(np.concatenate([below, middle, np.maximum(top, low)]))
  bend = log_x if seen else np.maximum(log_x, 0)
  return np.exp(log_x - reach), np.exp(log_x) / (np.exp(alpha * bend) + delta)


def iterate(x: np.ndarray, steps: np.ndarray) -> np.ndarray:
  """x₀ ... x_K, (..., K + 1), for `steps` (K, 2 or 3)."""
  iterates = [x]
  for step in steps:
    x = x * sum(a * x ** (2 * i) for i, a in enumerate(step))
    iterates.append(x)
  return np.stack(iterates, axis=-1)


def _forward(shape: np.ndarray, x0: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Iterates (starts, N, K + 1), ∂/∂shape (starts, N, K + 1, K q), and m (starts, K).

  `shape` (starts, K, q) holds b (and c).
  """
  starts, count, q = shape.shape
  powers = 2 * np.arange(1, q + 1)
  x = np.broadcast_to(x0, (starts, len(x0)))
  d = np.zeros((*x.shape, count * q))
  xs, ds, sizes = [x], [d], []
  for k in range(count):
    own = shape[:, None, k]
    curve = _GRID * (1 + (own * _GRID[:, None] ** powers).sum(-1))
    at = np.abs(curve).argmax(1)
    peak = np.take_along_axis(curve, at[:, None], axis=1)[:, 0]
    m = np.abs(peak)
    d_log_m = _GRID[at][:, None] ** (powers + 1) / peak[:, None]  # The peak is stationary.
    power = x[..., None] ** powers
    y = x * (1 + (own * power).sum(-1)) / m[:, None]
    slope = (1 + (own * power * (powers + 1)).sum(-1)) / m[:, None]
    d = d * slope[..., None]
    d[..., k * q : (k + 1) * q] += (
      x[..., None] * power / m[:, None, None] - y[..., None] * d_log_m[:, None]
    )
    x = y
    xs.append(x)
    ds.append(d)
    sizes.append(m)
  return np.stack(xs, 2), np.stack(ds, 2), np.stack(sizes, 1)


class _Search(NamedTuple):
  """Where a search is, from each of its starts.

  Attributes:
    shape: (starts, K, q), b (and c) of each step.
    error: (starts, N), relative errors.
    jacobian: (starts, N, K q), of error times Lawson's factors, weights eliminated.
    weights: (starts, K + 1).
    sizes: (starts, K), m of each step.
  """

  shape: np.ndarray
  error: np.ndarray
  jacobian: np.ndarray
  weights: np.ndarray
  sizes: np.ndarray


def _evaluate(shape: np.ndarray, x0: np.ndarray, target: np.ndarray, lawson: np.ndarray) -> _Search:
  starts, count, _ = shape.shape
  xs, ds, sizes = _forward(shape, x0)
  xs, ds = xs / target[:, None], ds / target[:, None, None]
  weighted = xs * lawson[:, :, None]
  # In units of the column, lest a weight that has to be large is held back.
  scale = np.sqrt((weighted**2).sum(1, keepdims=True) / len(x0))
  ridge = _RIDGE * np.sqrt(len(x0)) * np.eye(count + 1)
  ridge = np.broadcast_to(ridge, (starts, *ridge.shape))
  basis, factor = np.linalg.qr(np.concatenate([weighted / scale, ridge], axis=1))
  basis = basis[:, : len(x0)]
  right = (basis * lawson[:, :, None]).sum(1)
  weights = np.linalg.solve(factor, right[..., None])[..., 0] / scale[:, 0]
  error = (xs * weights[:, None]).sum(-1) - 1
  jacobian = np.einsum('snkp,sk->snp', ds, weights) * lawson[:, :, None]
  jacobian = jacobian - basis @ (basis.transpose(0, 2, 1) @ jacobian)
  return _Search(shape, error, jacobian, weights, sizes)


def _pick(keep: np.ndarray, new: _Search, old: _Search) -> _Search:
  at = lambda z: keep.reshape(-1, *[1] * (z.ndim - 1))
  return _Search(*(np.where(at(a), a, b) for a, b in zip(new, old, strict=True)))


def _improve(
  shape: np.ndarray, x0: np.ndarray, target: np.ndarray, enough: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Smaller largest errors from each start.

  Levenberg-Marquardt on the steps, with the weights eliminated (they are linear), under
  Lawson's factors, which turn least squares into least maximum. Ends where an error is `enough`.

  Returns:
    The best shape (K, q), its m and its weights.
  """
  starts, count, q = shape.shape
  low, high = (-1.5, -0.1) if q == 1 else (-6.0, 6.0)
  lawson = np.ones((starts, len(x0)))
  damping = np.full(starts, 1e-3)
  now = best = _evaluate(shape, x0, target, lawson)
  best_error = np.abs(now.error).max(1)
  for i in range(_ITERATIONS):
    if best_error.min() <= enough:
      break
    normal = now.jacobian.transpose(0, 2, 1) @ now.jacobian
    diagonal = np.einsum('sii->si', normal)
    floor = 1e-9 * diagonal.max(1, keepdims=True) + 1e-30
    normal = normal + (damping[:, None] * (diagonal + floor))[:, :, None] * np.eye(count * q)
    right = -(now.jacobian * (lawson * now.error)[:, :, None]).sum(1)
    step = np.linalg.solve(normal, right[..., None]).reshape(shape.shape)
    step *= np.minimum(1, 0.3 / (np.abs(step).max((1, 2), keepdims=True) + 1e-30))
    trial = _evaluate(np.clip(now.shape + step, low, high), x0, target, lawson)
    better = ((lawson * trial.error) ** 2).sum(1) <= ((lawson * now.error) ** 2).sum(1)
    now = _pick(better, trial, now)
    damping = np.clip(np.where(better, damping * 0.3, damping * 4), 1e-9, 1e6)
    largest = np.abs(now.error).max(1)
    best = _pick(largest < best_error, now, best)
    best_error = np.minimum(best_error, largest)
    if i % 3 == 2:
      factor = lawson * np.maximum(np.abs(now.error) / largest[:, None], 1e-2) ** 0.4
      lawson = np.maximum(factor / np.sqrt((factor**2).mean(1, keepdims=True)), 1e-4)
      now = _evaluate(now.shape, x0, target, lawson)
  at = int(np.argmin(best_error))
  return best.shape[at], best.sizes[at], best.weights[at]


@functools.lru_cache(maxsize=512)
def _fit(
  alpha: float, reach: float, delta: float, degree: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, float]:
  """Steps, weights and error for one map."""
  x0, target = points(alpha, reach, delta, _POINTS)
  q = (degree - 1) // 2
  proportional = (target / x0).max() / (target / x0).min()
  error = (proportional - 1) / (proportional + 1)
  weights = np.array([(target / x0).max() * 2 / (1 + proportional)])
  best = np.zeros((0, q + 1)), weights, float(error)
  fine_x0, fine_target = points(alpha, reach, delta, _FINE_POINTS)
  first = max(1, int(reach / _STEEPEST[degree]))
  previous = None
  for count in range(first, MAX_STEPS[degree] + 1):
    if best[2] <= tolerance:
      break
    starts = np.repeat(np.array(_STARTS[degree])[:, None], count, axis=1)
    if previous is not None:  # One more step at either end: never worse.
      more = [[previous[0], *previous], [*previous, previous[-1]]]
      starts = np.concatenate([starts[1::2], np.array(more)])
    if alpha > 2:  # T falls steeply, and steps have to differ: more places to start from.
      seeded = np.random.default_rng(count).uniform(0, 1, (6, count, 1))
      low, high = (np.array(_STARTS[degree])[i] for i in (0, -1))
      starts = np.concatenate([starts, low + seeded * (high - low)])
    for _ in range(3):
      shape, sizes, weights = _improve(starts, x0, target, 0.8 * tolerance)
      steps = np.concatenate([np.ones((count, 1)), shape], axis=1) / sizes[:, None]
      error = float(np.abs(iterate(fine_x0, steps) @ weights / fine_target - 1).max())
      if previous is None or len(previous) < count or error <= best[2]:
        previous = shape
      if error < best[2]:
        best = steps, weights, error
      if not tolerance < best[2] < _CLOSE * tolerance or len(best[0]) < count:
        break
      # So near, a look around is cheaper than a step more in every update to come.
      random = np.random.default_rng(count)
      starts = previous + random.uniform(-_AROUND, _AROUND, (6, *previous.shape))
      starts[0] = previous
  return best


def fit(
  alpha: np.ndarray, reach: np.ndarray, delta: np.ndarray, degree: int, tolerance: float
) -> Composite:
  """As few steps of `degree` 3 or 5 as let every error meet `tolerance`; for (batch,).

  If `MAX_STEPS` are not enough, the best that was found; `error` says how good it is.
  """
  each = [
    _fit(*map(float, one), degree, float(tolerance))
    for one in np.stack([alpha, reach, delta], axis=1).round(6)
  ]
  count = max(len(steps) for steps, _, _ in each)
  # A step that is left out changes nothing, and has no weight.
  rest = np.eye(1, (degree + 1) // 2)
  steps = [np.concatenate([s, np.repeat(rest, count - len(s), axis=0)]) for s, _, _ in each]
  weights = [np.pad(w, (0, count + 1 - len(w))) for _, w, _ in each]
  return Composite(np.stack(steps), np.stack(weights), np.array([e for _, _, e in each]))
