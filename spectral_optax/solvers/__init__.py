"""From a matrix G = U Σ Vᵀ to U T(Σ) Vᵀ: one file a method, one signature.

    solve(problem) -> solution            (`_problem`)

A problem is a batch of normalised matrices of one shape with an α and a d for each; a
solution is their updates, and how far T may be off. Callers of `solve_batch` and
`apply_transfer` need not care: orientation, dtype, normalisation and bad numbers are
dealt with here, once for all methods. A new solver is a new file and a line in
`SOLVERS`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers import cholesky, gram, low_rank, rational, svd
from spectral_optax.solvers._lapack import one_at_a_time
from spectral_optax.solvers._problem import Leading, Problem, Solution, known


class Method(NamedTuple):
  """A solver, and what has to be known of it to call it.

  Attributes:
    solve: From a `Problem` to a `Solution`.
    needs_gram: Whether it looks at `Problem.gram`.
    largest_alpha: Above it the method has no answer.
    bounded: Whether it needs σ² to stay below `Problem.largest`.
  """

  solve: Callable[[Problem], Solution]
  needs_gram: bool = True
  largest_alpha: float = math.inf
  bounded: bool = False


SOLVERS = {
  'svd': Method(svd.solve, needs_gram=False),
  'gram': Method(gram.solve),
  'cholesky': Method(cholesky.solve, largest_alpha=2.0),
  'rational': Method(rational.solve, largest_alpha=2.0, bounded=True),
  'low_rank': Method(low_rank.solve, needs_gram=False),
}
NORMALIZATIONS = ('rms', 'spectral', 'frobenius', None)

# Relative error of T that "auto" and the approximate solvers may make.
DEFAULT_TOLERANCE = 0.1
DEFAULT_RANK = 16


def _is_exactly_two(alpha: Any) -> bool:
  """Whether α is 2 and known while tracing: no JAX array, no schedule."""
  return known(alpha) and bool(np.all(np.asarray(alpha) == 2))


def choose_solver(
  solver: str,
  alpha: Any,
  damping: Any,
  shape: tuple[int, int, int],
  *,
  normalize: str | None = 'rms',
  tolerance: float = DEFAULT_TOLERANCE,
  backend: str = 'cpu',
) -> str:
  """The method that runs: `solver`, or for "auto" the cheapest that is good enough.

  Args:
    solver: "auto" or a key of `SOLVERS`, which comes back as it is.
    alpha: Curvature exponents; JAX arrays count as traced, between 0 and 2.
    damping: d, likewise.
    shape: (batch, m, n), m ≥ n.
    normalize: See `apply_transfer`.
    tolerance: See `apply_transfer`.
    backend: "cpu", "tpu", or "cuda" or "rocm".
  """
  if solver != 'auto':
    return solver
  return 'cholesky' if _is_exactly_two(alpha) else 'rational'


def check_solver(solver: str, normalize: str | None, tolerance: Any = DEFAULT_TOLERANCE) -> None:
  """Raises ValueError for an unknown solver or normalisation, or a tolerance out of range."""
  if solver != 'auto' and solver not in SOLVERS:
    raise ValueError(f'solver must be "auto" or one of {sorted(SOLVERS)}, got {solver!r}.')
  if normalize not in NORMALIZATIONS:
    raise ValueError(f'normalize must be one of {NORMALIZATIONS}, got {normalize!r}.')
  if not known(tolerance) or not 0 < float(tolerance) < 1:
    raise ValueError(
      'tolerance is the relative error that T may have: a Python number between 0 and 1,'
      f' known while tracing; got {tolerance}.'
    )


def check_hyperparams(solver: str, alpha: Any, damping: Any, where: str = '') -> None:
  """Raises ValueError for α, d or a solver that make no sense together.

  Traced values cannot be looked at and are let through.
  """
  for name, value in (('alpha', alpha), ('damping', damping)):
    if isinstance(value, jax.core.Tracer):
      continue
    numbers = np.asarray(value)
    if np.iscomplexobj(numbers) or not np.all((numbers >= 0) & np.isfinite(numbers)):
      meaning = 'a curvature exponent' if name == 'alpha' else 'a damping'
      raise ValueError(f'{name} is {meaning}: finite and not negative, got {value}{where}.')
  if solver == 'cholesky' and not _is_exactly_two(alpha):
    raise ValueError(
      f'solver="cholesky" computes alpha = 2 alone, as a Python number that is known'
      f' while tracing; got alpha = {alpha}{where}. Use solver="rational", "gram" or "auto".'
    )
  if solver in SOLVERS and not isinstance(alpha, jax.core.Tracer):
    limit = SOLVERS[solver].largest_alpha
    if np.any(np.asarray(alpha) > limit):
      raise ValueError(
        f'solver="{solver}" computes alpha up to {limit:g}, got alpha = {alpha}{where}.'
        ' Use solver="gram" or "auto".'
      )


class Spectrum(NamedTuple):
  """What is known of the spectra of a batch of matrices, without decomposing them.

  Attributes:
    participation_ratio: (batch,), (Σσ²)² / Σσ⁴ = ‖G‖⁴_F / ‖GᵀG‖²_F, between 1 and
      the rank: how many directions carry the energy. With "low_rank", which does not
      see the whole spectrum, as if what it left out were flat.
    sigma_max: (batch,), an estimate of the largest singular value, in the units of G;
      approached from below.
    basis: (batch, n, r), leading right singular vectors, where the next step starts.
    transfer_error: (batch,), how far T may be off, relative, rounding aside.
  """

  participation_ratio: jax.Array
  sigma_max: jax.Array
  basis: jax.Array
  transfer_error: jax.Array


def _gram(matrix: jax.Array) -> jax.Array:
  return jnp.einsum('bij,bik->bjk', matrix, matrix, precision='highest')


def _normalize(
  matrix: jax.Array, normalize: str | None, basis: jax.Array
) -> tuple[jax.Array, jax.Array, Leading | None]:
  """(Ĝ, c, leading) with G = c Ĝ and Ĝ of unit size; c (batch, 1, 1), one for zero."""
  # In two steps: squares of entries of size 1e±30 would leave float32.
  largest = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
  largest = jnp.where(largest > 0, largest, 1)
  matrix = matrix / largest
  leading = None
  if normalize == 'spectral':
    leading = _leading(matrix, basis)
    size = leading.sigma[:, :1, None]
  else:
    size = jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1), keepdims=True))
    if normalize != 'frobenius':
      size /= math.sqrt(min(matrix.shape[-2:]))
  size = jnp.where(size > 0, size, 1)
  if leading is not None:
    leading = leading._replace(sigma=leading.sigma / size[:, :, 0])
  return matrix / size, largest * size, leading


def largest_square(normalize: str | None, small: int) -> float:
  """The largest σ² that a normalised matrix can have, `small` its smaller side."""
  if normalize == 'frobenius':
    return 1.0
  if normalize == 'spectral':
    return (1 + SPECTRAL_SLACK) ** 2
  return float(small)  # All of ‖G‖² = small · RMS² in one direction.


# By how much σ may exceed 1 under `normalize="spectral"`, whose σ_max is an estimate.
SPECTRAL_SLACK = 0.1
_COLD_STEPS, _WARM_STEPS = 24, 4


def _leading(matrix: jax.Array, basis: jax.Array) -> Leading:
  """σ_max and its vector by power iteration, from `basis` and the longest column.

  v ← GᵀG v / |…| as many times as it takes: a good start needs few, a cold one many,
  and both end when σ no longer moves by a thousandth.
  """
  unit, _ = _unit(basis[:, :, 0])

  def multiply(v):
    gv = jnp.einsum('bmn,bn->bm', matrix, v, precision='highest')
    sigma = jnp.sqrt(jnp.sum(jnp.square(gv), axis=-1))
    return jnp.einsum('bmn,bm->bn', matrix, gv, precision='highest'), sigma

  # The longest column is never orthogonal to all leading directions: it starts the
  # first step, and lets a new leader in when the old one has been overtaken.
  lengths = jnp.sum(jnp.square(matrix), axis=-2)
  longest = jnp.argmax(lengths, axis=-1)
  column = jnp.take_along_axis(matrix, longest[:, None, None], axis=-1)[:, :, 0]
  column, _ = _unit(jnp.einsum('bmn,bm->bn', matrix, column, precision='highest'))
  start, _ = _unit(unit + 0.1 * column)

  def more(carry):
    count, _, before, sigma = carry
    moving = jnp.any(jnp.abs(sigma - before) > 1e-3 * sigma)
    return (count < _WARM_STEPS) | (moving & (count < _COLD_STEPS))

  def step(carry):
    count, v, _, before = carry
    v, sigma = multiply(v)
    return count + 1, _unit(v)[0], before, sigma

  zeros = jnp.zeros(matrix.shape[:1], matrix.dtype)
  _, v, _, _ = jax.lax.while_loop(more, step, (0, start, zeros, zeros))
  v = jax.lax.stop_gradient(v)  # σ_max is stationary in it.
  return Leading(multiply(v)[1][:, None], v[:, :, None])


def _unit(v: jax.Array) -> tuple[jax.Array, jax.Array]:
  norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=-1, keepdims=True))
  return jnp.where(norm > 0, v / jnp.where(norm > 0, norm, 1), 0), norm


def _from_gram(gram_matrix: jax.Array, basis: jax.Array) -> Leading:
  """As `_leading`, two steps from GᵀG: for a value to log, which may lag behind."""
  apply = lambda v: jnp.einsum('bij,bj->bi', gram_matrix, v, precision='highest')
  column = jnp.argmax(jnp.diagonal(gram_matrix, axis1=-2, axis2=-1), axis=-1)
  column = jnp.take_along_axis(gram_matrix, column[:, None, None], axis=-2)[:, 0]
  v = basis[:, :, 0] + 0.1 * _unit(column)[0]
  for _ in range(2):
    v, _ = _unit(apply(v))
  rayleigh = jnp.maximum(jnp.sum(v * apply(v), axis=-1, keepdims=True), 0)
  return Leading(jnp.sqrt(rayleigh), v[:, :, None])


def _participation_ratio(matrix, gram_matrix: jax.Array | None, leading: Leading) -> jax.Array:
  if gram_matrix is not None:
    energy = jnp.trace(gram_matrix, axis1=-2, axis2=-1)
    squares = jnp.sum(jnp.square(gram_matrix), axis=(-2, -1))
  else:
    lead = jnp.square(leading.sigma)
    energy = jnp.sum(jnp.square(matrix), axis=(-2, -1))
    rest = jnp.maximum(energy - jnp.sum(lead, axis=-1), 0)
    left_out = max(matrix.shape[-1] - lead.shape[-1], 1)
    squares = jnp.sum(jnp.square(lead), axis=-1) + jnp.square(rest) / left_out
  return jnp.where(squares > 0, jnp.square(energy) / jnp.where(squares > 0, squares, 1), 0)


def _solve(name: str, problem: Problem) -> Solution:
  """One method's answer; "low_rank" steps aside where its own bound says so."""
  return SOLVERS[name].solve(problem)


