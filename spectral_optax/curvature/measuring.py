"""`measure`: what the paper defines, layer by layer, of any JAX loss, in one call.

    gradient  ->  its singular directions  ->  curvature along them  ->  fits

Two passes over the data: one for the gradients, one for the curvature. The conventions are
those of A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes",
arXiv:2606.02596, but for one: a singular value that is there by rounding alone (of a
classifier's gradient, whose columns add up to zero, the last one) has no direction, and is
kept out of the fits.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax import layout
from spectral_optax.curvature import fits
from spectral_optax.curvature.directional import (
  DEFAULT_MEMORY_BUDGET,
  Batches,
  GroupBy,
  Method,
  Problem,
  Split,
  Static,
)
from spectral_optax.curvature.report import CurvatureReport, LayerCurvature
from spectral_optax.solvers._lapack import one_at_a_time


def measure(
  loss_fn: Callable[..., jax.Array],
  params: Any,
  *,
  top_k: int = 20,
  weight_dimension_numbers: Any | None = None,
  batches: Batches | None = None,
  weights: Sequence[float] | None = None,
  gauss_newton: Split | None = None,
  rank_tolerance: float | None = None,
  min_points: int = fits.MIN_POINTS,
  bootstrap: int = 1000,
  seed: int = 0,
  level: float = 0.95,
  method: Method = 'auto',
  group_by: GroupBy = 'parameter',
  memory_budget: int | None = DEFAULT_MEMORY_BUDGET,
  progress: bool = False,
) -> CurvatureReport:
  """Measures every matrix among the parameters: σ_k, h_k, α, γ, s and what goes with them.

  At initialisation many h_k are negative and the fits poor, as a rule; the report says so
  (`LayerCurvature.num_negative`, `PowerLawFit.r_squared`).

      report = curvature.measure(loss_fn, params, batches=batches)
      rich.print(report.table())
      tx = spectral_optax.spectral_newton(1e-2, alpha=report.alpha_tree())

  Args:
    loss_fn: ``loss_fn(params)``, or ``loss_fn(params, batch)`` with `batches`; gives a real
      scalar and is deterministic (no dropout, or always the same). Give the same function
      object again, with what changes (running averages, say) in the batch, and nothing is
      compiled again.
    params: The parameter tree: dicts, `nnx.State`, an Equinox module, ... Leaves in half
      precision are measured in float32.
    top_k: How many singular directions of each matrix, or as many as it has.
    weight_dimension_numbers: Which axes are rows and columns: inferred, or as for
      `spectral_newton`.
    batches: None, or the batches over whose losses the mean is taken: a list, another
      iterable that can be gone through again, or a function that gives one.
    weights: How much each batch counts; None for all the same, which they must then be
      in shape.
    gauss_newton: None, or (f, c) with ``loss_fn(params) = c(f(params))``, each with the
      batch as second argument if there are batches: for the Gauss-Newton curvature too.
    rank_tolerance: Singular values up to this part of the largest are zero: kept in the
      report, with the curvature along the directions that rounding has given them, and out
      of all fits. None: what rounding leaves, max(rows, columns) times the precision of the
      data type; 0: exact zeros alone, as published.
    min_points: With fewer points there is no fit; see `fit_alpha`.
    bootstrap: Draws for the intervals of the exponents; 0 for none.
    seed: Of those draws.
    level: Of those intervals.
    method: How curvature is computed; see `directional_curvature`.
    group_by: Which layers share a program; see `directional_curvature`.
    memory_budget: In bytes; see `directional_curvature`.
    progress: Whether to show bars (needs tqdm).

  Returns:
    A `CurvatureReport` with a row a matrix, of a stack of layers a row each, in the order
    in which the loss uses them. Where a gradient is zero or not finite, its row is of NaN
    and has a `reason`.

  Raises:
    ValueError: no matrix among the parameters, a `gauss_newton` that is another loss,
      and what `directional_curvature` raises.
    TypeError: As `directional_curvature`; a complex matrix.
  """
  if top_k < 1:
    raise ValueError(f'top_k must be at least 1, got {top_k}.')
  problem = Problem.of(loss_fn, params, weight_dimension_numbers, batches, weights, gauss_newton)
  if not problem.views:
    raise ValueError(
      'There is no matrix among the parameters'
      f' ({layout._listing(layout.leaves_by_path(params)) or "the tree is empty"}). Pass'
      ' weights, and weight_dimension_numbers if their names do not show them.'
    )
  loss, gradients = _gradients(problem, progress)
  spectra, directions = {}, {}
  for path, gradient in gradients.items():
    clean = jnp.where(jnp.isfinite(gradient).all((1, 2), keepdims=True), gradient, 0)
    u, sigma, vt = _svd(clean)
    spectra[path] = np.asarray(sigma, np.float64)
    directions[path] = u[:, :, :top_k].swapaxes(1, 2), vt[:, :top_k]
  h, h_gauss_newton = problem.curvature(directions, method, group_by, memory_budget, progress)

  types = layout.layer_types_by_path(params)
  fit = functools.partial(_row, min_points=min_points, bootstrap=bootstrap, seed=seed, level=level)
  rows = []
  for path in problem.in_order_of_use():
    view, gradient = problem.views[path], gradients[path]
    finite = np.asarray(jnp.isfinite(gradient).all((1, 2)))
    tolerance = rank_tolerance
    if tolerance is None:
      tolerance = max(view.rows, view.columns) * float(jnp.finfo(gradient.dtype).eps)
    for i, index in enumerate(np.ndindex(view.batch_shape)):
      rows.append(
        fit(
          {
            'path': path,
            'index': index,
            'batch_shape': view.batch_shape,
            'layer_type': types[path],
            'shape': (view.rows, view.columns),
          },
          spectra[path][i] if finite[i] else np.full_like(spectra[path][i], np.nan),
          h[path][i],
          None if h_gauss_newton is None else h_gauss_newton[path][i],
          tolerance,
        )
      )
  settings = {
    'top_k': top_k,
    'batches': problem.num_batches,
    'method': method,
    'rank_tolerance': rank_tolerance,
    'min_points': min_points,
    'bootstrap': bootstrap,
    'seed': seed,
    'level': level,
  }
  return CurvatureReport(tuple(rows), loss, settings)


def _row(
  where: dict[str, Any],
  spectrum: np.ndarray,
  h: np.ndarray,
  h_gauss_newton: np.ndarray | None,
  tolerance: float,
  **options: Any,
) -> LayerCurvature:
  largest, sigma = spectrum[0], spectrum[: len(h)]
  there = sigma > tolerance * largest
  reason = 'its gradient is zero' if largest == 0 else ''
  reason = reason if np.isfinite(largest) else 'its gradient is not finite'
  if reason:  # Then so are all directions.
    h = np.full_like(h, np.nan)
    h_gauss_newton = None if h_gauss_newton is None else h
  # What is there comes first: the spectrum decreases.
  alpha = fits.fit_alpha(sigma[there], h[there], **options)
  gamma = fits.fit_gamma(sigma[there], **options)
  s = fits.fit_decay(h[there], **options)
  if reason:
    alpha, gamma, s = (fit._replace(reason=reason) for fit in (alpha, gamma, s))
  real = h[there]
  spread = fits.participation_ratio(real[real > 0]) if np.isfinite(real).all() else np.nan
  return LayerCurvature(
    **where,
    spectrum=spectrum,
    sigma=sigma,
    h=h,
    h_gauss_newton=h_gauss_newton,
    alpha=alpha,
    gamma=gamma,
    s=s,
    profile=fits.rank_profile(sigma[there]),
    participation_h=spread,
    participation_gradient=fits.participation_ratio(spectrum),
    bound=float(fits.participation_bound(alpha.exponent, gamma.exponent)),
    num_directions=int(there.sum()),
    num_negative=int(np.sum(real < 0)),
    reason=reason,
  )


# ---------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------

_svd = jax.jit(one_at_a_time(lambda matrix: jnp.linalg.svd(matrix, full_matrices=False)))


def _gradients(problem: Problem, progress: bool) -> tuple[float, dict[str, jax.Array]]:
  """The mean loss, and of each parameter the mean gradient as (matrices, rows, columns)."""
  program = _gradient_program(problem.static, tuple(problem.positions.values()))
  loss = 0.0
  sums: list[Any] = [0.0] * len(problem.views)
  with jax.default_matmul_precision('highest'):
    for batch, weight, bar in problem.passes(progress, 1, 'gradients'):
      (value, composed), grads = program(problem.leaves, batch)
      if not np.allclose(value, composed, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
          f'gauss_newton=(f, c) gives a loss of {float(composed)} and loss_fn one of'
          f' {float(value)}: c(f(params)) must be the loss.'
        )
      loss += weight * float(value)
      sums = [total + weight * g for total, g in zip(sums, grads, strict=True)]
      bar.update()
  views = problem.views.values()
  matrices = (view.to_matrices(total) for view, total in zip(views, sums, strict=True))
  return loss, dict(zip(problem.views, matrices, strict=True))


@functools.lru_cache(maxsize=16)
def _gradient_program(static: Static, positions: tuple[int, ...]) -> Callable[..., Any]:
  """((loss, c(f)), gradients of the leaves at `positions`)."""

  @jax.jit
  def program(leaves, batch):
    def loss(inside):
      replaced = list(leaves)
      for i, leaf in zip(positions, inside, strict=True):
        replaced[i] = leaf
      value = static.loss(replaced, batch)
      if static.gauss_newton is None:
        return value, value
      f, c = (part.value for part in static.gauss_newton)
      outputs = static.call(f, replaced, batch)
      return value, c(outputs, batch) if static.has_batch else c(outputs)

    (value, composed), grads = jax.value_and_grad(loss, has_aux=True)(
      [leaves[i] for i in positions]
    )
    return (value, composed), grads

  return program
