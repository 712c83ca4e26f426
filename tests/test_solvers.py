import functools
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
from spectral_optax.solvers import _fitting, _inverse, _mixture, _products, _spectrum
from tests import reference

MATRICES = reference.matrices()
ALPHAS = (0, 0.5, 0.85, 1, 1.3, 2, 2.8, 4)
DAMPINGS = (1e-3, 0.1, 1.0)
# The floor of what a method may be off, on top of what rounding costs there.
FLOOR = {'svd': 1e-5, 'gram': 1e-4, 'cholesky': 1e-4, 'rational': 1e-4}


APPLY = {
  solver: jax.jit(
    lambda g, alpha, damping, solver=solver: spectral_optax.apply_transfer(
      g, alpha=alpha, damping=damping, solver=solver
    )
  )
  for solver in ('svd', 'gram')
}
APPLY['rational'] = jax.jit(  # Up to α = 2; with α and d traced.
  lambda g, alpha, damping: spectral_optax.apply_transfer(
    g, alpha=jnp.minimum(alpha, 2), damping=damping, solver='rational', tolerance=0.03
  )
)
APPLY['cholesky'] = jax.jit(
  lambda g, alpha, damping: spectral_optax.apply_transfer(
    g, alpha=2.0, damping=damping, solver='cholesky'
  )
)


@functools.partial(jax.jit, static_argnames=('normalize', 'solver', 'choose_rank', 'known'))
def solve(g, basis, traced=(), *, known=(), normalize='rms', solver, choose_rank=False):
  """Of matrices (batch, m, n): updates, and spectra. α and d are `traced`, or else `known`."""
  full = functools.partial((np if known else jnp).full, len(g))
  batch = solvers.Batch((g,), *map(full, known or traced), basis)
  ((updates, spectrum),) = solvers.solve_batches(
    [batch], normalize=normalize, solver=solver, choose_rank=choose_rank
  )
  return updates[0], spectrum


def alphas_of(solver):
  return (2,) if solver == 'cholesky' else ALPHAS


@pytest.mark.parametrize('name', MATRICES)
@pytest.mark.parametrize('solver', ['svd', 'gram', 'cholesky'])
def test_against_float64(solver, name):
  g = MATRICES[name]
  for alpha, damping in itertools.product(alphas_of(solver), DAMPINGS):
    exact = reference.update(g, alpha, damping)
    update = APPLY[solver](g, alpha, damping)
    bound = FLOOR[solver] + reference.cost_of_rounding(g, alpha, damping, solver != 'svd')
    error = reference.relative_error(update, exact)
    assert error <= bound, f'α = {alpha}, d = {damping}: {error:.1e} > {bound:.1e}'


@functools.cache
def rational(alpha, damping, tolerance):
  return jax.jit(
    lambda g: spectral_optax.apply_transfer(
      g, alpha=alpha, damping=damping, solver='rational', tolerance=tolerance
    )
  )


@pytest.mark.parametrize('name', MATRICES)
@pytest.mark.parametrize(
  ('alpha', 'damping', 'tolerance'),
  [(0.5, 0.5, 0.03), (0.85, 0.1, 1e-2), (1.3, 1e-2, 1e-3), (1.5, 0.015, 0.1), (2, 1e-3, 1e-3)],
)
def test_rational_meets_its_tolerance(name, alpha, damping, tolerance):
  """At every σ, so in the Frobenius norm; α = 2 is one pole, exactly."""
  g = MATRICES[name]
  error = reference.relative_error(
    rational(alpha, damping, tolerance)(g), reference.update(g, alpha, damping)
  )
  fit = 1e-4 if alpha == 2 else tolerance
  assert error <= fit + 2 * reference.cost_of_rounding(g, alpha, damping, True)


@pytest.mark.parametrize('tolerance', [0.1, 0.03, 1e-2])
def test_rational_with_traced_alpha_and_damping(tolerance):
  g = jnp.asarray(MATRICES['tall'])
  alphas, dampings = (
    np.array([0.5, 0.85, 1.2, 1.5, 1.9, 2]),
    np.array([0.3, 0.1, 0.05, 0.02, 0.1, 1]),
  )
  updates = jax.jit(
    jax.vmap(
      lambda a, d: spectral_optax.apply_transfer(
        g, alpha=a, damping=d, solver='rational', tolerance=tolerance
      )
    )
  )(jnp.asarray(alphas), jnp.asarray(dampings))
  for update, alpha, damping in zip(updates, alphas, dampings, strict=True):
    exact = reference.update(g, alpha, damping)
    assert reference.relative_error(update, exact) <= tolerance