def solve_batch(
  matrix: jax.Array,
  alpha: ArrayLike,
  damping: ArrayLike,
  *,
  normalize: str | None,
  solver: str,
  tolerance: float = DEFAULT_TOLERANCE,
  basis: jax.Array | None = None,
) -> tuple[jax.Array, Spectrum]:
  """U T(Σ) Vᵀ and the spectra of a batch of matrices of one shape.

  Args:
    matrix: (batch, m, n), float32 or float64.
    alpha: Curvature exponent, a number or (batch,); NumPy if known while tracing.
    damping: d, a number or (batch,); likewise.
    normalize: See `apply_transfer`.
    solver: "auto" or a key of `SOLVERS`.
    tolerance: See `apply_transfer`.
    basis: (batch, min(m, n), r), where the iteration for leading singular vectors
      starts; None, or zeros, for a cold start with r = 1.

  Returns:
    The update (batch, m, n) and a `Spectrum`. A matrix with a NaN or an infinity
    in it gives an update, and a spectrum, of NaN, and a zero basis.
  """
  batch = matrix.shape[:1]
  wide = matrix.shape[-2] < matrix.shape[-1]
  if wide:
    matrix = matrix.swapaxes(-1, -2)
  dtype = matrix.dtype
  if basis is None:
    basis = jnp.zeros((*batch, matrix.shape[-1], 1), dtype)
  alpha, damping = (
    np.broadcast_to(np.asarray(x, np.float64), batch)
    if known(x)
    else jnp.broadcast_to(jnp.asarray(x, dtype), batch)
    for x in (alpha, damping)
  )
  finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
  # The solvers see zeros: not every LAPACK comes back from a NaN.
  matrix = jnp.where(finite, matrix, 0)
  unit, scale, leading = _normalize(matrix, normalize, basis)

  def solve(name: str) -> tuple[jax.Array, jax.Array, jax.Array, Leading]:
    method, given, d, factor = SOLVERS[name], unit, damping, None
    if normalize is None:
      # T acts on σ as it comes. T(cσ; α, d) is c^(1-α) T(σ; α, d c^-α): with c where
      # powers would overflow, or where a method wants σ² in an interval.
      c = scale[:, 0, 0] if method.bounded else jnp.maximum(scale[:, 0, 0], 1)
      given = unit if method.bounded else matrix / c[:, None, None]
      d, factor = damping * c ** -jnp.asarray(alpha, dtype), c ** (1 - jnp.asarray(alpha, dtype))
    unit_gram = _gram(unit) if method.needs_gram or name == 'svd' else None
    problem = Problem(
      matrix=given,
      gram=unit_gram if given is unit or unit_gram is None else _gram(given),
      alpha=alpha,
      damping=d,
      largest=largest_square(normalize, matrix.shape[-1]),
      tolerance=tolerance,
      basis=basis,
    )
    update, error, found = method.solve(problem)
    if factor is not None:
      update *= factor[:, None, None]
    known_leading = leading or found
    if known_leading is None:
      assert unit_gram is not None
      known_leading = _from_gram(unit_gram, basis)
    elif given is not unit:
      known_leading = known_leading._replace(sigma=known_leading.sigma)
    ratio = _participation_ratio(unit, unit_gram, known_leading)
    return update, jnp.broadcast_to(jnp.asarray(error, dtype), batch), ratio, known_leading

  shape = (*batch, *matrix.shape[-2:])
  choose = functools.partial(
    choose_solver, solver, alpha, damping, shape, normalize=normalize, tolerance=tolerance
  )
  names = {platform: choose(backend=platform) for platform in ('cpu', 'cuda', 'rocm', 'tpu')}
  if len(set(names.values())) == 1:
    update, error, ratio, leading = solve(names['cpu'])
  else:
    update, error, ratio, leading = jax.lax.platform_dependent(
      **{platform: functools.partial(solve, name) for platform, name in names.items()}
    )
  update = jnp.where(finite, update, jnp.nan)
  finite = finite[:, 0, 0]
  nan_unless_finite = lambda x: jnp.where(finite, x, jnp.nan)
  found = leading.basis[:, :, : basis.shape[-1]]
  missing = basis.shape[-1] - found.shape[-1]
  if missing:
    found = jnp.pad(found, ((0, 0), (0, 0), (0, missing)))
  spectrum = Spectrum(
    nan_unless_finite(ratio),
    nan_unless_finite(scale[:, 0, 0] * leading.sigma[:, 0]),
    found,
    nan_unless_finite(error),
  )
  return update.swapaxes(-1, -2) if wide else update, spectrum


