"""Spectral Newton as gradient transformations, one for each part.

    momentum  ->  spectral transfer  ->  update size

`scale_by_spectral_newton` is their chain. Each is a transformation of its own, so
that a preconditioner can be put before the transfer or a normalisation after it.
All of them leave parameters that are no matrices as they find them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from spectral_optax import exponents, layout, solvers

# ---------------------------------------------------------------------------------
# Momentum
# ---------------------------------------------------------------------------------


class MomentumState(NamedTuple):
  """State of `scale_by_momentum`.

  Attributes:
    count: Steps taken, shape (), int32.
    mu: The running average of the gradients, a tree like the parameters.
  """

  count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
  mu: optax.Updates


def scale_by_momentum(
  momentum: float | jax.Array = 0.95,
  *,
  nesterov: bool = True,
  mu_dtype: Any | None = None,
) -> optax.GradientTransformation:
  """Replaces the gradient by its bias-corrected running average.

  The momentum of `optax.contrib.muon`: ``μ ← β μ + (1 - β) g``, and with `nesterov`
  one step ahead, ``β μ̂ + (1 - β) ĝ``.

  Args:
    momentum: β, the decay of the average, in [0, 1). May be traced.
    nesterov: Whether to look one step ahead (default).
    mu_dtype: Data type that the average is kept in; None for the parameter's.

  Returns:
    A `GradientTransformation`. A NaN or an infinity in a gradient reaches the
    update, and stays out of the average.

  Raises:
    ValueError: `momentum` outside [0, 1).
  """
  if not isinstance(momentum, jax.core.Tracer) and not 0 <= float(momentum) < 1:
    raise ValueError(f'momentum must be at least 0 and less than 1, got {momentum}.')
  mu_dtype = None if mu_dtype is None else jax.dtypes.canonicalize_dtype(mu_dtype)

  def init_fn(params):
    return MomentumState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

  def update_fn(updates, state, params=None):
    del params
    finite = jax.tree.map(jnp.isfinite, updates)
    mu = optax.tree.update_moment(updates, state.mu, momentum, 1)
    mu = jax.tree.map(lambda ok, new, old: jnp.where(ok, new, old), finite, mu, state.mu)
    count = optax.safe_increment(state.count)
    if nesterov:
      ahead = jax.tree.map(
        lambda m, g: momentum * m + (1 - momentum) * g,
        optax.tree.bias_correction(mu, momentum, optax.safe_increment(count)),
        optax.tree.bias_correction(updates, momentum, count),
      )
    else:
      ahead = optax.tree.bias_correction(mu, momentum, count)
    ahead = jax.tree.map(
      lambda ok, a, g: jnp.where(ok, a, g).astype(g.dtype), finite, ahead, updates
    )
    mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
    return ahead, MomentumState(count, mu)

  return optax.GradientTransformation(init_fn, update_fn)


# ---------------------------------------------------------------------------------
# Transfer
# ---------------------------------------------------------------------------------


class SpectralTransferState(NamedTuple):
  """State of `scale_by_spectral_transfer`: what is known of each matrix's spectrum.

  All but `count` are dicts by parameter path (``'layers/0/kernel'``), one entry a
  matrix parameter, so that ``optax.tree.get(state, 'sigma_max')`` is ready to log.
  The values have the shape of the parameter's batch axes: () for a single matrix.
  They are float32 (float64 for float64 parameters), and NaN after a step whose
  update was not finite.

  Attributes:
    count: Steps taken, shape (), int32. What schedules are called with.
    alpha: The curvature exponent that the last step used.
    damping: The damping d that the last step used.
    participation_ratio: (Σσ²)² / Σσ⁴, between 1 and the rank.
    sigma_max: Largest singular value, in the units of the incoming update; by power
      iteration, two a step, from where the last one ended: approached from below.
    transfer_error: How far T may have been off, relative, rounding aside: 0 for the
      exact solvers, the largest error of the fit for "rational", and for "low_rank" a
      bound on the error of the whole update, ‖ΔW - exact‖_F / ‖exact‖_F,
      infinite where nothing can be said.
    basis: Leading singular vectors on the smaller side: that side and the number of
      vectors (one, or the rank of "low_rank") as additional last axes.
  """

  count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
  alpha: Any
  damping: Any
  participation_ratio: Any
  sigma_max: Any
  transfer_error: Any
  basis: Any


def _compute_dtype(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


def _at(value: Any, count: jax.Array) -> Any:
  return value(count) if callable(value) else value


def _replicated(x: jax.Array) -> jax.Array:
  """Under explicit sharding, the whole of x on every device; else x itself.

  A singular value belongs to a whole matrix, and matrices that are stacked must
  agree on how they are split.
  """
  sharding = jax.typeof(x).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, jax.sharding.PartitionSpec())


def _sharded_like(x: jax.Array, like: jax.Array) -> jax.Array:
  sharding = jax.typeof(like).sharding
  if all(axis is None for axis in sharding.spec):
    return x
  return jax.sharding.reshard(x, sharding.spec)


def scale_by_spectral_transfer(
  alpha: Any = 'default',
  damping: Any = None,
  *,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float | None = None,
  rank: int | None = None,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
) -> optax.GradientTransformation:
  """Replaces every matrix U Σ Vᵀ by U T(Σ) Vᵀ, T(σ) = σ / (σ^α + d).

  The transfer alone: no momentum, no learning rate. Same-shaped matrices are
  computed as one batch.

  Args:
    alpha: Curvature exponent α ≥ 0; see `spectral_newton`.
    damping: d ≥ 0; see `spectral_newton`.
    normalize: What σ is divided by first; see `apply_transfer`.
    solver: See `apply_transfer`.
    tolerance: See `apply_transfer`.
    rank: See `apply_transfer`.
    weight_dimension_numbers: See `spectral_newton`.

  Returns:
    A `GradientTransformation` with state `SpectralTransferState`.

  Raises:
    ValueError: At construction, for an unknown solver or normalisation and for
      numbers that make no sense; at `init`, for what does not fit the parameters,
      with the parameter's path and shape.
    TypeError: At `init`, for complex matrices.
  """
  tolerance = solvers.DEFAULT_TOLERANCE if tolerance is None else tolerance
  solvers.check_solver(solver, normalize, tolerance, rank)
  if not isinstance(alpha, str) and _is_number(alpha):
    solvers.check_hyperparams(solver, alpha, 0.0)
  if _is_number(damping):
    solvers.check_hyperparams('auto', 0.0, damping)

  def vectors(small: int) -> int:
    """How many leading singular vectors are carried along."""
    return min(rank or solvers.DEFAULT_RANK, small) if solver == 'low_rank' else 1

  def plan(params):
    views = layout.matrix_views(params, weight_dimension_numbers)
    return views, exponents.resolve(alpha, damping, params, views)

  def init_fn(params):
    views, values = plan(params)
    leaves = layout.leaves_by_path(params)
    columns: dict[str, dict[str, jax.Array]] = {
      name: {} for name in SpectralTransferState._fields[1:]
    }
    for path, view in views.items():
      where = f' for {path!r} with shape {view.shape}'
      first = [_at(v, jnp.zeros([], jnp.int32)) for v in values[path]]
      if callable(values[path][0]):  # Traced in an update, whatever it begins with.
        first[0] = jnp.asarray(first[0])
      solvers.check_hyperparams(solver, *first, where=where)
      dtype = _compute_dtype(leaves[path].dtype)
      small = min(view.rows, view.columns)
      for name, value in zip(('alpha', 'damping'), first, strict=True):
        columns[name][path] = _broadcast(value, view, dtype)
      columns['participation_ratio'][path] = jnp.zeros(view.batch_shape, dtype)
      columns['sigma_max'][path] = jnp.zeros(view.batch_shape, dtype)
      columns['transfer_error'][path] = jnp.zeros(view.batch_shape, dtype)
      columns['basis'][path] = jnp.zeros((*view.batch_shape, small, vectors(small)), dtype)
    return _state(jnp.zeros([], jnp.int32), columns, params)

  def update_fn(updates, state, params=None):
    del params
    views, values = plan(updates)
    leaves = layout.leaves_by_path(updates)
    groups: dict[Any, list[str]] = {}
    for path, view in views.items():
      rows, columns = sorted((view.rows, view.columns))
      dtype = _compute_dtype(leaves[path].dtype)
      # One fit for all where every α and d is known, weights by least squares elsewhere.
      fixed = all(solvers.known(v) for v in values[path])
      groups.setdefault((rows, columns, dtype, fixed), []).append(path)

    new = dict(leaves)
    columns = {name: {} for name in SpectralTransferState._fields[1:]}
    batches: dict[Any, list[solvers.Batch]] = {}
    members: dict[Any, list[list[str]]] = {}
    for (small, _, dtype, fixed), paths in groups.items():
      xp = np if fixed else jnp
      matrices, alphas, dampings, bases = [], [], [], []
      for path in paths:
        view = views[path]
        matrix = view.to_matrices(_replicated(leaves[path]).astype(dtype))
        # One orientation for the batch: tall.
        matrices.append(matrix.swapaxes(-1, -2) if view.rows < view.columns else matrix)
        for name, value, parts in zip(
          ('alpha', 'damping'), values[path], (alphas, dampings), strict=True
        ):
          value = np.asarray(value, np.float64) if fixed else _at(value, state.count)
          columns[name][path] = _broadcast(value, view, dtype)
          parts.append(
            xp.broadcast_to(value, view.batch_shape).reshape(-1)
            if fixed
            else columns[name][path].reshape(-1)
          )
        bases.append(state.basis[path].reshape(-1, small, vectors(small)))
      batches.setdefault(dtype, []).append(
        solvers.Batch(
          jnp.concatenate(matrices),
          xp.concatenate(alphas),
          xp.concatenate(dampings),
          jnp.concatenate(bases),
        )
      )
      members.setdefault(dtype, []).append(paths)
    for dtype, of_dtype in batches.items():
      solved = solvers.solve_batches(
        of_dtype, normalize=normalize, solver=solver, tolerance=tolerance
      )
      for paths, (matrices, spectrum) in zip(members[dtype], solved, strict=True):
        start = 0
        for path in paths:
          view, leaf = views[path], leaves[path]
          end = start + math.prod(view.batch_shape)
          matrix = matrices[start:end]
          matrix = matrix.swapaxes(-1, -2) if view.rows < view.columns else matrix
          new[path] = _sharded_like(view.from_matrices(matrix).astype(leaf.dtype), leaf)
          for name, value in spectrum._asdict().items():
            columns[name][path] = value[start:end].reshape(view.batch_shape + value.shape[1:])
          start = end
    updates = jax.tree.unflatten(jax.tree.structure(updates), list(new.values()))
    return updates, _state(optax.safe_increment(state.count), columns, updates)

  return optax.GradientTransformation(init_fn, update_fn)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float | np.ndarray | np.generic | jax.Array)


def _broadcast(value: Any, view: layout.MatrixView, dtype: Any) -> jax.Array:
  return jnp.broadcast_to(jnp.asarray(value, dtype), view.batch_shape)


def _state(
  count: jax.typing.ArrayLike, columns: Mapping[str, dict[str, jax.Array]], params: Any
) -> SpectralTransferState:
  if not jax.tree.leaves(params):
    # `optax.tree.map_params` puts a placeholder for the parameters and looks for it
    # in the state. These dicts are not shaped like parameters: one leaf each says so.
    return SpectralTransferState(count, *(jnp.zeros([]) for _ in columns))
  return SpectralTransferState(count, **columns)


# ---------------------------------------------------------------------------------
# Update size
# ---------------------------------------------------------------------------------


def scale_to_rms(
  rms: float | jax.Array = 0.2,
  *,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
) -> optax.GradientTransformation:
  """Scales every matrix's update to one root mean square.

  ``ΔW ← rms · √(m n) ΔW / ‖ΔW‖_F``, matrix by matrix: the size that
  ``optax.contrib.muon(consistent_rms=rms)`` gives an orthogonal update (Liu et al.,
  arXiv:2502.16982), for an update with any spectrum. AdamW's updates have about
  0.2, so its learning rates are where to start (measured: README).

  Args:
    rms: Of the entries of each matrix's update, in units of the learning rate. May
      be traced.
    weight_dimension_numbers: See `spectral_newton`.

  Returns:
    A stateless `GradientTransformation`. A zero update stays zero.
  """

  def update_fn(updates, state, params=None):
    del params
    views = layout.matrix_views(updates, weight_dimension_numbers)
    new = layout.leaves_by_path(updates)
    for path, view in views.items():
      x = new[path]
      wide = x.astype(_compute_dtype(x.dtype))
      mean = jnp.mean(jnp.square(wide), axis=view.matrix_axes, keepdims=True)
      scale = jnp.where(mean == 0, 0, rms / jnp.sqrt(jnp.where(mean == 0, 1, mean)))
      new[path] = (scale * wide).astype(x.dtype)
    return jax.tree.unflatten(jax.tree.structure(updates), list(new.values())), state

  return optax.GradientTransformation(optax.init_empty_state, update_fn)


# ---------------------------------------------------------------------------------
# All three
# ---------------------------------------------------------------------------------


def scale_by_spectral_newton(
  alpha: Any = 'default',
  damping: Any = None,
  *,
  momentum: float | jax.Array = 0.95,
  nesterov: bool = True,
  mu_dtype: Any | None = None,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float | None = None,
  rank: int | None = None,
  update_rms: float | jax.Array | None = 0.2,
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum, spectral transfer and update size: Spectral Newton without the rest.

  The chain of `scale_by_momentum`, `scale_by_spectral_transfer` and `scale_to_rms`.
  Parameters that are no matrices get the momentum alone; `spectral_newton` gives
  them to AdamW.

  Args:
    alpha: Curvature exponent α ≥ 0; see `spectral_newton`.
    damping: d ≥ 0; see `spectral_newton`.
    momentum: See `scale_by_momentum`.
    nesterov: See `scale_by_momentum`.
    mu_dtype: See `scale_by_momentum`.
    normalize: See `apply_transfer`.
    solver: See `apply_transfer`.
    tolerance: See `apply_transfer`.
    rank: See `apply_transfer`.
    update_rms: See `scale_to_rms`; None to leave the size that T gives.
    weight_dimension_numbers: See `spectral_newton`.

  Returns:
    A `GradientTransformationExtraArgs`; its state is the tuple of its parts' states.

  Raises:
    ValueError, TypeError: as the parts do.
  """
  parts = [
    scale_by_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype),
    scale_by_spectral_transfer(
      alpha,
      damping,
      normalize=normalize,
      solver=solver,
      tolerance=tolerance,
      rank=rank,
      weight_dimension_numbers=weight_dimension_numbers,
    ),
  ]
  if update_rms is not None:
    parts.append(scale_to_rms(update_rms, weight_dimension_numbers=weight_dimension_numbers))
  return optax.with_extra_args_support(optax.chain(*parts))