@pytest.fixture
def traced_anew():
  """What is changed here is not in a program of before, nor in one of after."""
  solvers._transfer.clear_cache()
  yield
  solvers._transfer.clear_cache()


@pytest.fixture
def off_a_cpu(monkeypatch, traced_anew):
  """Takes the branches that an accelerator would take."""
  take = lambda *a, default, tpu=None, cpu=None: (default if tpu is None else tpu)(*a)
  monkeypatch.setattr(jax.lax, 'platform_dependent', take)


def one_leads(m, n):
  """Noise and one direction with nearly all of the energy."""
  rng = np.random.default_rng(0)
  u, v = rng.standard_normal((m, 1)), rng.standard_normal((1, n))
  return (100 * u @ v + rng.standard_normal((m, n))).astype(np.float32)


@pytest.mark.usefixtures('off_a_cpu')
@pytest.mark.parametrize('name', [*MATRICES, 'one leads'])
def test_rational_in_bfloat16_meets_its_tolerance(name):
  g = MATRICES[name] if name in MATRICES else one_leads(150, 130)
  for alpha, damping, tolerance in ((1.5, 0.015, 0.1), (0.85, 0.06**0.85, 0.1), (2.0, 0.1, 0.03)):
    assert solvers.half_precision_will_do(alpha, damping, 'rms', tolerance)
    update = spectral_optax.apply_transfer(
      g, alpha=alpha, damping=damping, solver='rational', tolerance=tolerance
    )
    exact = reference.update(g, alpha, damping)
    # What it costs that G is rounded, exactly; much where it has but a few directions.
    rounded = np.asarray(jnp.asarray(g, jnp.bfloat16), np.float64)
    cost = reference.relative_error(reference.update(rounded, alpha, damping), exact)
    cost += 2 * reference.cost_of_rounding(g, alpha, damping, True)
    assert reference.relative_error(update, exact) <= tolerance + cost


@pytest.mark.usefixtures('off_a_cpu')
def test_bfloat16_is_for_coarse_tolerances_and_turning_points_above_it():
  g, exact = MATRICES['square'], reference.update(MATRICES['square'], 2, 0.1)
  error = lambda **k: reference.relative_error(
    spectral_optax.apply_transfer(g, alpha=2, solver='rational', **k), exact
  )
  assert 1e-4 < error(tolerance=0.1) < 2e-2  # One pole, exactly: what is off is rounding.
  assert error(tolerance=0.01) < 1e-5
  assert error(tolerance=0.1, damping=jnp.array(0.1)) < 1e-4
  small = reference.update(g, 2, 1e-5)
  update = spectral_optax.apply_transfer(g, alpha=2, damping=1e-5, solver='rational')
  assert reference.relative_error(update, small) < 1e-3


@pytest.mark.parametrize('alpha', [0.25, 0.85, 1.5, 1.97])
@pytest.mark.parametrize('tolerance', [0.1, 1e-2, 1e-3])
def test_fits_are_positive_and_as_good_as_they_say(alpha, tolerance):
  """On points the fit has not seen, over the whole interval."""
  reach = np.array([8.0])
  fit = _mixture.fit(np.array([alpha]), reach, np.ones(1), tolerance)
  x = np.concatenate([[0], np.exp(np.linspace(-40, 8, 5000))])
  value = fit.constant[0] + np.sum(fit.weights[0] / (1 + x[:, None] / fit.poles[0]), axis=1)
  error = np.abs(value * (x ** (alpha / 2) + 1) - 1).max()
  assert min(fit.constant[0], fit.weights.min(), fit.poles.min()) > 0
  assert error <= 1.05 * fit.error[0]
  assert fit.error[0] <= tolerance or fit.poles.shape[1] == _mixture.MAX_POLES


