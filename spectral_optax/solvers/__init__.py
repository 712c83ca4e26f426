"""From a matrix G = U Σ Vᵀ to U T(Σ) Vᵀ: one file a method, one signature.

    solve(problem) -> solution            (`_problem`)

A problem is a batch of normalised matrices of one shape with an α and a d for each; a
solution is their updates, and how far T may be off. Methods that look at nothing but the
Gram matrix give f(GᵀG) instead, so that matrices of one smaller side are one batch
however long they are. Callers of `solve_batches` and `apply_transfer` need not care:
orientation, dtype, normalisation and bad numbers are dealt with here, once for all
methods. A new solver is a new file and a line in `SOLVERS`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax.solvers import (
  cholesky,
  gram,
  low_rank,
  polynomial,
  rational,
  svd,
)
from spectral_optax.solvers._fitting import terms
from spectral_optax.solvers._perturbation import transpose
from spectral_optax.solvers._problem import BFLOAT16_TOLERANCE, Fits, Problem, Solution, known
from spectral_optax.solvers._products import GramMatrices, apply, is_wide
from spectral_optax.solvers._spectrum import (
  SPECTRAL_SLACK,
  Spectrum,
  converge,
  follow,
  multiply_gram,
  multiply_twice,
  participation_ratio,
  participation_ratio_of_leading,
)
from spectral_optax.solvers._split import WHOLE, Split


class Method(NamedTuple):
  """A solver, and what has to be known of it to call it.

  Attributes:
    solve: From a `Problem` to a `Solution`.
    of_gram: Whether the answer is f(GᵀG), from `Problem.gram` alone, in place of the
      update G f(GᵀG).
    needs_gram: Whether it looks at `Problem.gram`.
    largest_alpha: Above it the method has no answer.
  """

  solve: Callable[[Problem], Solution]
  of_gram: bool = False
  needs_gram: bool = True
  largest_alpha: float = math.inf


SOLVERS = {
  'svd': Method(svd.solve, needs_gram=False),
  'gram': Method(gram.solve),
  'cholesky': Method(cholesky.solve, largest_alpha=2.0),
  'rational': Method(rational.solve, of_gram=True, largest_alpha=2.0),
  'polynomial': Method(polynomial.solve, of_gram=True),
  'low_rank': Method(low_rank.solve, needs_gram=False),
}
NORMALIZATIONS = ('rms', 'spectral', 'frobenius', None)

# Relative error of T that "auto" and the approximate solvers may make.
DEFAULT_TOLERANCE = 0.1


def vectors(solver: str, rank: int | None, small: int) -> int:
  """How many leading singular vectors are carried along."""
  return min(rank or low_rank.RANKS[-1], small) if solver == 'low_rank' else 1


def _is_exactly_two(alpha: Any) -> bool:
  """Whether α is 2 and known while tracing: no JAX array, no schedule."""
  return known(alpha) and bool(np.all(np.asarray(alpha) == 2))


class Cost(NamedTuple):
  """What a solver's parts cost, in products of n x n matrices; a step of "polynomial" is one.

  Attributes:
    pole: An inverse for "rational"; the first is half of it.
    eigenvectors: A decomposition for "gram".
  """

  pole: float
  eigenvectors: float


# By backend and smaller side (the nearest below). On a CPU from whole updates on two cores,
# `benchmarks/step_time.py --calibrate`: LAPACK runs on one of them, and products are quick.
# Elsewhere an inverse is a long chain of small steps, and eigenvectors are slow to run and on
# a TPU take minutes to compile: the last resort. On a GPU (an H200, `--calibrate --quick`, in
# products in bfloat16) batches of small inverses are less than that; larger ones were not measured.
ELSEWHERE = Cost(60, math.inf)
COSTS: Mapping[str, Mapping[int, Cost]] = {
  'cpu': {1: Cost(8, 48), 128: Cost(3, 25), 256: Cost(2, 26), 384: Cost(1.3, 14)},
  'gpu': {1: Cost(8, 42), 128: Cost(10, 41), 256: Cost(8, 72), 384: Cost(11, 400), 768: ELSEWHERE},
}


def choose_solver(
  solver: str,
  alpha: Any,
  damping: Any,
  small: int,
  *,
  normalize: str | None = 'rms',
  tolerance: float = DEFAULT_TOLERANCE,
  backend: str | None = None,
) -> str:
  """The method that runs: `solver`, or for "auto" the cheapest that is good enough.

  Good enough are "rational" (α up to 2) and "polynomial" where they can meet the
  tolerance, and "gram" always. `COSTS` says which is the cheapest.

  Args:
    solver: "auto" or a key of `SOLVERS`, which comes back as it is.
    alpha: Curvature exponents; JAX arrays count as traced, and as usual ones, up to 2.
    damping: d, likewise.
    small: The smaller side of the matrices.
    normalize: See `apply_transfer`.
    tolerance: See `apply_transfer`.
    backend: "cpu", "gpu" or "tpu"; None for JAX's default. A program that is compiled for
      another machine than it is traced on needs `solver` by name.
  """
  if solver != 'auto':
    return solver
  backend = jax.default_backend() if backend is None else backend
  largest = largest_square(normalize, small)
  costs = COSTS.get(backend, {1: ELSEWHERE})
  cost = costs[max(side for side in costs if side <= max(small, 1))]
  prices = {'gram': cost.eigenvectors}
  # How many poles, or products; where there is an answer.
  for name, price, family in (
    ('rational', lambda poles: cost.pole * (poles - 0.5), rational.FAMILY),
    ('polynomial', float, polynomial.FAMILY),
  ):
    if known(alpha) and np.any(np.asarray(alpha) > SOLVERS[name].largest_alpha):
      continue
    error, count = terms(family, alpha, damping, largest, tolerance)
    if error <= tolerance:
      prices[name] = price(count)
  return min(prices, key=prices.__getitem__)


def check_solver(
  solver: str,
  normalize: str | None,
  tolerance: Any = DEFAULT_TOLERANCE,
  rank: Any = None,
) -> None:
  """Raises ValueError for an unknown name, or a tolerance or rank out of range or traced."""
  if solver != 'auto' and solver not in SOLVERS:
    raise ValueError(f'solver must be "auto" or one of {sorted(SOLVERS)}, got {solver!r}.')
  if normalize not in NORMALIZATIONS:
    raise ValueError(f'normalize must be one of {NORMALIZATIONS}, got {normalize!r}.')
  if not known(tolerance) or not 0 < float(tolerance) < 1:
    raise ValueError(
      'tolerance is the relative error that T may have: a Python number between 0 and 1,'
      ' known while tracing (under optax.inject_hyperparams name it in static_args); got'
      f' {tolerance}.'
    )
  if rank is not None and (not known(rank) or int(rank) != rank or rank < 1):
    raise ValueError(
      'rank is a number of directions: an integer from 1, known while tracing (under'
      f' optax.inject_hyperparams name it in static_args); got {rank}.'
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
      f' while tracing; got alpha = {alpha}{where}. Use solver="gram", "rational" or "auto".'
    )
  if solver in SOLVERS and not isinstance(alpha, jax.core.Tracer):
    limit = SOLVERS[solver].largest_alpha
    if np.any(np.asarray(alpha) > limit):
      raise ValueError(
        f'solver="{solver}" computes alpha up to {limit:g}, got alpha = {alpha}{where}.'
        ' Use solver="gram" or "auto".'
      )


def largest_square(normalize: str | None, small: int) -> float:
  """The largest σ² that a normalised matrix can have, `small` its smaller side."""
  if normalize == 'frobenius':
    return 1.0
  if normalize == 'spectral':
    return (1 + SPECTRAL_SLACK) ** 2
  return float(small)  # All of ‖G‖² = small · RMS² in one direction.


class Batch(NamedTuple):
  """Matrices of one smaller side, and what to make of them.

  Attributes:
    matrices: Pieces (batch_i, m_i, n_i) with the same min(m_i, n_i), float32 or float64.
      A stack of small matrices is best one piece; large ones gain nothing from a stack
      and save the copy.
    alpha: (batch,), over all pieces; NumPy if known while tracing.
    damping: (batch,), likewise.
    basis: (batch, small, r), where the iteration for leading singular vectors starts.
      Zeros for a cold start.
    share: Inside `jax.shard_map`, which of `alpha` and `damping` go with the matrices that
      this device has, (batch,) integers; those are then of all devices' matrices.
    split: Mesh axes that the longer sides are divided over; pieces are then
      (batch_i, longer / devices, small). For methods that look at GᵀG alone.
    number: Which device along `split` this is, () integer.
    real: Which of this device's matrices are no repetitions of others, there to fill up,
      (batch,) booleans; None for all.
    most: How many are real on the device that has the most.
    noise: For each piece None, or N of its shape: T then acts on the roots of the eigenvalues of
      GᵀG + NᵀN, as if N's rows were under G's (of fewer rows than columns, G Gᵀ + N Nᵀ), and so
      does all that is said of the spectrum.
  """

  matrices: Sequence[jax.Array]
  alpha: np.ndarray | jax.Array
  damping: np.ndarray | jax.Array
  basis: jax.Array
  share: jax.Array | None = None
  split: tuple[str, ...] = ()
  number: jax.Array | None = None
  real: jax.Array | None = None
  most: int = 0
  noise: Sequence[jax.Array | None] = ()

  @property
  def noises(self) -> Sequence[jax.Array | None]:
    """`noise`, of every piece."""
    return self.noise or [None] * len(self.matrices)

  @property
  def small(self) -> int:
    """The smaller side."""
    return self.basis.shape[1]


# What rounding G to bfloat16 moves its singular values by, in units of their root mean
# square: 2⁻⁹/√3 an entry, and 1 + √(n/m) up to 2 for the norm of such a matrix.
BFLOAT16_MOVES = 2.0**-8 / math.sqrt(3)


def half_precision_will_do(
  alpha: Any, damping: Any, normalize: str | None, tolerance: float, noisy: bool = False
) -> bool:
  """Whether T changes by less than `tolerance` at σ* when G is rounded to bfloat16.

  A σ that moves by some part of the turning point σ* changes T there by no more than that
  part. Directions that are not there, of a matrix of few, get up to that part of T's peak.
  Where `noisy`, where T turns over at the noise of the gradients, rounding is more of that, and
  little of it: a thousandth of an entry's root mean square.
  """
  if tolerance < BFLOAT16_TOLERANCE or normalize is None or not (known(alpha) and known(damping)):
    return False
  if noisy:
    return True
  alpha = np.maximum(np.asarray(alpha, np.float64), 1e-3)
  return bool(np.all(np.asarray(damping) ** (1 / alpha) * tolerance >= BFLOAT16_MOVES))


def _scaled(matrix: jax.Array, split: Split = WHOLE) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(G / c, c, finite) with entries up to 1; c (batch,), one for a zero matrix.

  Squares of entries of size 1e±30 would leave float32. A matrix that is not finite is
  zero from here on: not every LAPACK comes back from a NaN.
  """
  largest = jnp.max(jnp.abs(matrix), axis=(-2, -1))  # NaN, if one is there.
  finite = split.all(jnp.isfinite(largest))
  largest = split.largest(jnp.where(finite, largest, 0))
  c = jnp.where(largest > 0, largest, 1)
  scaled = jnp.where(finite[:, None, None], matrix, 0) / c[:, None, None]
  return scaled, c, finite


