import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import spectral_optax
from spectral_optax.solvers import _logistic, _symmetric, polynomial
from spectral_optax.solvers._fitting import approximate, terms, turning_point
from spectral_optax.solvers._problem import Problem
from tests import reference

MATRICES = reference.matrices()
# α, d, tolerance: the defaults, σ* = 0.06, and above α = 2.
MAPS = [
  (2.0, 0.1, 0.1),
  (1.5, 0.015, 0.1),
  (1.5, 0.015, 1e-2),
  (1.2, 0.06**1.2, 1e-3),
  (0.85, 0.06**0.85, 0.1),
  (0.5, 0.3, 0.03),
  (2.8, 0.1, 0.1),
  (4.0, 0.3, 0.1),
]


@functools.cache
def static(alpha, damping, tolerance):
  return jax.jit(
    functools.partial(
      spectral_optax.apply_transfer,
      alpha=alpha,
      damping=damping,
      tolerance=tolerance,
      solver='polynomial',
    )
  )


@functools.cache
def traced(tolerance):
  return jax.jit(
    lambda g, alpha, damping: spectral_optax.apply_transfer(
      g, alpha=alpha, damping=damping, tolerance=tolerance, solver='polynomial'
    )
  )


@pytest.mark.parametrize(('alpha', 'damping', 'tolerance'), MAPS)
def test_against_float64(alpha, damping, tolerance):
  """Every matrix, those of few directions and of condition 1e6 among them."""
  for name in ('tall', 'wide', 'one by one', 'rank deficient', 'condition 1e6', 'repeated'):
    g = MATRICES[name]
    exact = reference.update(g, alpha, damping)
    # A step rounds as much again as GᵀG has been, and a step later it counts for less.
    rounding = 1e-4 + 10 * reference.cost_of_rounding(g, alpha, damping, True)
    error = reference.relative_error(static(alpha, damping, tolerance)(g), exact)
    assert error <= tolerance + rounding, (name, error)


@pytest.mark.parametrize('tolerance', [0.1, 1e-2])
def test_traced(tolerance):
  """α from 0.5 to 2.8 with the usual turning point: within the tolerance all the same."""
  for name, alpha in (('tall', 0.5), ('wide', 0.85), ('repeated', 1.5), ('condition 1e6', 2.8)):
    damping = 0.06**alpha
    exact = reference.update(MATRICES[name], alpha, damping)
    rounding = 1e-3 + 10 * reference.cost_of_rounding(MATRICES[name], alpha, damping, True)
    update = traced(tolerance)(MATRICES[name], alpha, damping)
    assert reference.relative_error(update, exact) <= tolerance + rounding, name


def test_more_steps_than_there_are_digits():
  """What rounding makes negative would run away, if any were left negative."""
  for name in ('rank deficient', 'rank deficient, wide', 'condition 1e6'):
    exact = reference.update(MATRICES[name], 4.0, 0.3)
    update = traced(1e-3)(MATRICES[name], 4.0, 0.3)
    assert reference.relative_error(update, exact) <= 0.1, name


@pytest.mark.parametrize(('alpha', 'damping', 'tolerance'), MAPS)
@pytest.mark.parametrize('n', [20, 768])
def test_stated_errors_hold_on_points_the_fit_has_not_seen(alpha, damping, tolerance, n):
  log_turn, reach, delta = turning_point(*np.array([[alpha], [damping], [float(n)]]), np)
  fit = _logistic.fit(np.array([alpha]), reach, delta, tolerance)
  assert fit.error[0] <= tolerance
  share = np.concatenate([np.logspace(-14, 0, 7919), np.linspace(1e-4, 1, 7919)])[None]
  steps = fit.weights.shape[1] - 2
  iterates = np.stack(_logistic.iterates(share, fit.rate, steps), axis=-1)[0]
  assert iterates[:, 1:].min() >= 0
  assert iterates.max() <= 1
  value = np.exp(-alpha / 2 * log_turn[0]) * (iterates @ fit.weights[0]) ** 2
  exact = 1 / ((share[0] * n) ** (alpha / 2) + damping)
  assert np.abs(value / exact - 1).max() <= fit.error[0] * 1.02 + 1e-4