@pytest.mark.parametrize('n', [1, 5, 32, 64, 65, 130, 257, 300])
@pytest.mark.parametrize('pivot_of', [_inverse.lapack, _inverse.eliminate])
def test_weighted_inverses(n, pivot_of):
  """Against float64; a relative error of the condition number times ε, times ten."""
  rng = np.random.default_rng(0)
  g = rng.standard_normal((2, n + 3, n)) / np.sqrt(n + 3)
  a = np.einsum('bij,bik->bjk', g, g)[:, None] + np.array([0.01, 1.0])[:, None, None] * np.eye(n)
  weights = np.array([[1.0, -2.0], [0.5, 3.0]])
  least = np.broadcast_to([0.005, 0.5], (2, 2))
  got = jax.jit(_inverse.weighted_inverses, static_argnums=3)(
    *(jnp.asarray(x, jnp.float32) for x in (a, weights, least)), pivot_of
  )
  exact = np.sum(weights[:, :, None, None] * np.linalg.inv(a), axis=1)
  assert reference.relative_error(got, exact) <= 10 * np.linalg.cond(a).max() * reference.EPS


def test_low_rank_bound_holds_and_what_it_leaves_out_shows():
  """Decaying spectra, warm bases: the error is below the bound; at full rank, exact."""
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (80, 60))
  for decay, alpha, damping in itertools.product((0.5, 1.0, 2.0), (0.85, 1.5, 2.0), (0.02, 0.5)):
    g = ((u[:, :60] * np.arange(1, 61) ** -decay) @ v.T).astype(np.float32)
    exact = reference.update(g, alpha, damping)
    bounds = []
    for rank, floor in ((4, 1e-4), (16, 1e-4), (60, 1e-4)):
      basis, error = jnp.zeros((1, 60, rank)), None
      for _ in range(4):
        update, spectrum = solve(g[None], basis, (alpha, damping), solver='low_rank')
        basis = spectrum.basis
      error = reference.relative_error(update[0], exact)
      bound = float(spectrum.transfer_error[0])
      assert error <= bound * (1 + 1e-3) + floor, (decay, alpha, damping, rank, bound)
      bounds.append(bound)
    assert bounds[0] > bounds[1]


def test_low_rank_takes_as_many_directions_as_its_tolerance_asks_for():
  """Forty directions stand out: 16 will not do, and 64 are taken; of eight, 16 are enough."""
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.standard_normal((k, 90)))[0] for k in (120, 90))
  for strong, taken in ((8, 16), (40, 64)):
    sigma = np.where(np.arange(90) < strong, 1.0, 1e-3)
    g = ((u * sigma) @ v.T).astype(np.float32)
    basis = np.zeros((1, 90, 64), np.float32)
    for _ in range(4):
      # Columns that a step does not use stay as they are: here, zero.
      basis = np.where(np.arange(64) < 16, basis, 0)
      update, spectrum = solve(
        g[None], basis, known=(1.5, 0.1), solver='low_rank', choose_rank=True
      )
      basis = spectrum.basis
    assert np.count_nonzero(np.any(np.asarray(basis[0]) != 0, axis=0)) == taken
    assert spectrum.transfer_error[0] <= solvers.DEFAULT_TOLERANCE
    exact = reference.update(g, 1.5, 0.1)
    assert reference.relative_error(update[0], exact) <= spectrum.transfer_error[0] + 1e-4
    ratio = np.sum(sigma**2) ** 2 / np.sum(sigma**4)
    np.testing.assert_allclose(spectrum.participation_ratio, [ratio], rtol=1e-3)


def test_low_rank_keeps_its_basis_whatever_the_normalization():
  """A decaying spectrum, eight directions: as good after some steps, and no step is cold."""
  g = (MATRICES['tall'] * np.float32(2.0) ** -np.arange(20, dtype=np.float32))[None]
  for normalize in ('rms', 'spectral', None):
    basis = np.asarray(spectrum_after([g] * 4, 'low_rank', normalize, rank=8).basis[0], np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(8), atol=1e-4)


