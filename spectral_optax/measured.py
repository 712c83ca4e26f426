"""α measured while training: what to measure, what is kept of it, and one measurement.

    momentum  ->  its leading directions  ->  h_k along them  ->  running averages  ->  α

The other ways to say α are in `exponents`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectral_optax import layout
from spectral_optax.curvature import fits, online
from spectral_optax.curvature.directional import at_least_single
from spectral_optax.solvers import low_rank


@dataclasses.dataclass(frozen=True)
class MeasuredAlpha:
  """What `measured_alpha` returns; its arguments are described there."""

  every: int
  top_k: int
  draws: int
  fallback: Any
  clip: tuple[float, float]
  decay: float
  min_r_squared: float
  max_negative: float
  seed: int


def measured_alpha(
  every: int = 100,
  top_k: int = 8,
  *,
  draws: int = 1,
  fallback: Any = 'default',
  clip: tuple[float, float] = (0.5, 3.0),
  decay: float = 0.8,
  min_r_squared: float = 0.7,
  max_negative: float = 0.25,
  seed: int = 0,
) -> MeasuredAlpha:
  """α of every matrix as measured along the training: ``alpha=measured_alpha()``.

  Every `every` steps the update takes the curvature h_k of the loss along the `top_k`
  leading singular directions of each matrix's momentum, of all matrices at once
  (`curvature.joint_curvature`): ``draws * top_k`` Hessian-vector products, however many
  layers there are. The state keeps running averages, by rank, of h_k / σ_1² and σ_k / σ_1;
  averaged with their signs, the noise of each measurement falls out. α is the slope of
  log h_k on log σ_k through these averages.

      tx = spectral_optax.spectral_newton(1e-2, alpha=spectral_optax.measured_alpha())
      ...
      few = jax.tree.map(lambda x: x[:16], batch)  # The measurement's cost is its size.
      updates, state = tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, few))

  A matrix whose fit is poor takes `fallback` until it is good. Both are the rule at
  initialisation, which is why the first measurement is made after `every` steps.
  ``optax.tree.get(state, 'measured_alpha')`` and the like say what was found
  (`spectral_optax.MeasuredAlphaState`); ``'alpha'`` is what the step took.

  A measuring step is a `jax.lax.cond`, which `jax.vmap` turns into measuring at every step.

  Args:
    every: Steps from one measurement to the next, and before the first.
    top_k: Directions of each matrix, at least 3; fewer of a matrix that has fewer. One
      with fewer than three takes `fallback` for good.
    draws: Of the random signs, a power of two; see `curvature.joint_curvature`.
    fallback: The α of a matrix without a good fit: all that `alpha` may be, but for this.
    clip: Smallest and largest α taken.
    decay: Of the running averages from one measurement to the next, in [0, 1).
    min_r_squared: A fit with a smaller R² is poor,
    max_negative: and one where more than this part of the averaged h_k is negative.
    seed: Of the random signs.

  Returns:
    A value for the `alpha` of `spectral_newton` and of the transformations it is made of.
    `damping` None then keeps the turn of T, σ* = d^(1/α), where the default has it.

  Raises:
    ValueError: a number that makes no sense. `update` without `value_fn` raises too.

  Source: A. Calvo, arXiv:2606.02596, for h_k and α; measuring all layers at once while
  training is ours.
  """
  low, high = clip
  for name, value, good, what in (
    ('every', every, every >= 1, 'at least 1'),
    ('top_k', top_k, top_k >= fits.MIN_POINTS, f'at least {fits.MIN_POINTS}'),
    ('clip', clip, 0 <= low <= high < math.inf, 'two numbers, 0 <= low <= high'),
    ('decay', decay, 0 <= decay < 1, 'at least 0 and less than 1'),
    ('min_r_squared', min_r_squared, min_r_squared <= 1, 'at most 1'),
    ('max_negative', max_negative, 0 <= max_negative <= 1, 'a part, between 0 and 1'),
  ):
    if not good:
      raise ValueError(f'{name} of measured_alpha must be {what}, got {value}.')
  online.check_draws(draws)
  if isinstance(fallback, MeasuredAlpha):
    raise ValueError('fallback of measured_alpha must not be a measured_alpha itself.')
  return MeasuredAlpha(
    every, top_k, draws, fallback, (low, high), decay, min_r_squared, max_negative, seed
  )


# ---------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------


class MeasuredAlphaState(NamedTuple):
  """What `measured_alpha` has found, as mappings by parameter path.

  The values have the shape of the parameter's batch axes, () for a single matrix; the
  averages one axis more, of the directions.

  Attributes:
    measured_alpha: α as fitted, neither clipped nor replaced; NaN where there is no fit.
    measured_r_squared: Of that fit.
    measured_negative: The part of the directions whose averaged h_k is negative.
    measured_sigma: Running average of σ_k / σ_1; zeros before the first measurement.
    measured_h: Running average of h_k / σ_1², likewise.
  """

  measured_alpha: Any
  measured_r_squared: Any
  measured_negative: Any
  measured_sigma: Any
  measured_h: Any


def init(
  config: MeasuredAlpha, views: Mapping[str, layout.MatrixView], dtype: Any
) -> MeasuredAlphaState:
  """Before the first measurement."""
  of_matrix = {path: jnp.full([_matrices(view)], jnp.nan, dtype) for path, view in views.items()}
  of_direction = {
    path: jnp.zeros([_matrices(view), _directions(config, view)], dtype)
    for path, view in views.items()
  }
  return _state(config, views, *[of_matrix] * 3, *[of_direction] * 2)


def _state(config, views, *columns: Mapping[str, jax.Array]) -> MeasuredAlphaState:
  if not views:
    return MeasuredAlphaState(*(jnp.zeros([]) for _ in columns))

  def packed(column):
    flat = jnp.concatenate([column[path].reshape(-1) for path in views])
    shapes = [(path, (*view.batch_shape, *column[path].shape[1:])) for path, view in views.items()]
    return layout.ByPath(flat, shapes)

  return MeasuredAlphaState(*map(packed, columns))


def _matrices(view: layout.MatrixView) -> int:
  return math.prod(view.batch_shape)


def _directions(config: MeasuredAlpha, view: layout.MatrixView) -> int:
  return min(config.top_k, view.rows, view.columns)


# ---------------------------------------------------------------------------------
# One measurement
# ---------------------------------------------------------------------------------


def update(
  config: MeasuredAlpha,
  state: MeasuredAlphaState,
  count: jax.Array,
  momentum: Any,
  params: Any,
  value_fn: Callable[[Any], jax.Array] | None,
  weight_dimension_numbers: Any,
) -> MeasuredAlphaState:
  """The state after the step `count`, in which every `every`-th step measures.

  Args:
    config: What `measured_alpha` returned.
    state: The last one.
    count: Steps before this one, shape (), int32.
    momentum: What the transfer gets: the directions are its singular ones.
    params: The parameters.
    value_fn: The loss of them.
    weight_dimension_numbers: See `spectral_newton`.

  Raises:
    ValueError: without `params` or `value_fn`.
  """
  if value_fn is None or params is None:
    raise ValueError(
      'alpha=measured_alpha() measures the loss as it trains, and this update got no'
      f' {"params" if params is None else "value_fn"}: call tx.update(grads, state, params,'
      ' value_fn=loss_fn), with loss_fn(params) the scalar loss of a batch or of some of it.'
    )
  views = layout.matrix_views(momentum, weight_dimension_numbers)
  leaves = layout.leaves_by_path(momentum)
  kept = [path for path in state.measured_alpha if path in views]

  def measure() -> MeasuredAlphaState:
    spectra = {}
    for path in kept:
      view, leaf = views[path], layout.replicated(at_least_single(leaves[path]))
      spectra[path] = low_rank.leading_directions(view.to_matrices(leaf), _directions(config, view))
    # Along u_k v_kᵀ / σ_k the curvature, h_k / σ_k², is much the same in all layers,
    # where h_k is not: none drowns in the noise of another.
    relative = online.joint_curvature(
      value_fn,
      params,
      {path: (u * _inverse(sigma)[:, :, None], v) for path, (u, sigma, v) in spectra.items()},
      jax.random.fold_in(jax.random.key(config.seed), count),
      draws=config.draws,
      weight_dimension_numbers=weight_dimension_numbers,
    )
    h = {path: of * jnp.square(spectra[path][1]) for path, of in relative.items()}
    found = {path: _averaged(config, views[path], state, spectra[path][1], h[path]) for path in h}
    columns = [{path: of[i] for path, of in found.items()} for i in range(5)]
    new = _state(config, {path: views[path] for path in kept}, *columns)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), new, state)

  now = (count + 1) % config.every == 0
  return jax.lax.cond(now, measure, lambda: state)


def _inverse(sigma: jax.Array) -> jax.Array:
  """1/σ, and zero for what is there by rounding alone."""
  there = sigma > 1e-6 * sigma[:, :1]
  return jnp.where(there, 1 / jnp.where(there, sigma, 1), 0)


def _averaged(
  config: MeasuredAlpha,
  view: layout.MatrixView,
  state: MeasuredAlphaState,
  sigma: jax.Array,
  h: jax.Array,
) -> tuple[jax.Array, ...]:
  """One parameter's row of the new state; σ and h are (matrices, directions)."""
  of = lambda column: column[view.path].reshape(sigma.shape).astype(sigma.dtype)
  old_sigma, old_h = of(state.measured_sigma), of(state.measured_h)

  h, leader = h.astype(sigma.dtype), sigma[:, :1]
  # Of nothing, or not finite, it is no measurement, and leaves both averages as they are.
  good = (jnp.square(leader) > 0) & jnp.isfinite(leader) & jnp.isfinite(h).all(-1, keepdims=True)

  def running(old, new, size):
    scaled = jnp.where(good, new, 0) / jnp.where(good, size, 1)
    return jnp.where(good, config.decay * old + (1 - config.decay) * scaled, old)

  new_sigma = running(old_sigma, sigma, leader)
  # Not over a size of h itself, which is noisy: what is divided by noise is biased.
  new_h = running(old_h, h, jnp.square(leader))
  # Fitted to averages without bias correction: a common factor is in no slope.
  rounding = max(view.rows, view.columns) * jnp.finfo(sigma.dtype).eps
  there = new_sigma > rounding * new_sigma[:, :1]
  line = fits.masked_power_law(new_sigma, new_h, there)
  enough = line.num_points >= fits.MIN_POINTS
  negative = jnp.sum(there & (new_h <= 0), -1) / jnp.maximum(jnp.sum(there, -1), 1)
  return (
    jnp.where(enough, line.slope, jnp.nan),
    jnp.where(enough, line.r_squared, jnp.nan),
    negative,
    new_sigma,
    new_h,
  )


def alphas(
  config: MeasuredAlpha, state: MeasuredAlphaState, fallback: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """The α of each matrix now: as measured and clipped, or else the fallback's."""
  # Of all matrices at once: one by one, they would be many small programs.
  found = state.measured_alpha
  alpha = found.flat
  # All comparisons with NaN are false.
  good = (
    jnp.isfinite(alpha)
    & (state.measured_r_squared.flat >= config.min_r_squared)
    & (state.measured_negative.flat <= config.max_negative)
  )
  shapes = {path: found[path].shape for path in found}
  others = [
    jnp.broadcast_to(jnp.asarray(fallback[path], alpha.dtype), shape).reshape(-1)
    for path, shape in shapes.items()
  ]
  taken = jnp.where(good, jnp.clip(alpha, *config.clip), jnp.concatenate(others))
  return dict(layout.ByPath(taken, list(shapes.items())))
