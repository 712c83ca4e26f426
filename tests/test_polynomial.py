import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from spectral_optax.solvers import _composite, polynomial
from spectral_optax.solvers._problem import Problem
from tests import reference

MATRICES = reference.matrices()
# α, d, tolerance: the defaults, σ* = 0.06, and above α = 2.
MAPS = [
  (2.0, 0.1, 0.1),
  (1.5, 0.015, 0.1),
  (1.5, 0.015, 1e-2),
  (0.85, 0.06**0.85, 0.1),
  (1.2, 0.06**1.2, 0.03),
  (2.8, 0.1, 0.1),
  (4.0, 0.3, 0.1),
]


def problem(g, alpha, damping, tolerance, with_gram=True, normalize: str | None = 'rms'):
  """Of one matrix or a batch (batch, m, n), m ≥ n."""
  g = np.asarray(g, np.float64)
  g = g[None] if g.ndim == 2 else g
  g = g.swapaxes(1, 2) if g.shape[1] < g.shape[2] else g
  n = g.shape[2]
  x = jnp.asarray(np.stack([z / reference.size(z, normalize) for z in g]), jnp.float32)
  return Problem(
    matrix=x,
    gram=jnp.matmul(x.swapaxes(1, 2), x, precision='highest') if with_gram else None,
    alpha=np.broadcast_to(np.float64(alpha), len(g)),
    damping=np.broadcast_to(np.float64(damping), len(g)),
    largest=np.full(len(g), float(n) if normalize == 'rms' else 1.0),
    tolerance=tolerance,
    basis=jnp.zeros((len(g), n, 1)),
  )


def exact(problem):
  return np.stack(
    [
      reference.update(g, a, d, None)
      for g, a, d in zip(problem.matrix, problem.alpha, problem.damping, strict=True)
    ]
  )


@functools.cache
def jitted(alpha, damping, tolerance, product=None):
  def run(matrix, gram):
    n = matrix.shape[-1]
    a, d, largest = (np.full(len(matrix), x) for x in (alpha, damping, float(n)))
    p = Problem(matrix, gram, a, d, largest, tolerance, jnp.zeros((len(matrix), n, 1)))
    return polynomial.solve(p) if product is None else polynomial.solve_with(p, product)

  return jax.jit(run)


@pytest.mark.parametrize(('alpha', 'damping', 'tolerance'), MAPS)
def test_against_float64(alpha, damping, tolerance):
  """Within what it states, which meets the tolerance, on every matrix."""
  for name in ('tall', 'one by one', 'rank deficient', 'condition 1e6'):
    p = problem(MATRICES[name], alpha, damping, tolerance)
    solution = jitted(alpha, damping, tolerance)(p.matrix, p.gram)
    stated = float(solution.error[0])
    assert stated <= tolerance
    # float32 may cost more where iterates cancel, as they do at the top for a large α.
    rounding = 1e-3 + 4 * reference.cost_of_rounding(MATRICES[name], alpha, damping, True)
    error = reference.relative_error(solution.update, exact(p))
    assert error <= stated * (1 + 1e-3) + rounding, (name, error, stated)


@pytest.mark.parametrize(('alpha', 'damping', 'tolerance'), MAPS)
@pytest.mark.parametrize(('n', 'degree'), [(20, 5), (768, 3)])
def test_stated_errors_hold_on_points_the_fit_has_not_seen(alpha, damping, tolerance, n, degree):
  turn, reach, delta = _composite.turning_point(*np.array([[alpha], [damping], [float(n)]]))
  fit = _composite.fit(alpha * np.ones(1), reach, delta, degree, tolerance)
  assert fit.error[0] <= tolerance or degree == 5 or alpha == 4
  bound = np.exp(turn[0] + reach[0])
  assert np.sqrt(n) <= bound <= np.sqrt(n) * np.exp(_composite.REACH_GRID)
  sigma = bound * np.concatenate([np.logspace(-12, 0, 7919), np.linspace(1e-4, 1, 7919)])
  iterates = _composite.iterate(sigma / bound, fit.steps[0])
  assert np.abs(iterates).max() <= 1.01
  value = np.exp((1 - alpha) * turn[0]) * (iterates @ fit.weights[0])
  error = np.abs(value / reference.transfer(sigma, alpha, damping) - 1).max()
  assert error <= fit.error[0] * 1.01 + 1e-3