def test_turning_points_that_are_seen_are_seen_in_float32():
  """δ = 1 up to rounding: or else a traced fit would begin at the turning point."""
  rng = np.random.default_rng(0)
  alpha, reach = rng.uniform(0.25, 2, 1000), rng.uniform(1, 15.9, 1000)
  damping = np.exp((np.log(64) - reach) * alpha / 2)
  _, _, delta = _fitting.turning_point(jnp.float32(alpha), jnp.float32(damping), 64.0)
  assert _fitting.turn_is_seen(delta).all()
  _, _, delta = _fitting.turning_point(np.array([0.5, 2]), np.array([1e-9, 1e-9]), 64.0, np)
  assert not _fitting.turn_is_seen(delta).any()


@pytest.mark.parametrize('name', MATRICES)
def test_sigma_max_from_a_cold_start(name):
  """Never above, and so near that T does not leave the interval that it is made for."""
  g = MATRICES[name] if MATRICES[name].shape[0] >= MATRICES[name].shape[1] else MATRICES[name].T
  exact = np.linalg.norm(np.float64(g), 2)
  basis = jnp.zeros((1, g.shape[1], 1))
  found = _spectrum.converge(_spectrum.multiply_twice(jnp.asarray(g)[None]), basis)
  assert exact * (1 - 1e-3) <= float(found.sigma[0, 0]) <= exact * (1 + 1e-5)


def test_sides_are_joined_where_that_is_cheap():
  assert solvers._joined({64: 100, 128: 1}) == {64: 64, 128: 128}
  assert solvers._joined({10: 1, 27: 1, 64: 5, 512: 3}) == {10: 64, 27: 64, 64: 64, 512: 512}
  # What is so small that a batch of its own costs more; many of them are not.
  assert solvers._joined({8: 1, 16: 2, 32: 1}) == {8: 32, 16: 32, 32: 32}
  assert solvers._joined({8: 1, 16: 100, 32: 1}) == {8: 16, 16: 16, 32: 32}


def test_a_batch_is_solved_as_its_side_is():
  """At the side that it is padded to another method may be the cheapest."""
  assert solvers.choose_solver('auto', 1.2, 0.1, 64, backend='cpu') == 'polynomial'
  assert solvers.choose_solver('auto', 1.2, 0.1, 128, backend='cpu') == 'rational'
  rng = np.random.default_rng(0)
  shapes = (40, 128, 128), (1, 70, 64)
  batches = [
    solvers.Batch(
      (jnp.asarray(rng.standard_normal(shape), jnp.float32),),
      np.full(shape[0], 1.2),
      np.full(shape[0], 0.1),
      jnp.zeros((shape[0], shape[2], 1)),
    )
    for shape in shapes
  ]
  of = lambda *matrices: solvers.solve_batches(
    [b._replace(matrices=m) for b, m in zip(batches, matrices, strict=True)],
    normalize='rms',
    solver='auto',
  )
  matrices = [batch.matrices for batch in batches]
  assert 'f32[41,128,128]' in str(jax.make_jaxpr(of)(*matrices))  # All together.
  for batch, ((update,), _) in zip(batches, jax.jit(of)(*matrices), strict=True):
    for got, g in zip(update, batch.matrices[0], strict=True):
      bound = solvers.DEFAULT_TOLERANCE + FLOOR['rational']
      assert reference.relative_error(got, reference.update(g, 1.2, 0.1)) <= bound


@pytest.mark.parametrize('normalize', ['rms', 'spectral', 'frobenius', None])
@pytest.mark.parametrize('solver', FLOOR)
def test_normalizations(solver, normalize):
  g = MATRICES['wide']
  exact = reference.update(g, 2, 0.1, normalize)
  update = spectral_optax.apply_transfer(g, alpha=2, normalize=normalize, solver=solver)
  # σ_max is an estimate within 1e-3, and T' σ / T is at most 1 in size.
  estimate = 1e-3 if normalize == 'spectral' else 0
  assert reference.relative_error(update, exact) <= FLOOR[solver] + estimate


