"""Spectral Newton as gradient transformations, one for each part.

    momentum  ->  spectral transfer  ->  update size

`scale_by_spectral_newton` is their chain. Each is a transformation of its own, so
that a preconditioner can be put before the transfer or a normalisation after it.
All of them leave parameters that are no matrices as they find them.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from spectral_optax import exponents, layout, measured, sharding, solvers, update_size

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
  momentum: float | jax.Array = 0.9,
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


def noise_in_momentum(
  updates: optax.Updates, state: MomentumState, momentum: Any, nesterov: bool = True
) -> optax.Updates:
  """A tree with as much noise in it as `scale_by_momentum` leaves of that of one gradient.

  N = c (gradient - the average before it). Of gradients whose noise is independent, with
  variance v, that difference has 2v/(1 + β); what comes out, β² of the average before and 1 - β²
  of the gradient (1 - β of it, and β of the average, without the look ahead), has
  v (β⁴ (1 - β)/(1 + β) + (1 - β²)²), or v (1 - β)/(1 + β). c² is the quotient, of a long
  run: 0.26² at β = 0.9.

  Args:
    updates: The gradients.
    state: Of `scale_by_momentum`, before its update with them.
    momentum: β.
    nesterov: Whether that looks one step ahead.
  """
  averaged = (1 - momentum) / (1 + momentum)
  left = momentum**4 * averaged + (1 - momentum**2) ** 2 if nesterov else averaged
  factor = (left * (1 + momentum) / 2) ** 0.5
  before = optax.tree.bias_correction(state.mu, momentum, jnp.maximum(state.count, 1))
  return jax.tree.map(lambda g, m: (factor * (g - m)).astype(g.dtype), updates, before)


# ---------------------------------------------------------------------------------
# Transfer
# ---------------------------------------------------------------------------------


class SpectralTransferState(NamedTuple):
  """State of `scale_by_spectral_transfer`: what is known of each matrix's spectrum.

  All but `count` are mappings by parameter path (``'layers/0/kernel'``), one entry a
  matrix parameter, so that ``dict(optax.tree.get(state, 'sigma_max'))`` is ready to log;
  to JAX each is one array (`layout.ByPath`).
  The values have the shape of the parameter's batch axes: () for a single matrix.
  They are float32 (float64 if a matrix is), and NaN after a step whose update was not
  finite.

  Attributes:
    count: Steps taken, shape (), int32. What schedules are called with.
    alpha: The curvature exponent that the last step used.
    damping: The damping d that the last step used.
    participation_ratio: (Σσ²)² / Σσ⁴, between 1 and the rank.
    sigma_max: Largest singular value, in the units of the incoming update; by power
      iteration, two a step, from where the last one ended: approached from below.
    transfer_error: How far T may have been off, relative, rounding aside: 0 for the
      exact solvers, the largest error of the fit for "rational" and "polynomial", and for
      "low_rank" a bound on the error of the whole update, ‖ΔW - exact‖_F / ‖exact‖_F,
      infinite where nothing can be said.
    basis: Leading singular vectors on the smaller side: that side and the number of
      vectors (one, or the rank of "low_rank") as additional last axes.
    measurement: With `measured_alpha` its `MeasuredAlphaState`, else None.
    fits: With `measured_alpha` the fits of T to the last α, one axis: they are made anew where
      α changes (and, for parameters whose work is divided, at every step). Else None.
  """

  count: jax.typing.ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
  alpha: Any
  damping: Any
  participation_ratio: Any
  sigma_max: Any
  transfer_error: Any
  basis: Any
  measurement: measured.MeasuredAlphaState | None = None
  fits: jax.Array | None = None


def _compute_dtype(dtype: Any) -> Any:
  return jnp.promote_types(dtype, jnp.float32)


# What is kept of each matrix, as numbers.
COLUMNS = ('alpha', 'damping', *solvers.Spectrum._fields)


def placements(shardings: Any, params: Any) -> dict[str, Any] | None:
  """The argument `shardings` of `spectral_newton`, by path."""
  if shardings is None:
    return None
  tree = shardings(params) if layout.is_function(shardings) else shardings
  kinds = jax.sharding.PartitionSpec | jax.sharding.Sharding | None
  entries = layout.leaves_by_path(tree, is_leaf=lambda x: isinstance(x, kinds))
  return layout.match_prefix(entries, params, 'shardings')


# From this many numbers on a parameter is not stacked with others of its shape: a large
# product gains nothing from company, and the stack is one more copy.
ALONE = 2**17


def _piece_key(view: layout.MatrixView, dtype: Any) -> tuple[Any, ...]:
  """In the order of this everything is computed and kept: smaller sides together."""
  rows, columns = view.rows, view.columns
  return str(jnp.dtype(dtype)), min(rows, columns), max(rows, columns), rows < columns


def _in_order(flat: jax.Array, parts: Sequence[tuple[str, int]], order: Sequence[str]) -> jax.Array:
  """`flat` consists of `parts` (path, length); the same in another order of paths."""
  lengths = dict(parts)
  ends = itertools.accumulate(lengths.values())
  starts = {path: end - lengths[path] for path, end in zip(lengths, ends, strict=True)}
  runs: list[list[int]] = []  # Where what is wanted lies together, as one.
  for path in order:
    start, end = starts[path], starts[path] + lengths[path]
    if runs and runs[-1][1] == start:
      runs[-1][1] = end
    else:
      runs.append([start, end])
  if runs == [[0, len(flat)]]:
    return flat
  return jnp.concatenate([flat[start:end] for start, end in runs])


def scale_by_spectral_transfer(
  alpha: Any = 'default',
  damping: Any = None,
  *,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float | None = None,
  rank: int | None = None,
  update_rms: float | jax.Array | None = None,
  rms_of: Any = 'matrix',
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
  mesh: Any = None,
  work_axes: str | Sequence[str] | None = None,
  shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Replaces every matrix U Σ Vᵀ by U T(Σ) Vᵀ, T(σ) = σ / (σ^α + d).

  The transfer alone: no momentum, no learning rate. Same-shaped matrices are
  computed as one batch, and whatever depends on the smaller side alone as one batch for
  all matrices of that side.

  Args:
    alpha: Curvature exponent α ≥ 0; see `spectral_newton`.
    damping: d ≥ 0, "constant", "noise", or None, which is "constant" here whatever `alpha` is; see
      `spectral_newton`. `update` with "noise" needs ``noise=N``, a tree like the updates (or a
      function that gives it) with as much noise in it as they have.
    normalize: What σ is divided by first; see `apply_transfer`.
    solver: See `apply_transfer`.
    tolerance: See `apply_transfer`.
    rank: See `apply_transfer`.
    update_rms: As `scale_to_rms` after it would do, and cheaper; None (default) leaves
      the size that T gives.
    rms_of: See `scale_to_rms`.
    weight_dimension_numbers: See `spectral_newton`.
    mesh: See `spectral_newton`.
    work_axes: See `spectral_newton`.
    shardings: See `spectral_newton`.

  Returns:
    A `GradientTransformationExtraArgs` with state `SpectralTransferState`.

  Raises:
    ValueError: At construction, for an unknown solver or normalisation and for
      numbers that make no sense; at `init`, for what does not fit the parameters,
      with the parameter's path and shape.
    TypeError: At `init`, for complex matrices.
  """
  tolerance = solvers.DEFAULT_TOLERANCE if tolerance is None else tolerance
  rule = alpha if isinstance(alpha, measured.MeasuredAlpha) else None
  solvers.check_solver(solver, normalize, tolerance, rank)
  update_size.check(rms_of)
  sharding.check(mesh, work_axes)
  if not isinstance(alpha, str) and _is_number(alpha):
    solvers.check_hyperparams(solver, alpha, 0.0)
  if _is_number(damping):
    solvers.check_hyperparams('auto', 0.0, damping)

  def plan(params):
    """Views in the order in which they are kept; of each its values, dtype, and what has a size."""
    views = layout.matrix_views(params, weight_dimension_numbers)
    values = exponents.resolve(alpha, damping, params, views)
    leaves = layout.leaves_by_path(params)
    dtypes = {path: _compute_dtype(leaves[path].dtype) for path in views}
    order = sorted(views, key=lambda path: _piece_key(views[path], dtypes[path]))
    sizes = update_size.resolve('matrix' if update_rms is None else rms_of, params, views)
    return {path: views[path] for path in order}, values, dtypes, sizes

  def basis_shape(view: layout.MatrixView) -> tuple[int, ...]:
    small = min(view.rows, view.columns)
    return (*view.batch_shape, small, solvers.vectors(solver, rank, small))

  def make_state(count, views, columns, measurement, fits) -> Any:
    if not views:
      # `optax.tree.map_params` puts a placeholder for the parameters and looks for it
      # in the state. This is not shaped like parameters: one leaf each says so.
      nothing = {name: jnp.zeros([]) for name in columns}
      return SpectralTransferState(count, **nothing, measurement=measurement, fits=fits)
    shapes = {path: view.batch_shape for path, view in views.items()}
    shapes_of_basis = {path: basis_shape(view) for path, view in views.items()}
    return SpectralTransferState(
      count,
      **{
        name: layout.ByPath(x, list((shapes_of_basis if name == 'basis' else shapes).items()))
        for name, x in columns.items()
      },
      measurement=measurement,
      fits=fits,
    )

  def init_fn(params):
    views, values, dtypes, sizes = plan(params)
    widest = jnp.result_type(*dtypes.values()) if dtypes else jnp.float32
    first = {}
    for path in values:
      where = f' for {path!r} with shape {views[path].shape}'
      now = list(exponents.at(*values[path], jnp.zeros([], jnp.int32)))
      if rule or callable(values[path][0]):  # Traced in an update, whatever it begins with.
        now[0] = jnp.asarray(now[0])
      solvers.check_hyperparams(solver, *now, where=where)
      first[path] = [_broadcast(value, views[path], widest) for value in now]
    total = sum(math.prod(view.batch_shape) for view in views.values())
    columns = {name: jnp.zeros([total], widest) for name in COLUMNS}
    for i, name in enumerate(('alpha', 'damping')):
      if views:
        columns[name] = jnp.concatenate([first[path][i] for path in views])
    size = sum(math.prod(basis_shape(view)) for view in views.values())
    columns['basis'] = jnp.zeros([size], widest)
    measurement = measured.init(rule, views, widest) if rule else None
    state = make_state(jnp.zeros([], jnp.int32), views, columns, measurement, None)
    if rule and not views:
      state = state._replace(fits=jnp.zeros([]))
    elif rule:  # As many numbers as an update, of matrices that are whole, would make.
      found = measured_now(state, values)
      of_views = views, found, dtypes, sizes
      step = lambda p: transfer(p, noise_of(views, found, p), state, *of_views, None)
      made = jax.eval_shape(step, params)
      state = state._replace(fits=jnp.zeros(made[1].fits.shape, widest))
    return state

  def measured_now(state, values: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """With α as measured, where it may be trusted."""
    assert rule is not None
    fallback = {path: exponents.at(*value, state.count)[0] for path, value in values.items()}
    found = measured.alphas(rule, state.measurement, fallback)
    return {path: (found[path], values[path][1]) for path in values}

  def update_fn(updates, state, params=None, *, value_fn=None, noise=None, **extra_args):
    del extra_args
    views, values, dtypes, sizes = plan(updates)
    if not views:
      return updates, state._replace(count=optax.safe_increment(state.count))
    noise = noise_of(views, values, noise)
    if rule:
      measurement = measured.update(
        rule, state.measurement, state.count, updates, params, value_fn, weight_dimension_numbers
      )
      state = state._replace(measurement=measurement)
      values = measured_now(state, values)
    division = sharding.divide(
      layout.leaves_by_path(updates),
      views,
      mesh=mesh,
      work_axes=work_axes,
      shardings=placements(shardings, updates),
    )
    return transfer(updates, noise, state, views, values, dtypes, sizes, division)

  def noise_of(views, values, noise) -> dict[str, jax.Array]:
    """N / √(longer side), by path, of the parameters whose damping it is."""
    noisy = [path for path, value in values.items() if exponents.of_noise(value[1])]
    if not noisy:
      return {}
    if noise is None:
      raise ValueError(
        f'damping="noise" of {noisy[0]!r} with shape {views[noisy[0]].shape}: update needs'
        ' noise=..., a tree like the updates. `scale_by_spectral_newton` and `spectral_newton`'
        ' give it.'
      )
    leaves = layout.leaves_by_path(noise() if layout.is_function(noise) else noise)
    longer = {path: max(views[path].rows, views[path].columns) for path in noisy}
    return {path: leaves[path] / math.sqrt(longer[path]) for path in noisy}

  def transfer(
    updates, noise, state, views, values: Mapping[str, tuple[Any, Any]], dtypes, sizes, division
  ):
    """The step with these α and d."""
    leaves = layout.leaves_by_path(updates)
    kept = list(views)
    number = {path: math.prod(view.batch_shape) for path, view in views.items()}

    # Batches of one smaller side, of pieces of one shape.
    grouped: dict[Any, dict[Any, list[str]]] = {}
    for path, view in views.items():
      # One fit for all where every α and d is known, weights by least squares elsewhere.
      fixed = exponents.known(*values[path])
      key = _piece_key(view, dtypes[path])
      alone = path if math.prod(view.shape) >= ALONE else None
      piece = key, alone, path in noise, sizes[path]
      grouped.setdefault((*key[:2], fixed), {}).setdefault(piece, []).append(path)

    order = [path for pieces in grouped.values() for paths in pieces.values() for path in paths]
    flat_basis = _in_order(
      state.basis.flat,
      [(path, math.prod(basis_shape(views[path]))) for path in kept],
      order,
    )
    batches: dict[Any, list[solvers.Batch]] = {}
    members: dict[Any, list[list[list[str]]]] = {}
    numbers: dict[str, list[Any]] = {'alpha': [], 'damping': []}
    start = 0
    for (name, small, fixed), pieces in grouped.items():
      matrices, noises, given = [], [], {'alpha': [], 'damping': []}
      for paths in pieces.values():
        if division is None:
          matrices.append(_stacked(leaves, paths, views, name))
          noisy = paths[0] in noise
          noises.append(_stacked(noise, paths, views, name) if noisy else None)
        for path in paths:
          for of, value in zip(given, exponents.at(*values[path], state.count), strict=True):
            given[of].append(
              np.broadcast_to(np.asarray(value, np.float64), views[path].batch_shape).reshape(-1)
              if fixed
              else _broadcast(value, views[path], name)
            )
      alphas, dampings = ((np if fixed else jnp).concatenate(of) for of in given.values())
      for of, value in zip(numbers.values(), (alphas, dampings), strict=True):
        of.append(jnp.asarray(value, flat_basis.dtype))
      width = solvers.vectors(solver, rank, small)
      end = start + len(alphas) * small * width
      basis = flat_basis[start:end].reshape(-1, small, width).astype(name)
      start = end
      batch = solvers.Batch(matrices, alphas, dampings, basis, noise=noises)
      batches.setdefault(name, []).append(batch)
      members.setdefault(name, []).append(list(pieces.values()))

    lengths = [(path, number[path]) for path in order]
    now = {name: _in_order(jnp.concatenate(of), lengths, kept) for name, of in numbers.items()}
    fits = None
    if rule and division is None:
      same = [jnp.all(now[name] == getattr(state, name).flat) for name in now]
      fits = solvers.Fits(state.fits, (state.count > 0) & same[0] & same[1])

    new = dict(leaves)
    spectra: dict[str, list[jax.Array]] = {name: [] for name in solvers.Spectrum._fields}
    how: dict[str, Any] = {
      'normalize': normalize,
      'solver': solver,
      'tolerance': tolerance,
      'choose_rank': rank is None,
    }
    for name, of_dtype in batches.items():
      if division is not None:
        flat = [list(itertools.chain(*pieces)) for pieces in members[name]]
        solved, found = sharding.solve_batches(
          division,
          of_dtype,
          flat,
          leaves,
          noise,
          views,
          update_rms=update_rms,
          rms_of=sizes,
          **how,
        )
        new |= solved
        for spectrum, (of, at) in itertools.product(found, enumerate(spectra)):
          spectra[at].append(spectrum[of].reshape(-1).astype(flat_basis.dtype))
        continue
      solved = solvers.solve_batches(of_dtype, fits=fits, **how)
      of_pieces = list(itertools.chain(*members[name]))
      matrices = list(itertools.chain(*(results for results, _ in solved)))
      if update_rms is not None:
        of = [sizes[paths[0]] for paths in of_pieces]
        matrices = update_size.each_to_rms(matrices, update_rms, of)
      for paths, piece in zip(of_pieces, matrices, strict=True):
        begin = 0
        for path in paths:
          end = begin + number[path]
          one = views[path].from_matrices(piece[begin:end]).astype(leaves[path].dtype)
          new[path] = layout.sharded_like(one, leaves[path])
          begin = end
      for _, spectrum in solved:
        for of, value in zip(spectra.values(), spectrum, strict=True):
          of.append(value.reshape(-1).astype(flat_basis.dtype))
    # By dtype, batches were kept in order.
    lengths_of_basis = [(path, math.prod(basis_shape(views[path]))) for path in order]
    columns = now | {
      name: _in_order(jnp.concatenate(of), lengths_of_basis if name == 'basis' else lengths, kept)
      for name, of in spectra.items()
    }
    updates = jax.tree.unflatten(jax.tree.structure(updates), list(new.values()))
    count = optax.safe_increment(state.count)
    made = state.fits if fits is None else fits.flat(flat_basis.dtype)
    return updates, make_state(count, views, columns, state.measurement, made)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stacked(leaves, paths: Sequence[str], views, dtype: Any) -> jax.Array:
  """Parameters of one shape as (batch, rows, columns)."""
  whole = [layout.replicated(leaves[path]).astype(dtype) for path in paths]
  parts = [views[path].to_matrices(x) for path, x in zip(paths, whole, strict=True)]
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float | np.ndarray | np.generic | jax.Array)