def _size(energy: jax.Array, normalize: str | None, small: int | jax.Array) -> jax.Array:
  """What σ is divided by, from Σσ²; (batch,), one for a zero matrix."""
  size = jnp.sqrt(energy if normalize == 'frobenius' else energy / small)
  return jnp.where(size > 0, size, 1)


def _unscale(alpha, damping, c: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(d', factor) with T(cσ; α, d) = factor · T(σ; α, d'): for `normalize=None`."""
  # Below 1e-15, where c^-α may leave float32, T has long become σ/d.
  held, alpha = jnp.maximum(c, 1e-15), jnp.asarray(alpha, c.dtype)
  return damping * held**-alpha, c / held * held ** (1 - alpha)


def _reported(finite, ratio, sigma_max, error, basis) -> Spectrum:
  """NaN for a matrix that was not finite, of the right shape and dtype."""
  ratio, sigma_max, error = (
    jnp.where(finite, jnp.broadcast_to(jnp.asarray(x, ratio.dtype), ratio.shape), jnp.nan)
    for x in (ratio, sigma_max, error)
  )
  return Spectrum(ratio, sigma_max, error, basis)


class _Piece(NamedTuple):
  """One piece of a `Batch`, tall."""

  matrix: jax.Array
  alpha: np.ndarray | jax.Array
  damping: np.ndarray | jax.Array
  basis: jax.Array


def _solve_matrices(
  batch: _Piece, method: Method, normalize: str | None, tolerance: float, choose_rank: bool
) -> tuple[jax.Array, Spectrum]:
  """For methods that look at the matrix itself."""
  matrix, c, finite = _scaled(batch.matrix)
  n = matrix.shape[-1]
  leading = None
  if normalize == 'spectral':
    leading = converge(multiply_twice(matrix), batch.basis)
    size = jnp.where(leading.sigma[:, 0] > 0, leading.sigma[:, 0], 1)
    leading = leading._replace(sigma=leading.sigma / size[:, None])
  else:
    size = _size(jnp.sum(jnp.square(matrix), axis=(-2, -1)), normalize, n)
  unit, c = matrix / size[:, None, None], c * size
  alpha, damping, factor, given = batch.alpha, batch.damping, None, unit
  if normalize is None:
    # T acts on σ as it comes, but where its powers would overflow.
    large = jnp.maximum(c, 1)
    given = unit * (c / large)[:, None, None]
    damping, factor = _unscale(alpha, damping, large)
  gram_of = lambda x: jnp.einsum('bji,bjk->bik', x, x, precision='highest')
  problem = Problem(
    matrix=given,
    gram=gram_of(given) if method.needs_gram else None,
    alpha=alpha,
    damping=damping,
    largest=np.full(len(alpha), largest_square(normalize, n)),
    tolerance=tolerance,
    basis=batch.basis,
    choose_rank=choose_rank,
  )
  update, error, found = method.solve(problem)
  if factor is not None:
    update *= factor[:, None, None]
    if found is not None:
      found = found._replace(sigma=found.sigma * (jnp.maximum(c, 1) / c)[:, None])
  if found is not None:
    ratio = participation_ratio_of_leading(unit, found)
  else:
    unit_gram = problem.gram if given is unit else None
    unit_gram = gram_of(unit) if unit_gram is None else unit_gram
    ratio = participation_ratio(unit_gram)
    found = leading or follow(multiply_gram(unit_gram), batch.basis)
  update = jnp.where(finite[:, None, None], update, jnp.nan)
  return update, _reported(finite, ratio, c * found.sigma[:, 0], error, found.basis)


def _solve_pieces(
  batch: Batch, method: Method, normalize: str | None, tolerance: float, choose_rank: bool
) -> tuple[list[jax.Array], Spectrum]:
  """`_solve_matrices`, of pieces of one shape, either way round, at once."""
  lengths = [len(matrix) for matrix in batch.matrices]
  numbers = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
  by_shape: dict[tuple[Any, ...], list[int]] = {}
  for i, (matrix, noise) in enumerate(zip(batch.matrices, batch.noises, strict=True)):
    by_shape.setdefault((*sorted(matrix.shape[1:]), noise is None), []).append(i)
  updates: list[jax.Array] = [*batch.matrices]
  spectra = []
  take = lambda x: x if batch.share is None else jnp.asarray(x, batch.basis.dtype)[batch.share]
  alpha, damping = take(batch.alpha), take(batch.damping)
  for of in by_shape.values():
    wide = {i: updates[i].shape[-2] < updates[i].shape[-1] for i in of}
    upright = lambda x, is_wide: transpose(x) if is_wide else x
    tall = [upright(updates[i], wide[i]) for i in of]
    rows = tall[0].shape[-2]
    for place, i in enumerate(of):
      noise = batch.noises[i]
      if noise is not None:
        tall[place] = jnp.concatenate([tall[place], upright(noise, wide[i])], axis=-2)
    here = np.concatenate([numbers[i] for i in of])
    piece = _Piece(jnp.concatenate(tall), alpha[here], damping[here], batch.basis[here])
    solved, spectrum = _solve_matrices(piece, method, normalize, tolerance, choose_rank)
    spectra.append(spectrum)
    parts = jnp.split(solved[:, :rows], np.cumsum([lengths[i] for i in of])[:-1])
    for i, update in zip(of, parts, strict=True):
      updates[i] = upright(update, wide[i])
  order = np.argsort(np.concatenate([numbers[i] for of in by_shape.values() for i in of]))
  whole = Spectrum(*map(jnp.concatenate, zip(*spectra, strict=True)))
  if len(by_shape) > 1:
    whole = Spectrum(*(x[order] for x in whole))
  return updates, whole


def _solve_grams(
  batches: Sequence[Batch],
  method: Method,
  normalize: str | None,
  tolerance: float,
  fits: Fits | None,
) -> list[tuple[list[jax.Array], Spectrum]]:
  """For methods that look at GᵀG alone: matrices of one smaller side, or nearly, at once.

  A smaller Gram matrix is padded with zeros; what f makes of those is cut off again.
  No matrix of the size of G is written but the update.
  """
  n = max(batch.small for batch in batches)
  join = lambda parts: (np if all(map(known, parts)) else jnp).concatenate(parts)
  alpha, damping = (join([batch[i] for batch in batches]) for i in (1, 2))
  noisy = all(noise is not None for batch in batches for noise in batch.noises)
  half = batches[0].basis.dtype == jnp.float32 and half_precision_will_do(
    alpha, damping, normalize, tolerance, noisy
  )
  # Of all devices, and of those matrices that this one has.
  sides = np.concatenate([np.full(len(batch.alpha), batch.small) for batch in batches])
  side = np.concatenate([np.full(len(batch.basis), batch.small) for batch in batches])
  share = _joint_share(batches)
  # What `_unscale` makes of d is of a matrix, not of a place in `alpha`.
  split = Split.of(batches[0].split, batches[0].number, len(side), may_deal=normalize is not None)
  if not split.axes and normalize is not None and all(b.real is not None for b in batches):
    most = sum(batch.most for batch in batches)
    if most < len(side):
      real = jnp.concatenate([batch.real for batch in batches if batch.real is not None])
      split = split._replace(real=real, most=most)
  if split.moved:
    share = split.mine(jnp.arange(len(side)) if share is None else share)
    side = split.mine(jnp.asarray(side))
  matrices = [matrix for batch in batches for matrix in batch.matrices]
  noises = [noise for batch in batches for noise in batch.noises]
  wide = [is_wide(x, split, noise is not None) for x, noise in zip(matrices, noises, strict=True)]
  grams = GramMatrices(wide, n, half, split)
  gram_matrix, sums, c = grams.in_range([matrices, noises])
  finite = c > 0
  pad = lambda x: jnp.pad(x, ((0, 0), (0, n - x.shape[1]), (0, 0)))
  basis = split.mine(jnp.concatenate([pad(batch.basis) for batch in batches]))

  leading = None
  if normalize == 'spectral':
    leading = converge(multiply_gram(gram_matrix), basis)
    size = jnp.where(leading.sigma[:, 0] > 0, leading.sigma[:, 0], 1)
  else:
    size = _size(sums, normalize, jnp.asarray(side, sums.dtype))
  gain = 1 / (c * size)
  if normalize is None:
    if share is not None:
      alpha, damping = (jnp.asarray(x, c.dtype)[share] for x in (alpha, damping))
      share, sides = None, side
    damping, power = _unscale(alpha, damping, c * size)
    gain *= power
  problem = Problem(
    matrix=None,
    gram=gram_matrix,
    alpha=alpha,
    damping=damping,
    largest=np.array([largest_square(normalize, int(s)) for s in sides]),
    tolerance=tolerance,
    basis=basis,
    unit=jnp.square(size),
    gain=jnp.where(finite, gain, jnp.nan),
    half=half,
    share=share,
    fits=fits,
  )
  f, error, _ = method.solve(problem)
  ratio = participation_ratio(gram_matrix, sums)
  if leading is None:
    leading = follow(multiply_gram(gram_matrix), basis)
  sigma_max = jnp.where(ratio > 0, c * leading.sigma[:, 0], 0)
  found = jnp.where(finite[:, None, None], leading.basis, 0)
  whole = _reported(finite, ratio, sigma_max, error, found)
  f, whole = split.everyones(f), Spectrum(*map(split.everyones, whole))
  results, start = [], 0
  for batch in batches:
    part = slice(start, start + len(batch.basis))
    updates = []
    for matrix, noise in zip(batch.matrices, batch.noises, strict=True):
      end = start + len(matrix)
      small = batch.small
      of_noise = noise is not None
      updates.append(
        apply(matrix, f[start:end, :small, :small], is_wide(matrix, split, of_noise), half)
      )
      start = end
    spectrum = Spectrum(*(x[part] for x in whole))
    results.append((updates, spectrum._replace(basis=spectrum.basis[:, : batch.small])))
  return results


def _joint_share(batches: Sequence[Batch]) -> jax.Array | None:
  """`Batch.share` for the alphas of all batches, one after another."""
  shares, start = [], 0
  for batch in batches:
    if batch.share is not None:
      shares.append(start + batch.share)
    start += len(batch.alpha)
  return jnp.concatenate(shares) if shares else None


# Next to what there is otherwise, and by itself, what padding may add: see `_joined`.
PADDING = 0.03
OVERHEAD = 4 * 32**3


def _joined(sides: Mapping[int, int]) -> dict[int, int]:
  """For each side, with how many matrices there are of it, the side it is padded to.

  A batch of another size takes a while to compile and some time to start its kernels, so that
  the next size is shared where padding costs less: up to `PADDING` of the work that there is,
  count · n³ in all, or `OVERHEAD`.
  """
  allowed = max(PADDING * sum(count * side**3 for side, count in sides.items()), OVERHEAD)
  to: dict[int, int] = {}
  ordered = sorted(sides)
  waiting: list[int] = []
  for i, side in enumerate(ordered):
    waiting.append(side)
    count = sum(sides[s] for s in waiting)
    follows = ordered[i + 1] if i + 1 < len(ordered) else None
    if follows is None or count * follows**3 > allowed:
      to.update(dict.fromkeys(waiting, side))
      waiting = []
  return to


def solve_batches(
  batches: Sequence[Batch],
  *,
  normalize: str | None,
  solver: str,
  tolerance: float = DEFAULT_TOLERANCE,
  choose_rank: bool = False,
  fits: Fits | None = None,
) -> list[tuple[list[jax.Array], Spectrum]]:
  """U T(Σ) Vᵀ and the spectra of batches of matrices, each batch of one smaller side.

  Args:
    batches: All of one dtype.
    normalize: See `apply_transfer`.
    solver: "auto" or a key of `SOLVERS`.
    tolerance: See `apply_transfer`.
    choose_rank: Whether "low_rank" may take fewer directions than the bases have.
    fits: Of the last step, for methods that fit T; gets those of this one.

  Returns:
    For each batch the updates, piece by piece, and a `Spectrum`. A matrix with a NaN or
    an infinity in it gives an update, and a spectrum, of NaN, and a zero basis.
  """
  results: list[tuple[list[jax.Array], Spectrum] | None] = [None] * len(batches)

  def method_of(batch: Batch, side: int) -> str:
    return choose_solver(
      solver, batch.alpha, batch.damping, side, normalize=normalize, tolerance=tolerance
    )

  of_gram: dict[bool, list[int]] = {}
  for i, batch in enumerate(batches):
    name = method_of(batch, batch.small)
    if SOLVERS[name].of_gram:
      of_gram.setdefault(known(batch.alpha) and known(batch.damping), []).append(i)
    else:
      results[i] = _solve_pieces(batch, SOLVERS[name], normalize, tolerance, choose_rank)
  for places in of_gram.values():
    counts: dict[int, int] = {}
    for i in places:
      counts[batches[i].small] = counts.get(batches[i].small, 0) + len(batches[i].alpha)
    to = _joined(counts)
    groups: dict[tuple[str, int], list[int]] = {}
    for i in places:
      side = to[batches[i].small]
      name = method_of(batches[i], side)
      if not SOLVERS[name].of_gram:  # What is cheapest at that side is none of these.
        name, side = method_of(batches[i], batches[i].small), batches[i].small
      groups.setdefault((name, side), []).append(i)
    for (name, _), here in sorted(groups.items(), key=lambda group: (group[0][1], group[0][0])):
      some = [batches[i] for i in here]
      solved = _solve_grams(some, SOLVERS[name], normalize, tolerance, fits)
      for i, result in zip(here, solved, strict=True):
        results[i] = result
  return [result for result in results if result is not None]


def apply_transfer(
  matrix: ArrayLike,
  *,
  alpha: ArrayLike,
  damping: ArrayLike = 0.1,
  normalize: str | None = 'rms',
  solver: str = 'auto',
  tolerance: float | None = None,
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
      exact), ``"rational"`` (α ≤ 2, to `tolerance`), ``"polynomial"`` (any α, to
      `tolerance`), ``"low_rank"`` (leading directions alone) or ``"auto"`` (default),
      the cheapest that can meet `tolerance`: see `choose_solver`.
    tolerance: Relative error of T that is allowed at any σ, of methods that approximate
      it; 0.1 by default. Known while tracing.
    rank: How many directions ``"low_rank"`` takes; by default 16, or 64 where 16 do not
      meet `tolerance`.

  Returns:
    Same shape and dtype as `matrix`. Zero for a zero matrix; NaN throughout for a
    matrix that holds a NaN or an infinity.

  Raises:
    ValueError: fewer than two axes, an unknown solver or normalisation, α or d
      negative or not finite, α that does not broadcast, ``"cholesky"`` with an α
      that is traced or not 2, ``"rational"`` with an α above 2, a `tolerance`
      outside (0, 1), a `rank` below 1, or one of these two traced.
    TypeError: complex or integer `matrix`.
  """
  matrix = jnp.asarray(matrix)
  if matrix.ndim < 2:
    raise ValueError(f'matrix must have shape (..., m, n), got {matrix.shape}.')
  if not jnp.issubdtype(matrix.dtype, jnp.floating):
    raise TypeError(f'matrix must be real and floating, got dtype {matrix.dtype}.')
  tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
  check_solver(solver, normalize, tolerance, rank)
  check_hyperparams(solver, alpha, damping)
  axes = matrix.shape[:-2]
  if matrix.size == 0:
    return matrix
  dtype = jnp.promote_types(matrix.dtype, jnp.float32)

  def flat(value, name):
    value = np.asarray(value, np.float64) if known(value) else jnp.asarray(value, dtype)
    if value.ndim and np.broadcast_shapes(value.shape, axes) != axes:
      raise ValueError(
        f'{name} of shape {value.shape} does not broadcast against the leading'
        f' axes {axes} of a matrix of shape {matrix.shape}.'
      )
    return (np if known(value) else jnp).broadcast_to(value, axes).reshape(-1)

  numbers = {'alpha': flat(alpha, 'alpha'), 'damping': flat(damping, 'damping')}
  return _transfer(
    matrix,
    {name: x for name, x in numbers.items() if not known(x)},
    known_numbers=tuple((name, *x.tolist()) for name, x in numbers.items() if known(x)),
    normalize=normalize,
    solver=solver,
    tolerance=float(tolerance),
    rank=None if rank is None else int(rank),
  )


# Outside of `jit`, operation by operation, this would be some seventy programs to compile.
@functools.partial(
  jax.jit,
  static_argnames=('known_numbers', 'normalize', 'solver', 'tolerance', 'rank'),
  inline=True,
)
def _transfer(
  matrix: jax.Array,
  traced: Mapping[str, jax.Array],
  *,
  known_numbers: tuple[tuple[Any, ...], ...],
  normalize: str | None,
  solver: str,
  tolerance: float,
  rank: int | None,
) -> jax.Array:
  """`apply_transfer` of what is checked; α and d are among `traced` or (name, number, ...)."""
  numbers = {name: np.asarray(values) for name, *values in known_numbers} | dict(traced)
  small = min(matrix.shape[-2:])
  flat = matrix.reshape(-1, *matrix.shape[-2:])
  flat = flat.astype(jnp.promote_types(matrix.dtype, jnp.float32))
  vacant = jnp.zeros((len(flat), small, vectors(solver, rank, small)), flat.dtype)

  def solve(basis: jax.Array) -> tuple[jax.Array, Spectrum]:
    (((update,), spectrum),) = solve_batches(
      [Batch((flat,), numbers['alpha'], numbers['damping'], basis)],
      normalize=normalize,
      solver=solver,
      tolerance=tolerance,
      choose_rank=rank is None,
    )
    return update, spectrum

  update, spectrum = solve(vacant)
  if solver == 'low_rank':  # Once more, from a basis that is warm.
    update, _ = solve(jax.lax.stop_gradient(spectrum.basis))
  return update.reshape(matrix.shape).astype(matrix.dtype)
