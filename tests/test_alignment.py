"""The Spectral Alignment Decomposition against its definition, and where it is exact."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spectral_optax.curvature import fits
from spectral_optax.curvature.alignment import (
  KroneckerAlignment,
  align_report,
  kronecker_alignment,
)
from spectral_optax.curvature.flax import capture
from spectral_optax.curvature.report import CurvatureReport, LayerCurvature

RNG = np.random.default_rng(0)


def random_case(rows=40, n=7, m=5, seed=0):
  rng = np.random.default_rng(seed)
  activations = rng.normal(size=(rows, n)) * np.arange(1, n + 1) ** -0.7
  errors = rng.normal(size=(rows, m)) * np.arange(1, m + 1) ** -0.4
  return activations.T @ errors / rows, activations, errors


# ---------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(('n', 'm'), [(7, 5), (4, 9), (6, 6)])
def test_values_are_those_of_the_definition(n, m):
  gradient, activations, errors = random_case(n=n, m=m)
  got = kronecker_alignment(gradient, activations, errors, 4)

  # In the paper's convention: W is outputs x inputs, G = U diag(σ) Vᵀ.
  u, sigma, vt = np.linalg.svd(gradient.T)
  c_delta = sum(np.outer(d, d) for d in errors) / len(errors)
  c_a = sum(np.outer(a, a) for a in activations) / len(activations)
  lambda_delta = np.sort(np.linalg.eigvalsh(c_delta))[::-1]
  lambda_a = np.sort(np.linalg.eigvalsh(c_a))[::-1]
  full = np.kron(c_delta, c_a)
  for k in range(4):
    rho_delta = u[:, k] @ c_delta @ u[:, k] / lambda_delta[k]
    rho_a = vt[k] @ c_a @ vt[k] / lambda_a[k]
    direction = np.outer(u[:, k], vt[k]).reshape(-1)  # vec(u_k v_kᵀ), as C_δ ⊗ C_A sees it.
    np.testing.assert_allclose(got.sigma[k], sigma[k], rtol=1e-12)
    np.testing.assert_allclose(got.rho_delta[k], rho_delta, rtol=1e-10)
    np.testing.assert_allclose(got.rho_activation[k], rho_a, rtol=1e-10)
    np.testing.assert_allclose(got.phi[k], rho_delta * rho_a, rtol=1e-10)
    product = lambda_delta[k] * lambda_a[k]
    np.testing.assert_allclose(got.eigenvalue_product[k], product, rtol=1e-10)
    np.testing.assert_allclose(got.h_kronecker[k], direction @ full @ direction, rtol=1e-10)
    p, q = (errors @ u[:, k]) ** 2, (activations @ vt[k]) ** 2
    ratio = np.mean(p * q) / (np.mean(p) * np.mean(q))
    np.testing.assert_allclose(got.concentration_ratio[k], ratio, rtol=1e-10)
  np.testing.assert_allclose(got.eigenvalues_delta, lambda_delta[:4], rtol=1e-10)
  np.testing.assert_allclose(got.eigenvalues_activation, lambda_a[:4], rtol=1e-10)
  # The identity, to rounding.
  np.testing.assert_allclose(got.h_kronecker, got.phi * got.eigenvalue_product, rtol=1e-14)
  assert got.used.all()
  assert got.num_points == 4
  assert not got.reason


def test_planted_exponents_come_out():
  # C_A = diag(k^-3), C_δ = diag(k^-2) and a gradient with σ_k = k^-2.5 in their eigenbases:
  # β = 5 / 2.5, and nothing is out of line.
  k = np.arange(1, 7)
  unit = lambda power: np.diag(np.sqrt(6 * k**-power))  # One row for each direction.
  aligned = kronecker_alignment(np.diag(k**-2.5), unit(3.0), unit(2.0), 6)
  assert aligned.beta == pytest.approx(2, abs=1e-12)
  np.testing.assert_allclose(aligned.phi, 1, rtol=1e-12)
  assert aligned.phi_slope == pytest.approx(0, abs=1e-12)
  assert aligned.alpha_kronecker == pytest.approx(2, abs=1e-12)
  assert aligned.r_squared['alpha_kronecker'] == pytest.approx(1)
  # Inputs whose moment along the gradient's directions is flat (a plane rotated by 45°
  # would do for two; here every direction has the mean): ρ^A undoes λ(C_A).
  spread = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
  rotated = kronecker_alignment(spread @ np.diag(k**-2.5), unit(3.0), unit(2.0), 6)
  assert rotated.beta == pytest.approx(2, abs=1e-12)
  moment = np.einsum('jk,j,jk->k', spread, k**-3.0, spread)
  np.testing.assert_allclose(rotated.rho_activation, moment / k**-3.0, rtol=1e-9)
  np.testing.assert_allclose(rotated.rho_delta, 1, rtol=1e-12)
  assert rotated.rho_delta_slope == pytest.approx(0, abs=1e-12)
  expected = np.polyfit(np.log(k**-2.5), np.log(rotated.rho_activation), 1)[0]
  assert rotated.rho_activation_slope == pytest.approx(expected, rel=1e-9)
  assert rotated.phi_slope == pytest.approx(expected, rel=1e-9)


def test_slopes_add_up_on_the_points_where_everything_is_positive():
  gradient, activations, errors = random_case(rows=60, n=12, m=10)
  # Two directions are not there.
  u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
  sigma[8:] = 0
  gradient = (u * sigma) @ vt
  h = np.exp(RNG.normal(size=10))
  h[2], h[5] = -h[2], 0.0
  got = kronecker_alignment(gradient, activations, errors, 10, curvature=h)
  points = [0, 1, 3, 4, 6, 7]
  assert np.flatnonzero(got.used).tolist() == points
  assert (got.num_points, got.num_zero, got.num_nonpositive) == (6, 2, 2)
  assert (got.sigma[8:] < 1e-14).all()
  x = np.log(got.sigma[points])
  slope = lambda y: np.polyfit(x, np.log(y[points]), 1)[0]
  assert got.alpha == pytest.approx(slope(h), rel=1e-9)
  assert got.beta == pytest.approx(slope(got.eigenvalue_product), rel=1e-9)
  assert got.phi_slope == pytest.approx(slope(got.phi), rel=1e-9)
  assert got.chi_slope == pytest.approx(slope(h / got.h_kronecker), rel=1e-9)
  assert got.alpha == pytest.approx(got.beta + got.phi_slope + got.chi_slope, abs=1e-12)
  assert got.phi_slope == pytest.approx(got.rho_delta_slope + got.rho_activation_slope, abs=1e-12)
  assert got.alpha_kronecker == pytest.approx(got.beta + got.phi_slope, abs=1e-12)
  np.testing.assert_allclose(got.curvature_ratio, h / got.h_kronecker, rtol=1e-14)
  # As `fit_alpha` fits it, once the points are the same.
  assert got.alpha == pytest.approx(fits.fit_alpha(got.sigma[:8], h[:8]).exponent, abs=1e-12)


def test_r_squared_of_the_curvature():
  gradient, activations, errors = random_case(rows=60, n=12, m=10)
  h = np.exp(RNG.normal(size=10))
  h[3] *= -1
  h_gn = h * np.exp(0.3 * RNG.normal(size=10))
  h_gn[6] *= -1
  got = kronecker_alignment(
    gradient, activations, errors, 10, curvature=h, curvature_gauss_newton=h_gn
  )
  square = lambda x, y: np.corrcoef(x, y)[0, 1] ** 2
  positive, both = h > 0, (h > 0) & (h_gn > 0)
  expected = {
    'sigma_squared': square(2 * np.log(got.sigma[positive]), np.log(h[positive])),
    'kronecker': square(np.log(got.h_kronecker[positive]), np.log(h[positive])),
    'gauss_newton': square(np.log(h_gn[both]), np.log(h[both])),
  }
  for name, value in expected.items():
    assert got.r_squared[name] == pytest.approx(value, rel=1e-9), name
  linear = {
    'sigma_squared': square(got.sigma**2, h),
    'kronecker': square(got.h_kronecker, h),
    'gauss_newton': square(h_gn, h),
  }
  assert got.r_squared_linear == pytest.approx(linear, rel=1e-9)
  without = kronecker_alignment(gradient, activations, errors, 10)
  assert set(without.r_squared) == {'alpha_kronecker'}
  assert np.isnan([without.alpha, without.chi_slope]).all()
  assert without.curvature is None
  assert without.curvature_ratio is None


# ---------------------------------------------------------------------------------
# Where it is exact
# ---------------------------------------------------------------------------------


class Projection(nnx.Module):
  def __init__(self, n, m):
    self.layer = nnx.Linear(n, m, use_bias=False, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.layer(x)


def squares(model, x, y):
  return 0.5 * jnp.sum((model(x) - y) ** 2, axis=tuple(range(1, x.ndim)))


def exact_curvature(model, batch, directions):
  graph, params = nnx.split(model)
  loss = lambda p: squares(nnx.merge(graph, p), *batch).mean()
  values = []
  for u in directions:
    tangent = jax.tree.map(lambda _, u=u: u, params)
    hvp = jax.jvp(jax.grad(loss), (params,), (tangent,))[1]
    values.append(sum(jnp.vdot(a, u) for a in jax.tree.leaves(hvp)))
  return np.asarray(values)


@pytest.mark.parametrize('positions', [1, 3])
def test_it_is_exact_for_a_linear_model_with_white_residuals(positions):
  # ℓ = ½|Wᵀa - y|² has H = I ⊗ E[a aᵀ] whatever the targets. Let every input meet every one
  # of the residuals ±√m e_j: then C_δ = I, and errors do not depend on inputs.
  n, m, inputs = 5, 3, 4
  a = RNG.normal(size=(inputs, n)).astype(np.float32)
  residuals = np.concatenate([np.eye(m), -np.eye(m)]) * np.sqrt(m)
  a, r = np.repeat(a, 2 * m, axis=0), np.tile(residuals, (inputs, 1))
  if positions > 1:  # A sequence: positions see other pairs, each of them all pairs once.
    shuffles = [RNG.permutation(len(a)) for _ in range(positions)]
    a, r = (np.stack([x[s] for s in shuffles], axis=1) for x in (a, r))
  model = Projection(n, m)
  a = jnp.asarray(a, jnp.float32)
  batch = a, model(a) - jnp.asarray(r, jnp.float32)
  layer = capture(model, squares, *batch)['layer/kernel']
  np.testing.assert_allclose(layer.errors, r.reshape(-1, m), atol=1e-5)

  gradient = np.diag(np.arange(1, 4))[[0, 1, 2, 0, 1]] * RNG.normal(size=(n, m))  # Any.
  left, _, right = np.linalg.svd(gradient, full_matrices=False)
  directions = [jnp.asarray(np.outer(left[:, k], right[k]), jnp.float32) for k in range(m)]
  exact = exact_curvature(model, batch, directions)
  got = kronecker_alignment(
    gradient,
    layer.activations,
    layer.errors,
    m,
    num_samples=layer.num_samples,
    curvature=exact,
  )
  np.testing.assert_allclose(got.h_kronecker, exact, rtol=1e-5)
  np.testing.assert_allclose(got.curvature_ratio, 1, rtol=1e-5)
  np.testing.assert_allclose(got.concentration_ratio, 1, rtol=1e-5)
  np.testing.assert_allclose(got.eigenvalues_delta, positions, rtol=1e-5)


def test_it_is_not_exact_where_errors_depend_on_inputs():
  # δ_i large where a_i is: the mean of products is above the product of means.
  activations = RNG.normal(size=(500, 4))
  errors = RNG.normal(size=(500, 3)) * np.linalg.norm(activations, axis=1, keepdims=True)
  got = kronecker_alignment(np.ones((4, 3)) + np.eye(4, 3), activations, errors, 3)
  assert (got.concentration_ratio > 1.1).all()


# ---------------------------------------------------------------------------------
# What is not there is not a number
# ---------------------------------------------------------------------------------

SLOPES = (
  'beta',
  'phi_slope',
  'rho_delta_slope',
  'rho_activation_slope',
  'alpha_kronecker',
  'chi_slope',
  'alpha',
)


def bad_cases():
  gradient, activations, errors = random_case()
  nan = activations.copy()
  nan[0, 0] = np.inf
  orthogonal = np.linalg.qr(gradient)[0]
  return {
    'zero': ((0 * gradient, activations, errors), 'zero'),
    'not finite': ((gradient, nan, errors), 'finite'),
    'NaN errors': ((gradient, activations, errors * np.nan), 'finite'),
    'flat': ((orthogonal, activations, errors), 'same'),
    'two rows': ((gradient, activations[:2], errors[:2]), '2 positive points of 5'),
    'no errors': ((gradient, activations, 0 * errors), '0 positive points of 5'),
  }


@pytest.mark.parametrize('name', bad_cases())
def test_no_slope_without_a_reason(name):
  arguments, reason = bad_cases()[name]
  h = np.arange(1.0, 6.0)
  got = kronecker_alignment(*arguments, 5, curvature=h)
  assert reason in got.reason
  assert np.isnan([getattr(got, slope) for slope in SLOPES]).all()
  assert np.isnan(list(got.r_squared.values())).all()
  assert got.sigma.shape == got.used.shape == (5,)


def test_negative_curvature_everywhere_says_so():
  got = kronecker_alignment(*random_case(), 5, curvature=-np.ones(5))
  assert got.reason == '0 positive points of 5, fewer than 3'
  assert (got.num_zero, got.num_nonpositive) == (0, 5)
  assert np.isnan(got.alpha)
  assert np.isfinite(got.h_kronecker).all()


def test_eigenvalues_beyond_the_rank_are_zero_and_left_out():
  gradient, activations, errors = random_case(rows=4, n=9, m=8)
  got = kronecker_alignment(gradient, activations, errors, 8)
  assert (got.eigenvalues_delta[4:] == 0).all()
  assert (got.eigenvalues_activation[4:] == 0).all()
  assert np.isnan(got.phi[4:]).all()
  assert np.flatnonzero(got.used).tolist() == [0, 1, 2, 3]
  assert got.num_zero == 4
  assert got.reason == ''


def test_directions_of_rounding_are_left_out():
  # A softmax head's gradient sums to zero over its outputs, up to rounding.
  gradient, activations, errors = random_case(m=5)
  errors -= errors.mean(axis=1, keepdims=True)
  gradient = (activations.T @ errors / len(errors)).astype(np.float32)
  got = kronecker_alignment(gradient, activations.astype(np.float32), errors.astype(np.float32), 5)
  assert 0 < got.sigma[4] < 1e-6 * got.sigma[0]
  assert got.used.tolist() == [True] * 4 + [False]
  assert (got.num_points, got.num_zero) == (4, 1)


def test_eigenvalues_of_rounding_are_zero():
  gradient, activations, errors = random_case(m=5)
  errors -= errors.mean(axis=1, keepdims=True)  # One direction of five is not there.
  got = kronecker_alignment(gradient, activations, errors, 5)
  assert (got.eigenvalues_delta[:4] > 0).all()
  assert got.eigenvalues_delta[4] == 0
  assert np.isnan(got.rho_delta[4])


@pytest.mark.parametrize('tolerance', [None, 1e-6])
def test_rank_tolerance(tolerance):
  gradient, activations, errors = random_case()
  u, sigma, vt = np.linalg.svd(gradient, full_matrices=False)
  sigma[4] = 1e-9 * sigma[0]
  got = kronecker_alignment((u * sigma) @ vt, activations, errors, 5, rank_tolerance=tolerance)
  assert got.used[4] == (tolerance is None)


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (lambda g, a, d: (g.T, a, d), ValueError, 'Transpose the gradient'),
    (lambda g, a, d: (g, a[:-1], d), ValueError, 'do not match'),
    (lambda g, a, d: (g[None], a, d), ValueError, 'must be a matrix'),
    (lambda g, a, d: (g, a, d * 1j), TypeError, 'errors must be real'),
    (lambda g, a, d: (g, a.astype(int), d), TypeError, 'activations must be real'),
    (lambda g, a, d: (g, a[:0], d[:0]), ValueError, 'at least one entry'),
  ],
)
def test_arguments_that_cannot_be_meant(change, error, message):
  with pytest.raises(error, match=message):
    kronecker_alignment(*change(*random_case()), 3)


def test_numbers_that_cannot_be_meant():
  case = random_case()
  with pytest.raises(ValueError, match='top_k must be at least 1'):
    kronecker_alignment(*case, 0)
  with pytest.raises(ValueError, match='num_samples must be at least 1'):
    kronecker_alignment(*case, 3, num_samples=0)
  with pytest.raises(ValueError, match=r'curvature must have shape \(3,\)'):
    kronecker_alignment(*case, 3, curvature=np.ones(4))
  with pytest.raises(TypeError, match='gradient is traced'):
    jax.jit(lambda g: kronecker_alignment(g, *case[1:], 3).beta)(case[0])


def test_num_samples_scales_and_leaves_the_slopes():
  gradient, activations, errors = random_case()
  one = kronecker_alignment(gradient, activations, errors, 5)
  four = kronecker_alignment(gradient, activations, errors, 5, num_samples=10)
  np.testing.assert_allclose(four.h_kronecker, 4 * one.h_kronecker, rtol=1e-12)
  for name in ('phi', 'rho_delta', 'rho_activation', 'concentration_ratio'):
    np.testing.assert_allclose(getattr(four, name), getattr(one, name), rtol=1e-12)
  assert four.beta == pytest.approx(one.beta, rel=1e-10)


# ---------------------------------------------------------------------------------
# Written down, and beside a report
# ---------------------------------------------------------------------------------


def test_round_trip_through_json():
  case = random_case(rows=4, n=9, m=8)
  for h in (None, np.array([1.0, -2.0, 3.0, 4.0, 0.5, 0.4, 0.3, 0.2])):
    original = kronecker_alignment(*case, 8, curvature=h)
    # NaN as JSON has it: none.
    text = json.dumps(original.to_dict()).replace('NaN', 'null')
    back = KroneckerAlignment.from_dict(json.loads(text))
    for field in dataclasses.fields(original):
      a, b = (getattr(x, field.name) for x in (original, back))
      if isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
      elif isinstance(a, dict):
        assert a == pytest.approx(b, nan_ok=True)
      elif isinstance(a, float):
        assert a == pytest.approx(b, abs=0, nan_ok=True)
      else:
        assert a == b


def row(path, gradient, h, index=(), batch_shape=()):
  sigma = np.linalg.svd(gradient, compute_uv=False)
  return LayerCurvature(
    path=path,
    index=index,
    batch_shape=batch_shape,
    layer_type='dense',
    shape=gradient.shape,
    spectrum=sigma,
    sigma=sigma[: len(h)],
    h=h,
    h_gauss_newton=None,
    alpha=fits.fit_alpha(sigma[: len(h)], h),
    gamma=fits.fit_gamma(sigma[: len(h)]),
    s=fits.fit_decay(h),
    profile=fits.rank_profile(sigma),
    participation_h=1.0,
    participation_gradient=1.0,
    bound=1.0,
    num_directions=len(h),
    num_negative=0,
  )


class Stacked(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.fork(split=2))
    self.head = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    body = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return self.head(body(x, self.layers))


def test_align_report_finds_each_matrix():
  model = Stacked()
  x, y = jax.random.normal(jax.random.key(0), (20, 4)), jnp.ones((20, 3))
  captured = capture(model, squares, x, y)
  gradients = nnx.grad(lambda m: squares(m, x, y).mean())(model)
  stacked, head = np.asarray(gradients.layers.kernel[...]), np.asarray(gradients.head.kernel[...])
  h = np.array([3.0, 2.0, 0.5])
  rows = [row('layers/kernel', stacked[i], i + h, (i,), (2,)) for i in range(2)]
  report = CurvatureReport((*rows, row('head/kernel', head, h)), 1.0, {})
  for gradient in (None, nnx.state(gradients)):
    aligned = align_report(report, captured, gradients=gradient)
    assert set(aligned.alignment) == {'layers/kernel[0]', 'layers/kernel[1]', 'head/kernel'}
    for i in range(2):
      own = captured['layers/kernel']
      expected = kronecker_alignment(
        stacked[i], own.activations[i], own.errors[i], 3, curvature=i + h
      )
      got = aligned.alignment[f'layers/kernel[{i}]']
      assert got.alpha == pytest.approx(expected.alpha, rel=1e-3)
      np.testing.assert_allclose(got.rho_delta, expected.rho_delta, rtol=1e-2)
  # What counts as zero there counts as zero here.
  strict = dataclasses.replace(report, settings={'rank_tolerance': 0.9})
  assert align_report(strict, captured).alignment['head/kernel'].num_points == 1
  only = align_report(report, {'head/kernel': captured['head/kernel']})
  assert list(only.alignment) == ['head/kernel']
  assert report.alignment is None

  other = capture(model, squares, x[:5] + 1, y[:5])
  with pytest.raises(ValueError, match='measured on other data'):
    align_report(report, other)
  # Statistics of a part of the samples, along the directions of all of them.
  part = capture(model, squares, x[:10], y[:10])
  assert align_report(report, part, gradients=nnx.state(gradients)).alignment.keys()
  with pytest.raises(ValueError, match="'nowhere' was captured"):
    align_report(report, {'nowhere': captured['head/kernel']})