@pytest.mark.parametrize('scale', [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize('normalize', ['rms', 'spectral', 'frobenius'])
@pytest.mark.parametrize('solver', FLOOR)
def test_scale_free(solver, normalize, scale):
  g = MATRICES['tall']
  apply = lambda g: spectral_optax.apply_transfer(
    g, alpha=2, damping=0.1, normalize=normalize, solver=solver
  )
  exact = reference.update(g, 2, 0.1, normalize)
  estimate = 1e-3 if normalize == 'spectral' else 0
  assert reference.relative_error(apply(np.float32(scale) * g), exact) <= FLOOR[solver] + estimate


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_some_power_of_two_brings_every_norm_into_range(dtype):
  exponents, bound = _products._ranges(dtype)
  info = np.finfo(dtype)
  # The norm of one entry, the smallest normal number, and of 10^8 that are the largest.
  lowest, highest = np.log10(info.tiny), np.log10(info.max) + 4
  powers = np.log10(2) * np.concatenate([exponents, [0]])
  logs = 2 * (np.linspace(lowest, highest, 1001)[:, None] + powers)
  assert (np.abs(logs) < np.log10(bound)).any(axis=1).all()
  assert np.float64(bound) ** 2 < float(info.max) * 1e-3


@pytest.mark.parametrize('exponent', [-110, -60, 60, 100])
@pytest.mark.parametrize(('solver', 'alpha'), [('rational', 1.5), ('polynomial', 1.5)])
def test_a_power_of_two_changes_no_digit(solver, alpha, exponent):
  g = MATRICES['tall']
  apply = jax.jit(functools.partial(spectral_optax.apply_transfer, alpha=alpha, solver=solver))
  np.testing.assert_array_equal(apply(np.ldexp(g, exponent)), apply(g))
  some = np.stack([g, 2 * g, np.zeros_like(g)])
  moved = np.stack([np.ldexp(g, exponent), 2 * g, np.zeros_like(g)])
  np.testing.assert_array_equal(apply(moved), apply(some))


def test_what_hardly_ever_runs_takes_little_memory(monkeypatch):
  """Out of range, a few matrices are scaled at a time: all would be as large as G and N."""
  monkeypatch.setattr(_products, 'AT_ONCE', 2**15)
  params = {str(i): jax.ShapeDtypeStruct((64, 500 + 4 * i), jnp.float32) for i in range(8)}
  tx = spectral_optax.scale_by_spectral_newton(1.5, 'noise')
  state = jax.eval_shape(tx.init, params)
  memory = jax.jit(tx.update).lower(params, state).compile().memory_analysis()
  size = 4 * sum(x.size for x in params.values())
  assert memory.temp_size_in_bytes < 2.5 * size


@pytest.mark.parametrize('solver', ['rational', 'polynomial'])
def test_derivative_at_any_scale(solver):
  """The update is scale-free: its derivative goes with one over the scale."""
  g, direction = MATRICES['tall'], np.ones_like(MATRICES['tall'])
  apply = functools.partial(spectral_optax.apply_transfer, alpha=1.5, solver=solver)
  forward = jax.jit(lambda g, d: jax.jvp(apply, (g,), (d,))[1])
  backward = jax.jit(lambda g, d: jax.vjp(apply, g)[1](d)[0])
  for scale in (2.0**-45, 2.0**45):  # Beyond, squares in the derivatives leave float32.
    near = forward(g, direction)
    size = np.abs(near).max()
    scaled = np.float32(scale) * g, np.float32(scale) * direction
    np.testing.assert_allclose(forward(*scaled), near, atol=1e-4 * size)
    near = backward(g, direction)
    size = np.abs(near).max()
    np.testing.assert_allclose(scale * backward(scaled[0], direction), near, atol=1e-4 * size)


@pytest.mark.usefixtures('traced_anew')
@pytest.mark.parametrize('solver', ['rational', 'polynomial'])
def test_vmap_makes_no_more_products(solver, monkeypatch):
  """There a branch always runs: that for matrices out of range is a loop, of no rounds."""
  rounds, of = [], _products.GramMatrices.of

  def counted(self, pieces, scale=None):
    if scale is not None:
      jax.debug.callback(lambda: rounds.append(1))
    return of(self, pieces, scale)

  monkeypatch.setattr(_products.GramMatrices, 'of', counted)

  def products(jaxpr):  # Outside of loops.
    count = 0
    for equation in jaxpr.eqns:
      count += equation.primitive.name == 'dot_general'
      if equation.primitive.name != 'while':
        inner = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, 'eqns'))
        count += sum(products(x) for x in inner if hasattr(x, 'eqns'))
    return count

  apply = functools.partial(spectral_optax.apply_transfer, alpha=1.5, solver=solver)
  one = products(jax.make_jaxpr(apply)(jnp.ones((6, 4))).jaxpr)
  several = products(jax.make_jaxpr(jax.vmap(apply))(jnp.ones((3, 6, 4))).jaxpr)
  assert one == several > 0

  several = jax.jit(jax.vmap(apply))
  g = np.stack([MATRICES['tall'], MATRICES['tall']])
  usual = jax.block_until_ready(several(g))
  jax.effects_barrier()
  assert not rounds
  updates = several(g * np.float32([1, 2.0**-80])[:, None, None])
  np.testing.assert_array_equal(updates, usual)
  jax.effects_barrier()
  assert rounds


