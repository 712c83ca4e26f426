import itertools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import spectral_optax
from spectral_optax import solvers
from tests import reference

MATRICES = reference.matrices()
ALPHAS = (0, 0.5, 0.85, 1, 1.3, 2, 2.8, 4)
DAMPINGS = (1e-3, 0.1, 1.0)
# The floor of what a method may be off, on top of what rounding costs there.
FLOOR = {'svd': 1e-5, 'gram': 1e-4, 'cholesky': 1e-4}


APPLY = {
  solver: jax.jit(
    lambda g, alpha, damping, solver=solver: spectral_optax.apply_transfer(
      g, alpha=alpha, damping=damping, solver=solver
    )
  )
  for solver in ('svd', 'gram')
}
APPLY['cholesky'] = jax.jit(
  lambda g, alpha, damping: spectral_optax.apply_transfer(
    g, alpha=2.0, damping=damping, solver='cholesky'
  )
)


def alphas_of(solver):
  return (2,) if solver == 'cholesky' else ALPHAS


@pytest.mark.parametrize('name', MATRICES)
@pytest.mark.parametrize('solver', FLOOR)
def test_against_float64(solver, name):
  g = MATRICES[name]
  for alpha, damping in itertools.product(alphas_of(solver), DAMPINGS):
    exact = reference.update(g, alpha, damping)
    update = APPLY[solver](g, alpha, damping)
    bound = FLOOR[solver] + reference.cost_of_rounding(g, alpha, damping, solver != 'svd')
    error = reference.relative_error(update, exact)
    assert error <= bound, f'α = {alpha}, d = {damping}: {error:.1e} > {bound:.1e}'


@pytest.mark.parametrize('normalize', ['rms', 'spectral', 'frobenius', None])
@pytest.mark.parametrize('solver', FLOOR)
def test_normalizations(solver, normalize):
  g = MATRICES['wide']
  exact = reference.update(g, 2, 0.1, normalize)
  update = spectral_optax.apply_transfer(g, alpha=2, normalize=normalize, solver=solver)
  assert reference.relative_error(update, exact) <= FLOOR[solver]