def test_the_cost():
  """Products of n x n matrices; Muon's five steps are fifteen, of square ones."""
  at_most = {(64, 0.1): 12, (768, 0.1): 14, (2048, 0.1): 15, (64, 1e-2): 18, (64, 1e-3): 26}
  for (n, tolerance), most in at_most.items():
    for alpha in (0.85, 1.2, 1.5, 2.0):
      error, products = terms(polynomial.FAMILY, alpha, 0.06**alpha, float(n), tolerance)
      assert error <= tolerance
      assert products <= most


def test_a_fit_looks_around_its_r():
  # The default on matrices of 1024, a product less; and what no number of steps did at the usual r.
  error, products = terms(polynomial.FAMILY, 1.5, 0.008, 1024.0, 0.1)
  assert products == 14
  assert error <= 0.1
  error, products = terms(polynomial.FAMILY, 2.8, 0.04**2.8, 1024.0, 1e-3)
  assert products <= 22
  assert error <= 1e-3


def problem(g, alpha, damping, tolerance=0.1):
  """Of one matrix, of unit RMS, m ≥ n."""
  n = g.shape[1]
  gram = jnp.asarray(g.T @ g, jnp.float32)[None]
  numbers = (np.array([x], np.float64) for x in (alpha, damping, n))
  alpha, damping, largest = numbers
  return Problem(None, gram, alpha, damping, largest, tolerance, jnp.zeros((1, n, 1)))


def f_of_gram(g, alpha, damping, product, layout=polynomial.IN_CACHE):
  p = problem(g, alpha, damping)
  expansion, log_turn = approximate(polynomial.FAMILY, p)
  r, weights = (jnp.asarray(x, jnp.float32) for x in (expansion.rate, expansion.weights))
  assert p.gram is not None
  y = p.gram / (2 * g.shape[1])
  found = polynomial._sum_of_iterates(y, r, weights, product, layout)
  return np.asarray(found[0], np.float64) * np.exp(-alpha / 2 * log_turn[0])


def spectrum(name):
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.standard_normal((k, 96)))[0] for k in (128, 96))
  noise = rng.standard_normal((128, 96)) / np.sqrt(128)
  g = {
    'noise': noise,
    'power law': u / np.arange(1, 97) @ v.T,
    'four leaders': 8 * u[:, :4] @ v[:, :4].T + noise,
  }[name]
  return g / reference.size(g, 'rms')


@pytest.mark.parametrize('name', ['noise', 'power law', 'four leaders'])
@pytest.mark.parametrize(('alpha', 'damping'), [(2.0, 0.1), (1.5, 0.015), (0.85, 0.0915)])
def test_bfloat16_products(name, alpha, damping):
  """T along each direction keeps to the tolerance, and the update is hardly further off.

  What eight bits round off leaks from one direction into others: into a leader's row, up to
  a fraction of the largest T (all of it where the spectrum is steep). Sixteen bits do not.
  """
  g = spectrum(name)
  u, sigma, vt = np.linalg.svd(g, full_matrices=False)
  t = reference.transfer(sigma, alpha, damping)
  leaks = []
  for product in (polynomial.bfloat16_product, polynomial.sixteen_bit_product):
    inside = u.T @ g @ f_of_gram(g, alpha, damping, product) @ vt.T
    np.testing.assert_allclose(np.diag(inside), t, rtol=0.12)
    off = inside - np.diag(t)
    assert np.linalg.norm(off) <= (0.1 + 0.02) * np.linalg.norm(t)
    leaks.append(np.linalg.norm(off - np.diag(np.diag(off)), axis=1).max() / t.max())
  assert leaks[0] <= 1
  assert leaks[1] <= 0.02