def _broadcast(value: Any, view: layout.MatrixView, dtype: Any) -> jax.Array:
  return jnp.broadcast_to(jnp.asarray(value, dtype), view.batch_shape).reshape(-1)


# ---------------------------------------------------------------------------------
# Update size
# ---------------------------------------------------------------------------------


def scale_to_rms(
  rms: float | jax.Array = 0.2,
  *,
  rms_of: Any = 'matrix',
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
) -> optax.GradientTransformation:
  """Scales every matrix's update to one root mean square.

  ``ΔW ← rms · ΔW / r``, r the root mean square of the matrix: the size that
  ``optax.contrib.muon(consistent_rms=rms)`` gives an orthogonal update (Liu et al.,
  arXiv:2502.16982), for an update with any spectrum. AdamW's updates have about
  0.2, so its learning rates are where to start (measured: README).

  With ``rms_of='output'`` every output j, a column of the matrix, has that size,
  ``ΔW_j ← rms · √(1 + h²) · ΔW_j / √(r_j² + h² r²)``, r_j its own root mean square, h = 0.3, which
  holds back outputs with much less than the others. The matrix's is `rms` at the most. (NorMuon,
  arXiv:2510.05491, takes a running average of r_j²; this has no state.)

  Args:
    rms: Of the entries of each matrix's update, in units of the learning rate. May
      be traced.
    rms_of: What has that root mean square: the "matrix" (default), every "output", or what "wide"
      or "layer_type" say; also a tree of these, see `spectral_newton`.
    weight_dimension_numbers: See `spectral_newton`.

  Returns:
    A stateless `GradientTransformation`. A zero update stays zero.

  Raises:
    ValueError: At construction, for an unknown word as `rms_of`; in `update`, for a tree that
      does not fit, with the parameter's path and shape.
  """
  update_size.check(rms_of)

  def update_fn(updates, state, params=None):
    del params
    views = layout.matrix_views(updates, weight_dimension_numbers)
    sizes = update_size.resolve(rms_of, updates, views)
    new = layout.leaves_by_path(updates)
    for path, view in views.items():
      x = new[path]
      wide = x.astype(_compute_dtype(x.dtype))
      scaled = update_size.to_rms(wide, rms, sizes[path], view.reduction_axes, view.output_axes)
      new[path] = scaled.astype(x.dtype)
    return jax.tree.unflatten(jax.tree.structure(updates), list(new.values())), state

  return optax.GradientTransformation(optax.init_empty_state, update_fn)


