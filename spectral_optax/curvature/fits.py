"""Exponents from spectra: straight lines through logarithms, and how sure one may be.

All logarithms are natural, all fits ordinary least squares with an intercept, R² the usual
one; whatever is not positive has no logarithm and is left out. These are the conventions of
A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes", arXiv:2606.02596, which
reproduce that paper's figures from its raw data:

    h_k ∝ σ_k^α        α: slope of log h_k on log σ_k, over the k with h_k > 0
    σ_k ∝ k^-γ         γ: minus the slope of log σ_k on log k
    h_(r) ∝ r^-s       s: the same of the positive h_k, sorted in decreasing order
    s ≈ α γ            the spectral transfer law that ties the three together

`masked_line` is the formula. It computes with NumPy in double precision, as everything else
in here does, or inside a jitted function with traced arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# A line through two points is perfect, and means nothing.
MIN_POINTS = 3


class Line(NamedTuple):
  """``y ≈ intercept + slope x``, by least squares; arrays of the batch's shape.

  Attributes:
    slope: NaN with fewer than two points, or where all have the same x.
    intercept: Likewise.
    r_squared: Of the fit; NaN where all y are the same too.
    num_points: That were fitted, int32.
    standard_error: Of the slope, from the residuals; NaN with fewer than three points.
  """

  slope: Any
  intercept: Any
  r_squared: Any
  num_points: Any
  standard_error: Any


class PowerLawFit(NamedTuple):
  """``y ≈ exp(log_constant) x^±exponent``, fitted as a straight line of logarithms.

  Attributes:
    exponent: α, γ or s; NaN where there is no fit.
    log_constant: Natural logarithm of the factor in front.
    r_squared: Of the line.
    num_points: How many points it goes through.
    standard_error: Of `exponent`, from the residuals.
    interval: (low, high) of a bootstrap; NaN unless one was asked for.
    reason: Why there is no fit; empty where there is one.
  """

  exponent: float
  log_constant: float
  r_squared: float
  num_points: int
  standard_error: float = float('nan')
  interval: tuple[float, float] = (float('nan'), float('nan'))
  reason: str = ''


class RankProfile(NamedTuple):
  """Which function of its rank k a spectrum follows.

  Attributes:
    best: "power_law", "exponential" or "lognormal": the smallest BIC; empty where
      there is no fit.
    bic: Of each, n log(RSS / n) + p log n.
    coefficients: Of each: (a, b) of a + b log k, (a, b) of a + b k, (a, b, c) of
      a + b log k + c (log k)².
    r_squared: Of each.
    num_points: n, the positive values.
    reason: Why there is no fit; empty where there is one.
  """

  best: str
  bic: dict[str, float]
  coefficients: dict[str, tuple[float, ...]]
  r_squared: dict[str, float]
  num_points: int
  reason: str = ''


# ---------------------------------------------------------------------------------
# The line
# ---------------------------------------------------------------------------------


def masked_line(x: ArrayLike, y: ArrayLike, mask: ArrayLike) -> Line:
  """Least squares over the points that a mask chooses: static shapes, so it can be jitted.

  Args:
    x: Abscissae, float, (..., points). What the mask leaves out may be anything.
    y: Ordinates, of the same shape.
    mask: Which points count, bool, of the same shape.

  Returns:
    A `Line` of arrays of shape (...): JAX arrays if an argument is one, else NumPy's.
  """
  xp: Any = jnp if any(isinstance(a, jax.Array) for a in (x, y, mask)) else np
  mask = xp.asarray(mask)
  x, y = xp.where(mask, xp.asarray(x), 0), xp.where(mask, xp.asarray(y), 0)

  def mean(a):
    return xp.sum(a, axis=-1, keepdims=True) / xp.maximum(count, 1)

  def ratio(a, b, defined):
    return xp.where(defined, a, np.nan) / xp.where(defined, b, 1)

  def spread(a, centred):
    """Sum of squares, and whether it is more than rounding has left."""
    size = xp.max(abs(a), axis=-1, initial=0)
    squares = xp.sum(centred**2, axis=-1)
    return squares, squares > n * (4 * xp.finfo(a.dtype).eps * size) ** 2

  count = xp.sum(mask, axis=-1, keepdims=True)
  n = count[..., 0]
  x_mean, y_mean = mean(x), mean(y)
  dx, dy = xp.where(mask, x - x_mean, 0), xp.where(mask, y - y_mean, 0)
  (sxx, x_varies), (syy, y_varies) = spread(x, dx), spread(y, dy)
  slope = ratio(xp.sum(dx * dy, axis=-1), sxx, x_varies & (n >= 2))
  residual = xp.sum((dy - slope[..., None] * dx) ** 2, axis=-1)
  return Line(
    slope,
    y_mean[..., 0] - slope * x_mean[..., 0],
    1 - ratio(residual, syy, y_varies),
    n.astype(np.int32),
    xp.sqrt(ratio(residual, (n - 2) * sxx, x_varies & (n >= 3))),
  )


def masked_power_law(x: ArrayLike, y: ArrayLike, mask: ArrayLike | None = None) -> Line:
  """The line of log y on log x over the points with x > 0 and y > 0; can be jitted.

  `fit_alpha` in a jitted function: the slope is α, of ``masked_power_law(sigma, h)``.

  Args:
    x: Float, (..., points).
    y: Of the same shape.
    mask: Which points may count at all, bool, of the same shape; None for all.

  Returns:
    A `Line`. NaN throughout, but for `num_points`, where a point that may count is
    not finite: a number that is not there must not leave a fit of the others.
  """
  xp: Any = jnp if any(isinstance(a, jax.Array) for a in (x, y, mask)) else np
  a, b = xp.asarray(x), xp.asarray(y)
  may = xp.ones(a.shape, bool) if mask is None else xp.asarray(mask)
  finite = xp.isfinite(a) & xp.isfinite(b)
  positive = may & finite & (a > 0) & (b > 0)
  log = lambda values: xp.log(xp.where(positive, values, 1))
  line = masked_line(log(a), log(b), positive)
  all_finite = xp.all(finite | ~may, axis=-1)
  clean = lambda part: xp.where(all_finite, part, np.nan)
  return Line(*map(clean, line))._replace(num_points=line.num_points)


# ---------------------------------------------------------------------------------
# The three exponents
# ---------------------------------------------------------------------------------


def fit_alpha(
  sigma: ArrayLike,
  h: ArrayLike,
  *,
  min_points: int = MIN_POINTS,
  bootstrap: int = 0,
  seed: int = 0,
  level: float = 0.95,
) -> PowerLawFit:
  """α of h_k ∝ σ_k^α: how the curvature along a direction follows its singular value.

  Args:
    sigma: Singular values σ_k ≥ 0 of a layer's gradient, (K,), in any order.
    h: Curvature h_k along the k-th singular direction, (K,); negative ones and zeros
      are left out of the fit.
    min_points: With fewer positive pairs there is no fit.
    bootstrap: How many times to draw the points anew, with replacement, for `interval`;
      0 for no interval.
    seed: Of those draws.
    level: What part of the draws lies in `interval`, in (0, 1).

  Returns:
    A `PowerLawFit` with `exponent` α; of NaN, with a `reason`, where there are too few
    positive points, all σ are the same, or a value is not finite.

  Raises:
    ValueError: shapes that do not match, a negative σ.
    TypeError: complex or traced values; in a jitted function use `masked_power_law`.
  """
  sigma, h = _spectrum('sigma', sigma), _values('h', h)
  if sigma.shape != h.shape:
    raise ValueError(f'sigma has shape {sigma.shape} and h has {h.shape}: give one h for each σ.')
  return _fit(sigma, h, 1, min_points, bootstrap, seed, level)


def fit_gamma(
  sigma: ArrayLike,
  *,
  min_points: int = MIN_POINTS,
  bootstrap: int = 0,
  seed: int = 0,
  level: float = 0.95,
) -> PowerLawFit:
  """γ of σ_k ∝ k^-γ, k = 1, 2, ...: how fast a gradient's spectrum decays.

  The points along a spectrum hang together, as those of `fit_decay` do: `standard_error`
  and `interval`, which take them for independent, are too narrow rather than too wide.

  Args:
    sigma: Singular values σ_k ≥ 0 in decreasing order, (K,). Zeros are left out.
    min_points: See `fit_alpha`, as for the others.
    bootstrap: Likewise.
    seed: Likewise.
    level: Likewise.

  Returns:
    A `PowerLawFit` with `exponent` γ, or NaN and a `reason`, as `fit_alpha`.

  Raises:
    ValueError: σ that is negative or not in decreasing order.
    TypeError: As `fit_alpha`.
  """
  sigma = _in_order('sigma', _spectrum('sigma', sigma))
  return _fit(_ranks(sigma), sigma, -1, min_points, bootstrap, seed, level)


def fit_decay(
  h: ArrayLike,
  *,
  min_points: int = MIN_POINTS,
  bootstrap: int = 0,
  seed: int = 0,
  level: float = 0.95,
) -> PowerLawFit:
  """The s of h_(r) ∝ r^-s: how fast the curvatures decay once they are sorted.

  Args:
    h: Curvatures, (K,), in any order; the positive ones are sorted, the others left out.
    min_points: See `fit_alpha`, as for the others.
    bootstrap: Likewise.
    seed: Likewise.
    level: Likewise.

  Returns:
    A `PowerLawFit` with `exponent` s, or NaN and a `reason`, as `fit_alpha`.

  Raises:
    TypeError: As `fit_alpha`.
  """
  h = np.sort(_values('h', h))[::-1]
  return _fit(_ranks(h), h, -1, min_points, bootstrap, seed, level)


def _fit(
  x: np.ndarray,
  y: np.ndarray,
  sign: int,
  min_points: int,
  bootstrap: int,
  seed: int,
  level: float,
) -> PowerLawFit:
  if min_points < 2:
    raise ValueError(f'min_points must be at least 2, got {min_points}: a line has two ends.')
  line = masked_power_law(x, y)
  nan, n = float('nan'), int(line.num_points)

  def no_fit(reason: str) -> PowerLawFit:
    return PowerLawFit(nan, nan, nan, n, reason=reason)

  if not (np.isfinite(x).all() and np.isfinite(y).all()):
    return no_fit('not finite')
  if n < min_points:
    return no_fit(f'{n} positive points of {len(x)}, fewer than {min_points}')
  if np.isnan(line.slope):
    return no_fit('all σ are the same')
  interval = (nan, nan)
  if bootstrap:
    interval = _bootstrap(x, y, sign, bootstrap, seed, level)
  return PowerLawFit(
    sign * float(line.slope),
    float(line.intercept),
    float(line.r_squared),
    n,
    float(line.standard_error),
    interval,
  )


def _bootstrap(
  x: np.ndarray, y: np.ndarray, sign: int, draws: int, seed: int, level: float
) -> tuple[float, float]:
  """Percentiles of the exponent over points drawn anew, with replacement."""
  if not 0 < level < 1:
    raise ValueError(f'level must lie between 0 and 1, got {level}.')
  (positive,) = np.nonzero((x > 0) & (y > 0))
  drawn = np.random.default_rng(seed).choice(positive, (draws, len(positive)))
  slopes = sign * masked_power_law(x[drawn], y[drawn]).slope
  slopes = slopes[~np.isnan(slopes)]  # Of one point, drawn every time.
  low, high = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


# ---------------------------------------------------------------------------------
# The shape of a spectrum
# ---------------------------------------------------------------------------------

# Columns beside the constant, of log σ as a function of the rank k.
PROFILES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, ...]]] = {
  'power_law': lambda k: (np.log(k),),
  'exponential': lambda k: (k,),
  'lognormal': lambda k: (np.log(k), np.log(k) ** 2),
}


def rank_profile(sigma: ArrayLike) -> RankProfile:
  """Whether σ_k falls with k as a power law, an exponential or a log-normal.

  Least squares on log σ_k for each; the smallest BIC = n log(RSS / n) + p log n wins, with p
  coefficients and n values.

  Args:
    sigma: Singular values σ_k ≥ 0 in decreasing order, (K,). Zeros are left out.

  Returns:
    A `RankProfile`; `best` is empty, with a `reason`, where there are fewer than four
    positive values or one is not finite.

  Raises:
    ValueError: σ that is negative or not in decreasing order.
    TypeError: complex or traced values.
  """
  sigma = _in_order('sigma', _spectrum('sigma', sigma))
  ranks, positive = _ranks(sigma), sigma > 0
  n, k = int(positive.sum()), ranks[positive]
  if not np.isfinite(sigma).all():
    return RankProfile('', {}, {}, {}, n, 'not finite')
  if n < 4:  # The log-normal has three coefficients.
    return RankProfile('', {}, {}, {}, n, f'{n} positive values, fewer than 4')
  y = np.log(sigma[positive])
  # Rounding must not choose between two models that both fit exactly.
  smallest = n * (8 * np.finfo(float).eps * max(1.0, np.abs(y).max())) ** 2
  total = max(np.sum((y - y.mean()) ** 2), smallest)
  bic, coefficients, r_squared = {}, {}, {}
  for name, columns in PROFILES.items():
    a = np.stack([np.ones(n), *columns(k)], axis=1)
    solution = np.linalg.lstsq(a, y)[0]
    rss = max(np.sum((y - a @ solution) ** 2), smallest)
    bic[name] = float(n * np.log(rss / n) + a.shape[1] * np.log(n))
    coefficients[name] = tuple(solution.tolist())
    r_squared[name] = float(1 - rss / total)
  return RankProfile(min(bic, key=bic.__getitem__), bic, coefficients, r_squared, n)


def participation_ratio(x: ArrayLike) -> float:
  """``(Σ x)² / Σ x²``: over how many of its values a spectrum is spread, 1 to K.

  Args:
    x: Values ≥ 0, (K,).

  Returns:
    The ratio; NaN where no value is positive or one is not finite.

  Raises:
    ValueError: a negative value: the ratio would count it against the others.
    TypeError: complex or traced values.
  """
  values = _spectrum('x', x)
  largest = values.max(initial=0)
  if not np.isfinite(values).all() or largest == 0:
    return float('nan')
  values = values / largest  # Squares of small numbers vanish.
  return float(values.sum() ** 2 / np.sum(values**2))


def participation_bound(alpha: ArrayLike, gamma: ArrayLike) -> jax.Array:
  """``ζ(αγ)² / ζ(2αγ)``: the largest participation ratio of h_k ∝ k^-αγ, however many k.

  Args:
    alpha: α, any shape. May be traced.
    gamma: γ, of the same shape, or a scalar.

  Returns:
    The bound; infinite where αγ ≤ 1 (there is none), 2.5 at αγ = 2, NaN for NaN.
  """
  product = jnp.asarray(alpha, float) * jnp.asarray(gamma, float)
  converges = ~(product <= 1)  # NaN stays NaN.
  safe = jnp.where(converges, product, 2)
  zeta = lambda s: jax.scipy.special.zeta(s, jnp.ones_like(s))
  return jnp.where(converges, zeta(safe) ** 2 / zeta(2 * safe), jnp.inf)


# ---------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------


def _values(name: str, x: ArrayLike) -> np.ndarray:
  if isinstance(x, jax.core.Tracer):
    raise TypeError(
      f'{name} is traced, and this fit says in words why it fails: use'
      ' curvature.masked_power_law inside a jitted function.'
    )
  x = np.asarray(x)
  if np.iscomplexobj(x):
    raise TypeError(f'{name} must be real, got {x.dtype}.')
  if x.ndim != 1:
    raise ValueError(f'{name} must have one axis, got shape {x.shape}.')
  return x.astype(np.float64)


def _spectrum(name: str, x: ArrayLike) -> np.ndarray:
  x = _values(name, x)
  if (x < 0).any():
    raise ValueError(f'{name} must not be negative, got {x.min()}.')
  return x


def _in_order(name: str, x: np.ndarray) -> np.ndarray:
  if (np.diff(x) > 0).any():
    raise ValueError(f'{name} must be in decreasing order: its place in the row is its rank.')
  return x


def _ranks(x: np.ndarray) -> np.ndarray:
  return np.arange(1, len(x) + 1, dtype=np.float64)