@pytest.mark.parametrize('scale', [1e-25, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize('solver', FLOOR)
def test_without_normalization_at_any_scale(solver, scale):
  g = np.float32(scale) * MATRICES['tall']
  exact = reference.update(g, 2, 0.1, None)
  update = spectral_optax.apply_transfer(g, alpha=2, normalize=None, solver=solver)
  # Scaled to fit, d is no longer known while tracing: "rational" is within its tolerance.
  bound = 0.1 if solver == 'rational' else FLOOR[solver]
  assert reference.relative_error(update, exact) <= bound


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


@pytest.mark.parametrize('tolerance', [0.1, 1e-2, 1e-3, 1e-5])
def test_auto_meets_its_tolerance_for_every_alpha(tolerance):
  for alpha in ALPHAS:
    update = spectral_optax.apply_transfer(MATRICES['wide'], alpha=alpha, tolerance=tolerance)
    exact = reference.update(MATRICES['wide'], alpha, 0.1)
    assert reference.relative_error(update, exact) <= tolerance + 1e-5


def test_auto_takes_what_can_meet_the_tolerance():
  choose = lambda alpha, damping=0.1, n=512, **k: solvers.choose_solver(
    'auto', alpha, damping, n, backend='cpu', **k
  )
  assert choose(2.0) == choose(np.array([0.5, 1.5])) == choose(jnp.asarray(1.5)) == 'rational'
  assert choose(2.0, tolerance=1e-6) == 'rational'  # One pole, exactly.
  assert choose(1.5, tolerance=1e-6) == 'gram'
  assert choose(jnp.asarray(1.5), tolerance=1e-6) == 'gram'
  assert choose(2.1, 1.0) == choose(np.array([1.5, 2.5]), 1.0) == 'polynomial'
  assert choose(2.1, tolerance=1e-6) == 'gram'
  assert choose(1.0, 1e-9) == choose(1.0, 0.0) == 'gram'  # No turn that float32 can see.
  assert solvers.choose_solver('svd', 2.0, 0.1, 64) == 'svd'


def test_auto_takes_the_cheapest():
  """Of poles, steps and eigenvectors, by side and backend."""
  choose = lambda n, tolerance, backend, alpha=0.85: solvers.choose_solver(
    'auto', alpha, 0.06**alpha, n, tolerance=tolerance, backend=backend
  )
  assert choose(64, 0.1, 'cpu') == choose(64, 1e-3, 'cpu') == 'polynomial'
  assert choose(64, 0.1, 'cpu', 2.0) == choose(2048, 1e-2, 'cpu') == 'rational'
  assert choose(128, 1e-3, 'cpu') == 'gram'
  for backend in ('gpu', 'tpu'):
    assert choose(2048, 0.1, backend, 2.0) == choose(2048, 0.1, backend) == 'polynomial'
    assert choose(2048, 1e-6, backend, 2.0) == 'rational'  # One pole, exactly.
  assert choose(64, 0.1, 'tpu', 2.0) == choose(64, 0.1, 'gpu') == 'polynomial'
  assert choose(64, 0.1, 'gpu', 2.0) == choose(512, 0.1, 'gpu', 2.0) == 'rational'
  traced = lambda n: solvers.choose_solver('auto', jnp.ones(2), 0.1, n, backend='cpu')
  assert (traced(64), traced(512)) == ('polynomial', 'rational')


@pytest.mark.parametrize('array', [np.array, jnp.array], ids=['known', 'traced'])
@pytest.mark.parametrize('solver', ['svd', 'gram'])
def test_one_alpha_and_damping_for_each_matrix(solver, array):
  g = np.stack([MATRICES['square']] * 3)
  alpha, damping = array([0.5, 1.0, 2.8]), array([0.1, 0.3, 0.01])
  updates = spectral_optax.apply_transfer(g, alpha=alpha, damping=damping, solver=solver)
  for update, a, d in zip(updates, (0.5, 1.0, 2.8), (0.1, 0.3, 0.01), strict=True):
    exact = reference.update(g[0], a, d)
    bound = 1e-4 + reference.cost_of_rounding(g[0], a, d, True)
    assert reference.relative_error(update, exact) <= bound


@pytest.mark.parametrize(('solver', 'bound'), [('gram', 1e-4), ('auto', 0.1)])
def test_traced_hyperparameters_under_jit_vmap_and_scan(solver, bound):
  g = jnp.asarray(MATRICES['wide'])
  alphas = jnp.array([0.5, 1.3, 2.0])
  one = lambda alpha: spectral_optax.apply_transfer(g, alpha=alpha, damping=0.2, solver=solver)
  mapped = jax.jit(jax.vmap(one))(alphas)
  scanned = jax.lax.scan(lambda c, a: (c, one(a)), 0, alphas)[1]
  for i, alpha in enumerate((0.5, 1.3, 2.0)):
    exact = reference.update(g, alpha, 0.2)
    assert reference.relative_error(mapped[i], exact) <= bound
    assert reference.relative_error(scanned[i], mapped[i]) <= 1e-4


def test_outside_of_jit_it_is_one_program_for_what_is_known_and_any_numbers():
  apply = functools.partial(spectral_optax.apply_transfer, solver='svd')
  size = solvers._transfer._cache_size
  g, before = MATRICES['one by one'], size()
  for damping in (0.1, jnp.float32(0.1), jnp.float32(0.2)):
    for _ in range(2):
      apply(g, alpha=1.23, damping=damping)
      apply(2 * g, alpha=1.23, damping=damping)
  assert size() - before == 2  # With d known, and with d traced.


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


def spectrum_after(steps, solver='gram', normalize='rms', rank=1):
  """Of matrices (batch, m, n) step after step, each from the basis of the last."""
  spectrum = None
  basis = np.zeros((len(steps[0]), steps[0].shape[-1], rank), np.float32)
  for g in steps:
    _, spectrum = solve(g, basis, known=(2.0, 0.1), normalize=normalize, solver=solver)
    basis = spectrum.basis
  return spectrum


@pytest.mark.parametrize('solver', ['svd', 'gram', 'cholesky', 'rational', 'low_rank'])
def test_spectrum_of_a_batch(solver):
  g = np.stack([MATRICES['tall'], 1e-8 * MATRICES['tall'][::-1]])
  spectrum = spectrum_after([g] * 20, solver, rank=20 if solver == 'low_rank' else 1)
  sigma = np.linalg.svd(g.astype(np.float64), compute_uv=False)
  exact = np.sum(sigma**2, axis=1) ** 2 / np.sum(sigma**4, axis=1)
  np.testing.assert_allclose(spectrum.participation_ratio, exact, rtol=1e-5)
  np.testing.assert_allclose(spectrum.sigma_max, sigma[:, 0], rtol=1e-3)
  assert (np.asarray(spectrum.sigma_max) <= sigma[:, 0] * (1 + 1e-5)).all()


@pytest.mark.parametrize('solver', ['gram', 'rational', 'low_rank'])
def test_sigma_max_follows_a_new_leader(solver):
  """The old leader shrinks and another direction takes over, orthogonal to it."""
  g = [jnp.diag(jnp.array([x, 0.5, 0.05]))[None] for x in [1.0] * 10 + [0.1] * 20]
  np.testing.assert_allclose(spectrum_after(g[:10], solver).sigma_max, [1.0], rtol=1e-4)
  np.testing.assert_allclose(spectrum_after(g, solver).sigma_max, [0.5], rtol=1e-4)


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
    ({'alpha': 2, 'solver': 'qr'}, ValueError, "'cholesky', 'gram'.*'svd'.*'qr'"),
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