# ---------------------------------------------------------------------------------
# All three
# ---------------------------------------------------------------------------------


def scale_by_spectral_newton(
  alpha: Any = 'default',
  damping: Any = None,
  *,
  momentum: float | jax.Array = 0.9,
  nesterov: bool = True,
  mu_dtype: Any | None = None,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float | None = None,
  rank: int | None = None,
  update_rms: float | jax.Array | None = 0.2,
  rms_of: Any = 'wide',
  weight_dimension_numbers: layout.WeightDimNumOrFn | None = None,
  mesh: Any = None,
  work_axes: str | Sequence[str] | None = None,
  shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Momentum, spectral transfer and update size: Spectral Newton without the rest.

  The chain of `scale_by_momentum` and `scale_by_spectral_transfer`, which here does what
  `scale_to_rms` would. Parameters that are no matrices get the momentum alone;
  `spectral_newton` gives them to AdamW.

  Args:
    alpha: Curvature exponent α ≥ 0; see `spectral_newton`.
    damping: d ≥ 0, "constant" or "noise"; see `spectral_newton`.
    momentum: See `scale_by_momentum`.
    nesterov: See `scale_by_momentum`.
    mu_dtype: See `scale_by_momentum`.
    normalize: See `apply_transfer`.
    solver: See `apply_transfer`.
    tolerance: See `apply_transfer`.
    rank: See `apply_transfer`.
    update_rms: See `scale_to_rms`; None to leave the size that T gives.
    rms_of: See `spectral_newton`.
    weight_dimension_numbers: See `spectral_newton`.
    mesh: See `spectral_newton`.
    work_axes: See `spectral_newton`.
    shardings: See `spectral_newton`.

  Returns:
    A `GradientTransformationExtraArgs`; its state is the tuple of its parts' states.

  Raises:
    ValueError, TypeError: as the parts do.
  """
  average = scale_by_momentum(momentum, nesterov=nesterov, mu_dtype=mu_dtype)
  transfer = scale_by_spectral_transfer(
    alpha,
    exponents.default_damping(alpha, damping),
    normalize=normalize,
    solver=solver,
    tolerance=tolerance,
    rank=rank,
    update_rms=update_rms,
    rms_of=rms_of,
    weight_dimension_numbers=weight_dimension_numbers,
    mesh=mesh,
    work_axes=work_axes,
    shardings=shardings,
  )

  def init_fn(params):
    return average.init(params), transfer.init(params)

  def update_fn(updates, state, params=None, **extra_args):
    of_average, of_transfer = state
    noise = functools.partial(noise_in_momentum, updates, of_average, momentum, nesterov)
    ahead, of_average = average.update(updates, of_average)
    extra_args = {'noise': noise, **extra_args}
    ahead, of_transfer = transfer.update(ahead, of_transfer, params, **extra_args)
    return ahead, (of_average, of_transfer)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