@pytest.mark.parametrize(
  ('n', 'levels', 'from_', 'products'),
  [(5, 3, 6, 1.0), (130, 1, 100, None), (512, 1, 512, 0.75), (512, 2, 256, 0.625), (7, 2, 0, None)],
)
def test_products_of_what_is_symmetric(n, levels, from_, products):
  """They are the square, X Xᵀ and XᵀX, and take the multiplications that the module says."""
  rng = np.random.default_rng(0)
  a = rng.standard_normal((2, n, n)).astype(np.float32)
  a += a.swapaxes(1, 2)
  cut = _symmetric.sizes(n, levels, from_)
  blocks = _symmetric.split(jnp.asarray(a), cut)
  np.testing.assert_array_equal(_symmetric.join(blocks), a)
  count = 0

  def product(x, y):
    nonlocal count
    count += x.shape[-2] * x.shape[-1] * y.shape[-1]
    return jnp.matmul(x, y, precision='highest')

  squared = _symmetric.join(_symmetric.square(blocks, cut, product))
  # n terms of rounding each, the largest of |a|² of them.
  bound = lambda x: x.shape[-1] * reference.EPS * np.abs(x).max() ** 2
  exact = np.float64(a) @ np.float64(a)
  assert np.abs(squared - exact).max() <= bound(a)
  if products is not None:
    assert count == products * n**3
  x = rng.standard_normal((2, n, 9)).astype(np.float32)
  exact = np.float64(x) @ np.float64(x).swapaxes(1, 2)
  for together, matrix in ((_symmetric.outer, x), (_symmetric.inner, x.swapaxes(1, 2))):
    found = _symmetric.join(together(jnp.asarray(matrix), cut, product))
    assert np.abs(found - exact).max() <= bound(x)


def test_every_layout_computes_the_same():
  rng = np.random.default_rng(0)
  g = rng.standard_normal((6, 150, 130)).astype(np.float32) / np.sqrt(150)
  gram = jnp.asarray(np.einsum('bij,bik->bjk', g, g))
  fit = _logistic.fit(np.full(6, 1.5), np.full(6, 9.0), np.ones(6), 0.1)
  r, weights = (jnp.asarray(x, jnp.float32) for x in (fit.rate, fit.weights))
  # Matrices that differ have weights that differ.
  weights *= jnp.arange(1.0, 7.0)[:, None]
  run = lambda *layout: polynomial._sum_of_iterates(
    gram / 8, r, weights, polynomial.float32_product, polynomial.Layout(*layout)
  )
  whole = run(10**9, 0, 0, False)
  layouts = (10**9, 0, 0, True), (2 * 130**2, 0, 0, False), (1, 1, 100, False), (1, 2, 9, True)
  for layout in layouts:
    assert reference.relative_error(run(*layout), whole) <= 1e-5
  assert polynomial._at_once(16, 768, 2**21) == 2
  assert polynomial._at_once(7, 768, 2**21) == 1
  assert polynomial._at_once(3, 10**6, 2**21) == 1


def test_a_batch_of_maps():
  rng = np.random.default_rng(0)
  alphas = np.array([0.0, 0.5, 1.5, 2.0, 2.8, 2.0])
  dampings = np.array([0.1, 0.3, 0.015, 0.1, 0.1, 9])
  g = rng.standard_normal((6, 30, 20)).astype(np.float32)
  updates = spectral_optax.apply_transfer(
    g, alpha=alphas, damping=dampings, solver='polynomial', tolerance=0.1
  )
  for update, matrix, alpha, damping in zip(updates, g, alphas, dampings, strict=True):
    exact = reference.update(matrix, alpha, damping)
    assert reference.relative_error(update, exact) <= 0.1 + 1e-3