@pytest.mark.parametrize(('alpha', 'damping'), [(2.0, 0.1), (1.5, 0.015), (0.85, 0.0915)])
@pytest.mark.parametrize('name', ['noise', 'power law', 'four leaders', 'rank one', 'alike'])
def test_bfloat16_products(name, alpha, damping):
  """Little worse than float32 products: each moves σ by about 2⁻⁹ of its RMS.

  In the directions of the turning point that is 2⁻⁹/σ* of them, 0.03 at σ* = 0.06, if
  all of it came in one direction; iterates are added unrounded, so that it does not.
  """
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.standard_normal((k, 64)))[0] for k in (96, 64))
  noise = rng.standard_normal((96, 64)) / 10
  g = {
    'noise': noise,
    'power law': u / np.arange(1, 65) @ v.T,
    'four leaders': u[:, :4] @ v[:, :4].T + 0.01 * noise,
    'rank one': np.outer(u[:, 0], v[:, 0]),
    'alike': np.ones((96, 64)) + 0.1 * noise,
  }[name]
  p = problem(g, alpha, damping, 0.1)
  solution = jitted(alpha, damping, 0.1, polynomial.bfloat16_product)(p.matrix, p.gram)
  error = reference.relative_error(solution.update, exact(p))
  assert error <= float(solution.error[0]) + 2**-9 / damping ** (1 / alpha) + 2**-7


def test_bfloat16_is_for_coarse_tolerances_and_mild_cancellation():
  enough = lambda *a: polynomial._bfloat16_is_enough(problem(np.ones((64, 64)), *a))
  assert enough(1.5, 0.015, 0.1)
  assert enough(2.0, 0.1, 0.03)
  assert not enough(2.0, 0.1, 1e-2)
  assert not enough(4.0, 0.1, 0.1)


@pytest.mark.parametrize('with_gram', [True, False])
@pytest.mark.parametrize('m', [20, 30, 200])
def test_on_the_matrix_and_on_its_gram_matrix(m, with_gram):
  """Tall ones are iterated on n x n matrices, and with steps of degree 5."""
  p = problem(np.random.default_rng(0).standard_normal((m, 20)), 1.5, 0.015, 1e-2, with_gram)
  solution = polynomial.solve(p)
  assert reference.relative_error(solution.update, exact(p)) <= 1e-2 + 1e-3


def test_a_batch_of_maps():
  rng = np.random.default_rng(0)
  alpha, damping = (
    np.array([0.0, 0.5, 1.5, 2.0, 2.8, 2.0]),
    np.array([0.1, 0.3, 0.015, 0.1, 0.1, 9]),
  )
  p = problem(rng.standard_normal((6, 30, 20)), alpha, damping, 0.1)
  solution = polynomial.solve(p)
  for update, wanted, error in zip(
    solution.update, exact(p), jnp.asarray(solution.error), strict=True
  ):
    assert error <= 0.1
    assert reference.relative_error(update, wanted) <= float(error) + 1e-3


@pytest.mark.parametrize(('alpha', 'normalize'), [(1.0, 'rms'), (2.0, 'rms'), (0.5, 'frobenius')])
def test_a_wide_range_of_damping(alpha, normalize):
  dampings = np.array([1e-2, 0.1, 1.0, 1e9])
  g = np.stack([MATRICES['square']] * len(dampings))
  p = problem(g, alpha, dampings, 0.1, normalize=normalize)
  solution = polynomial.solve(p)
  for update, wanted, error in zip(
    solution.update, exact(p), jnp.asarray(solution.error), strict=True
  ):
    assert error <= 0.1
    assert reference.relative_error(update, wanted) <= float(error) + 1e-3


@pytest.mark.parametrize('damping', [0.0])
def test_no_turn_that_can_be_seen(damping):
  """What error there is is stated, and nothing is NaN."""
  assert polynomial.static_error(1.5, damping, 32.0, 0.1) == np.inf
  assert polynomial.static_error(1.5, 0.015, 32.0, 0.1) <= 0.1
  solution = polynomial.solve(problem(MATRICES['square'], 1.5, damping, 0.1))
  assert np.isfinite(solution.update).all()


@pytest.mark.parametrize('product', [polynomial.float32_product, polynomial.bfloat16_product])
def test_zero_gives_zero(product):
  zero = problem(np.zeros((5, 4)), 1.5, 0.015, 0.1)
  assert not np.any(jitted(1.5, 0.015, 0.1, product)(zero.matrix, zero.gram).update)


def test_the_cost():
  assert polynomial.products(8, 3, False) == (16, 0)
  assert polynomial.products(6, 5, False) == (12, 6)
  assert polynomial.products(6, 3, True) == (2, 15)
  for alpha, damping, at_most in ((2, 0.1, 7), (1.5, 0.015, 9), (0.85, 0.06**0.85, 9)):
    _, reach, delta = _composite.turning_point(*np.array([[alpha], [damping], [768.0]]))
    fit = _composite.fit(alpha * np.ones(1), reach, delta, 3, 0.1)
    assert fit.steps.shape[1] <= at_most


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('m', [6, 40])
def test_derivative(m):
  g = np.random.default_rng(0).standard_normal((1, m, 4))

  def f(g):
    p = problem(np.ones((1, m, 4)), 1.5, 0.1, 0.1)
    return polynomial.solve(p._replace(matrix=g, gram=None)).update

  check_grads(jax.jit(f), (g,), order=1, modes=['fwd', 'rev'], atol=1e-5, rtol=1e-5)