@pytest.mark.parametrize('scale', [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize('normalize', ['rms', 'spectral', 'frobenius'])
@pytest.mark.parametrize('solver', FLOOR)
def test_scale_free(solver, normalize, scale):
  g = MATRICES['tall']
  apply = lambda g: spectral_optax.apply_transfer(
    g, alpha=2, damping=0.1, normalize=normalize, solver=solver
  )
  exact = reference.update(g, 2, 0.1, normalize)
  assert reference.relative_error(apply(np.float32(scale) * g), exact) <= FLOOR[solver]


@pytest.mark.parametrize('scale', [1e-25, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize('solver', FLOOR)
def test_without_normalization_at_any_scale(solver, scale):
  g = np.float32(scale) * MATRICES['tall']
  exact = reference.update(g, 2, 0.1, None)
  update = spectral_optax.apply_transfer(g, alpha=2, normalize=None, solver=solver)
  assert reference.relative_error(update, exact) <= FLOOR[solver]


@pytest.mark.parametrize('normalize', ['rms', 'spectral', 'frobenius', None])
@pytest.mark.parametrize('solver', FLOOR)
@pytest.mark.parametrize('damping', [0.0, 0.1])
def test_zero_gives_zero(solver, normalize, damping):
  zero = jnp.zeros((2, 5, 3))
  update = spectral_optax.apply_transfer(
    zero, alpha=2, damping=damping, normalize=normalize, solver=solver
  )
  np.testing.assert_array_equal(update, zero)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('solver', FLOOR)
def test_bad_numbers_fill_their_own_matrix_and_no_other(solver, bad):
  good = MATRICES['tall']
  broken = good.copy()
  broken[3, 4] = bad
  update = spectral_optax.apply_transfer(np.stack([broken, good]), alpha=2, solver=solver)
  assert np.isnan(update[0]).all()
  assert reference.relative_error(update[1], reference.update(good, 2, 0.1)) <= FLOOR[solver]


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('solver', FLOOR)
def test_half_precision_is_computed_in_float32(solver, dtype):
  g = jnp.asarray(MATRICES['tall'], dtype)
  update = spectral_optax.apply_transfer(g, alpha=2, solver=solver)
  assert update.dtype == dtype
  in_float32 = spectral_optax.apply_transfer(g.astype(jnp.float32), alpha=2, solver=solver)
  np.testing.assert_array_equal(update, in_float32.astype(dtype))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('solver', FLOOR)
def test_float64_is_computed_in_float64(solver):
  g = MATRICES['tall'].astype(np.float64)
  update = spectral_optax.apply_transfer(g, alpha=2, solver=solver)
  assert update.dtype == jnp.float64
  assert reference.relative_error(update, reference.update(g, 2, 0.1)) <= 1e-12


def test_auto_is_exact_for_every_alpha():
  for alpha in ALPHAS:
    update = spectral_optax.apply_transfer(MATRICES['wide'], alpha=alpha)
    exact = reference.update(MATRICES['wide'], alpha, 0.1)
    assert reference.relative_error(update, exact) <= 1e-4


def test_auto_needs_no_decomposition_at_two():
  assert solvers.choose_solver('auto', 2.0) == 'cholesky'
  assert solvers.choose_solver('auto', np.float32(2)) == 'cholesky'
  assert solvers.choose_solver('auto', 1.5) == 'gram'
  assert solvers.choose_solver('auto', jnp.asarray(2.0)) == 'gram'  # It may be traced.


@pytest.mark.parametrize('solver', ['svd', 'gram'])
def test_one_alpha_and_damping_for_each_matrix(solver):
  g = np.stack([MATRICES['square']] * 3)
  alpha, damping = jnp.array([0.5, 1.0, 2.8]), jnp.array([0.1, 0.3, 0.01])
  updates = spectral_optax.apply_transfer(g, alpha=alpha, damping=damping, solver=solver)
  for update, a, d in zip(updates, (0.5, 1.0, 2.8), (0.1, 0.3, 0.01), strict=True):
    exact = reference.update(g[0], a, d)
    bound = 1e-4 + reference.cost_of_rounding(g[0], a, d, True)
    assert reference.relative_error(update, exact) <= bound


def test_traced_hyperparameters_under_jit_vmap_and_scan():
  g = jnp.asarray(MATRICES['wide'])
  alphas = jnp.array([0.5, 1.3, 2.0])
  one = lambda alpha: spectral_optax.apply_transfer(g, alpha=alpha, damping=0.2)
  mapped = jax.jit(jax.vmap(one))(alphas)
  scanned = jax.lax.scan(lambda c, a: (c, one(a)), 0, alphas)[1]
  for i, alpha in enumerate((0.5, 1.3, 2.0)):
    exact = reference.update(g, alpha, 0.2)
    assert reference.relative_error(mapped[i], exact) <= 1e-4
    assert reference.relative_error(scanned[i], exact) <= 1e-4


def test_leading_axes_are_a_batch():
  g = np.random.default_rng(0).standard_normal((2, 3, 7, 5)).astype(np.float32)
  for solver in FLOOR:
    update = spectral_optax.apply_transfer(g, alpha=2, solver=solver)
    for i, j in np.ndindex(2, 3):
      assert reference.relative_error(update[i, j], reference.update(g[i, j], 2, 0.1)) <= 1e-4


def test_empty_matrices_come_back():
  assert spectral_optax.apply_transfer(jnp.zeros((0, 3, 2)), alpha=2).shape == (0, 3, 2)
  assert spectral_optax.apply_transfer(jnp.zeros((3, 0)), alpha=2).shape == (3, 0)


def test_muon_is_the_limit_at_one():
  """α = 1, d → 0 is the polar factor that Muon's exact counterpart computes."""
  g = MATRICES['tall']
  ours = spectral_optax.apply_transfer(g, alpha=1, damping=1e-6)
  # The classical cubic Newton-Schulz coefficients, iterated until they converge.
  muons = optax.contrib._muon.orthogonalize_via_newton_schulz(
    jnp.asarray(g), jnp.array([1.5, -0.5, 0.0]), ns_steps=40
  )
  # T = σ / (σ + d) misses one by d / σ_min, and σ_min is about 0.3 here.
  np.testing.assert_allclose(ours, muons, atol=2e-5)


@pytest.mark.parametrize('damping', [1e-3, 0.1])
def test_small_damping_does_not_break_the_factorisation(damping):
  """Rank one, 512 wide: σ² is 512 and rounding alone 6e-5 of the default step."""
  rng = np.random.default_rng(0)
  g = np.outer(rng.standard_normal(600), rng.standard_normal(512)).astype(np.float32)
  update = spectral_optax.apply_transfer(g, alpha=2, damping=damping, solver='cholesky')
  assert np.isfinite(update).all()
  tiny = spectral_optax.apply_transfer(g, alpha=2, damping=1e-9, solver='cholesky')
  assert np.isfinite(tiny).all()


# ---------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------

SETTINGS = hypothesis.settings(
  max_examples=20,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)


@st.composite
def problems(draw):
  # A few shapes only: every other one is a compilation.
  m, n = draw(st.sampled_from([(6, 4), (4, 6), (5, 5)]))
  seed = draw(st.integers(0, 2**31))
  alpha = draw(st.sampled_from([0.0, 0.5, 0.85, 1.0, 1.3, 2.0, 2.8, 4.0]))
  damping = draw(st.floats(0.05, 2.0))
  rng = np.random.default_rng(seed)
  spread = draw(st.floats(0.0, 3.0))
  sigma = np.exp(-spread * rng.random(min(m, n)))
  u = np.linalg.qr(rng.standard_normal((m, m)))[0][:, : min(m, n)]
  v = np.linalg.qr(rng.standard_normal((n, n)))[0][:, : min(m, n)]
  return (u * sigma @ v.T).astype(np.float32), alpha, damping, rng


def close(a, b, tolerance=2e-4):
  scale = max(float(np.linalg.norm(b)), 1e-30)
  assert float(np.linalg.norm(np.asarray(a) - np.asarray(b))) <= tolerance * scale


@pytest.mark.parametrize('solver', FLOOR)
@SETTINGS
@hypothesis.given(problem=problems())
def test_orthogonal_equivariance(solver, problem):
  """T(Q G R) = Q T(G) R."""
  g, alpha, damping, rng = problem
  q, r = (np.linalg.qr(rng.standard_normal((k, k)))[0].astype(np.float32) for k in g.shape)
  apply = APPLY[solver]
  close(apply(q @ g @ r, alpha, damping), q @ np.asarray(apply(g, alpha, damping)) @ r)


@pytest.mark.parametrize('solver', FLOOR)
@SETTINGS
@hypothesis.given(problem=problems())
def test_transpose_symmetry(solver, problem):
  """T(Gᵀ) = T(G)ᵀ."""
  g, alpha, damping, _ = problem
  close(APPLY[solver](g.T, alpha, damping), np.asarray(APPLY[solver](g, alpha, damping)).T)


@pytest.mark.parametrize('solver', FLOOR)
@SETTINGS
@hypothesis.given(problem=problems(), exponent=st.floats(-30, 30))
def test_scale_freeness(solver, problem, exponent):
  """T(c G) = T(G)."""
  g, alpha, damping, _ = problem
  scaled = (g.astype(np.float64) * 10**exponent).astype(np.float32)
  close(APPLY[solver](scaled, alpha, damping), APPLY[solver](g, alpha, damping))


@pytest.mark.parametrize('solver', FLOOR)
@SETTINGS
@hypothesis.given(problem=problems())
def test_sign_symmetry_and_descent(solver, problem):
  """T(-G) = -T(G), and the update never points against the gradient."""
  g, alpha, damping, _ = problem
  update = np.asarray(APPLY[solver](g, alpha, damping))
  close(APPLY[solver](-g, alpha, damping), -update)
  assert np.sum(update * g) > 0


@pytest.mark.parametrize('solver', FLOOR)
@SETTINGS
@hypothesis.given(problem=problems())
def test_damping_shrinks_every_singular_value(solver, problem):
  """T falls with d, towards G / d where d is large."""
  g, alpha, damping, _ = problem
  singular = lambda d: np.linalg.svd(APPLY[solver](g, alpha, d), compute_uv=False)
  assert (np.sort(singular(2 * damping)) <= np.sort(singular(damping)) * (1 + 1e-4)).all()
  large = np.float32(1e9)
  close(np.asarray(APPLY[solver](g, alpha, large)) * large, g / reference.size(g, 'rms'))


# ---------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('normalize', ['rms', None])
@pytest.mark.parametrize('solver', FLOOR)
def test_derivative_also_where_singular_values_repeat(solver, normalize):
  g = np.zeros((3, 5, 4))
  g[0, range(4), range(4)] = [1.0, 1.0, 2.0, 0.5]
  g[1:] = np.random.default_rng(0).standard_normal((2, 5, 4))

  def f(g, alpha, damping):
    alpha = 2.0 if solver == 'cholesky' else alpha
    return spectral_optax.apply_transfer(
      g, alpha=alpha, damping=damping, solver=solver, normalize=normalize
    )

  check_grads(jax.jit(f), (g, 1.3, 0.1), order=1, modes=['fwd', 'rev'], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('solver', FLOOR)
def test_gradient_under_jit_and_vmap(solver):
  g = jnp.asarray(np.stack([MATRICES['square'][:6, :4]] * 3))
  loss = lambda g, d: jnp.sum(
    spectral_optax.apply_transfer(g, alpha=2, damping=d, solver=solver)[0]
  )
  over_dampings = jax.jit(jax.vmap(jax.grad(loss, argnums=1), in_axes=(None, 0)))
  gradients = over_dampings(g, jnp.array([0.1, 0.4]))
  for gradient, d in zip(gradients, (0.1, 0.4), strict=True):
    h = 1e-4
    low, high = (np.sum(reference.update(g[0], 2, d + s)) for s in (-h, h))
    np.testing.assert_allclose(gradient, (high - low) / (2 * h), rtol=1e-3)


# ---------------------------------------------------------------------------------
# Spectrum
# ---------------------------------------------------------------------------------


def test_spectrum_of_a_batch():
  g = np.stack([MATRICES['tall'], 1e-8 * MATRICES['tall'][::-1]])
  start, spectrum = None, None
  for _ in range(20):
    _, spectrum = solvers.solve_batch(
      jnp.asarray(g), 2.0, 0.1, normalize='rms', solver='cholesky', start=start
    )
    start = spectrum.sigma_max_vector
  sigma = np.linalg.svd(g.astype(np.float64), compute_uv=False)
  exact = np.sum(sigma**2, axis=1) ** 2 / np.sum(sigma**4, axis=1)
  np.testing.assert_allclose(spectrum.participation_ratio, exact, rtol=1e-5)
  np.testing.assert_allclose(spectrum.sigma_max, sigma[:, 0], rtol=1e-3)
  assert (np.asarray(spectrum.sigma_max) <= sigma[:, 0] * (1 + 1e-5)).all()


def test_sigma_max_follows_a_new_leader():
  """The old leader shrinks and another direction takes over, orthogonal to it."""
  start = None
  for step in range(30):
    g = jnp.diag(jnp.array([1.0 if step < 10 else 0.1, 0.5, 0.05]))[None]
    _, spectrum = solvers.solve_batch(g, 2.0, 0.1, normalize='rms', solver='cholesky', start=start)
    start = spectrum.sigma_max_vector
    if step == 9:
      np.testing.assert_allclose(spectrum.sigma_max, [1.0], rtol=1e-4)
  np.testing.assert_allclose(spectrum.sigma_max, [0.5], rtol=1e-4)


# ---------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------

G = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'alpha': -1}, ValueError, 'alpha is a curvature exponent.*-1'),
    ({'alpha': np.nan}, ValueError, 'alpha .* finite'),
    ({'alpha': 2, 'damping': -0.1}, ValueError, 'damping is a damping.*-0.1'),
    ({'alpha': jnp.array(-1.0)}, ValueError, 'alpha'),
    ({'alpha': 2, 'solver': 'qr'}, ValueError, "'cholesky', 'gram', 'svd'.*'qr'"),
    ({'alpha': 2, 'normalize': 'max'}, ValueError, "normalize.*'max'"),
    ({'alpha': 1.5, 'solver': 'cholesky'}, ValueError, 'alpha = 2 alone.*1.5'),
    ({'alpha': jnp.array(2.0), 'solver': 'cholesky'}, ValueError, 'Use solver="gram"'),
    ({'alpha': np.ones(3)}, ValueError, r'alpha of shape \(3,\) does not broadcast'),
  ],
)
def test_errors(arguments, error, message):
  with pytest.raises(error, match=message):
    spectral_optax.apply_transfer(G, **arguments)


@pytest.mark.parametrize(
  ('matrix', 'error', 'message'),
  [
    (np.ones(3, np.float32), ValueError, r'\(\.\.\., m, n\), got \(3,\)'),
    (np.ones((3, 2), np.int32), TypeError, 'int32'),
    (np.ones((3, 2), np.complex64), TypeError, 'complex64'),
  ],
)
def test_errors_of_the_matrix(matrix, error, message):
  with pytest.raises(error, match=message):
    spectral_optax.apply_transfer(matrix, alpha=2)


def test_a_traced_alpha_is_refused_by_cholesky():
  with pytest.raises(ValueError, match='known while tracing'):
    jax.jit(lambda a: spectral_optax.apply_transfer(G, alpha=a, solver='cholesky'))(2.0)