@pytest.mark.parametrize(('alpha', 'normalize'), [(1.0, 'rms'), (2.0, 'rms'), (0.5, 'frobenius')])
def test_a_wide_range_of_damping(alpha, normalize):
  for damping in (1e-2, 0.1, 1.0, 1e9):
    update = spectral_optax.apply_transfer(
      MATRICES['square'], alpha=alpha, damping=damping, normalize=normalize, solver='polynomial'
    )
    exact = reference.update(MATRICES['square'], alpha, damping, normalize)
    assert reference.relative_error(update, exact) <= 0.1 + 1e-3


def test_no_turn_that_can_be_seen():
  """What error there is is stated, and nothing is NaN."""
  assert terms(polynomial.FAMILY, 1.5, 0.0, 32.0, 0.1)[0] == np.inf
  update = spectral_optax.apply_transfer(
    MATRICES['square'], alpha=1.5, damping=0.0, solver='polynomial'
  )
  assert np.isfinite(update).all()


@pytest.mark.parametrize('normalize', ['rms', 'spectral', 'frobenius', None])
def test_normalizations_and_zero(normalize):
  apply = lambda g: spectral_optax.apply_transfer(
    g, alpha=1.5, damping=0.1, normalize=normalize, solver='polynomial'
  )
  exact = reference.update(MATRICES['wide'], 1.5, 0.1, normalize)
  assert reference.relative_error(apply(MATRICES['wide']), exact) <= 0.1
  np.testing.assert_array_equal(apply(jnp.zeros((2, 5, 3))), jnp.zeros((2, 5, 3)))


@pytest.mark.parametrize('scale', [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize('normalize', ['rms', 'spectral'])
def test_scale_free(normalize, scale):
  g = MATRICES['tall']
  exact = reference.update(g, 1.5, 0.1, normalize)
  update = spectral_optax.apply_transfer(
    np.float32(scale) * g, alpha=1.5, damping=0.1, normalize=normalize, solver='polynomial'
  )
  assert reference.relative_error(update, exact) <= 0.1


@pytest.mark.parametrize('scale', [1e-25, 1e-6, 1e6, 1e15])
def test_without_normalization_at_any_scale(scale):
  g = np.float32(scale) * MATRICES['tall']
  update = spectral_optax.apply_transfer(
    g, alpha=1.5, damping=0.1, normalize=None, solver='polynomial'
  )
  assert reference.relative_error(update, reference.update(g, 1.5, 0.1, None)) <= 0.1


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_bad_numbers_fill_their_own_matrix_and_no_other(bad):
  good = MATRICES['tall']
  broken = good.copy()
  broken[3, 4] = bad
  update = spectral_optax.apply_transfer(
    np.stack([broken, good]), alpha=1.5, damping=0.1, solver='polynomial'
  )
  assert np.isnan(update[0]).all()
  assert reference.relative_error(update[1], reference.update(good, 1.5, 0.1)) <= 0.1


@pytest.mark.usefixtures('x64')
def test_float64_is_computed_in_float64():
  """The fit is what is off, and nothing else: as for a matrix of twice the digits."""
  g = MATRICES['tall'].astype(np.float64)
  apply = lambda g: spectral_optax.apply_transfer(g, alpha=1.5, damping=0.1, solver='polynomial')
  assert apply(g).dtype == jnp.float64
  u, _, vt = np.linalg.svd(g, full_matrices=False)
  inside = u.T @ np.asarray(apply(g)) @ vt.T
  assert np.abs(inside - np.diag(np.diag(inside))).max() <= 1e-12 * np.abs(inside).max()


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('m', [6, 40])
def test_derivative(m):
  g = np.random.default_rng(0).standard_normal((1, m, 4))
  f = lambda g: spectral_optax.apply_transfer(g, alpha=1.5, damping=0.1, solver='polynomial')
  check_grads(jax.jit(f), (g,), order=1, modes=['fwd', 'rev'], atol=1e-5, rtol=1e-5)