def apply_transfer(
  matrix: ArrayLike,
  *,
  alpha: ArrayLike,
  damping: ArrayLike = 0.1,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float = DEFAULT_TOLERANCE,
  rank: int | None = None,
) -> jax.Array:
  r"""``U diag(T(σ)) Vᵀ`` with ``T(σ) = σ / (σ^α + d)``, for G = U Σ Vᵀ.

  The pure function under `scale_by_spectral_transfer`; jit, vmap and scan over it,
  over α and over d as you like.

  Args:
    matrix: G, shape (..., m, n); every leading index is a matrix of its own. Any
      real float dtype; bfloat16 and float16 are computed in float32.
    alpha: Curvature exponent α ≥ 0 (not a learning rate); a number, or an array
      that broadcasts against the leading axes. May be traced.
    damping: d ≥ 0, likewise; in units of the normalised ``σ^α``. d = 0 gives
      directions that are there by rounding alone their full weight.
    normalize: What σ is divided by before T: ``"rms"``, the root mean square
      singular value ‖G‖_F / √min(m, n) (default); ``"spectral"``, σ_max;
      ``"frobenius"``, ‖G‖_F; or None, nothing (the published formula). All but
      None make the result independent of the scale of G.
    solver: ``"svd"`` (reference), ``"gram"`` (any α, exact), ``"cholesky"`` (α = 2,
      exact), ``"rational"`` (α ≤ 2, to `tolerance`), ``"low_rank"`` (leading
      directions alone) or ``"auto"`` (default), what is fastest for this shape, α,
      tolerance and machine.
    tolerance: Relative error of T that is allowed at any σ, of methods that approximate
      it. Known while tracing.
    rank: How many directions ``"low_rank"`` takes; 16 by default.

  Returns:
    Same shape and dtype as `matrix`. Zero for a zero matrix; NaN throughout for a
    matrix that holds a NaN or an infinity.

  Raises:
    ValueError: fewer than two axes, an unknown solver or normalisation, α or d
      negative or not finite, α that does not broadcast, or ``"cholesky"`` with an
      α that is traced or not 2.
    TypeError: complex or integer `matrix`.
  """
  matrix = jnp.asarray(matrix)
  if matrix.ndim < 2:
    raise ValueError(f'matrix must have shape (..., m, n), got {matrix.shape}.')
  if not jnp.issubdtype(matrix.dtype, jnp.floating):
    raise TypeError(f'matrix must be real and floating, got dtype {matrix.dtype}.')
  check_solver(solver, normalize, tolerance)
  check_hyperparams(solver, alpha, damping)
  batch = matrix.shape[:-2]
  if matrix.size == 0:
    return matrix
  dtype = jnp.promote_types(matrix.dtype, jnp.float32)

  def flat(value, name):
    if np.ndim(value) == 0:
      return value
    if jnp.broadcast_shapes(jnp.shape(value), batch) != batch:
      raise ValueError(
        f'{name} of shape {jnp.shape(value)} does not broadcast against the leading'
        f' axes {batch} of a matrix of shape {matrix.shape}.'
      )
    return (np if known(value) else jnp).broadcast_to(value, batch).reshape(-1)

  flat_matrix = matrix.reshape(-1, *matrix.shape[-2:]).astype(dtype)
  rank = min(rank or DEFAULT_RANK, *matrix.shape[-2:]) if solver == 'low_rank' else 1
  basis = jnp.zeros((len(flat_matrix), min(matrix.shape[-2:]), rank), dtype)
  update, spectrum = solve_batch(
    flat_matrix,
    flat(alpha, 'alpha'),
    flat(damping, 'damping'),
    normalize=normalize,
    solver=solver,
    tolerance=tolerance,
    basis=basis,
  )
  if solver == 'low_rank':  # Once more, from a basis that is warm.
    update, _ = solve_batch(
      flat_matrix,
      flat(alpha, 'alpha'),
      flat(damping, 'damping'),
      normalize=normalize,
      solver=solver,
      tolerance=tolerance,
      basis=jax.lax.stop_gradient(spectrum.basis),
    )
  return update.reshape(matrix.shape).astype(matrix.dtype)
