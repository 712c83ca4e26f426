"""`measure` on any tree of parameters: what it finds, and what it says when there is nothing."""

import functools
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from spectral_optax import curvature, layout
from tests.test_curvature_directional import (
  cross_entropy,
  dense_curvature,
  loss_fn,
  make,
  network,
)


def single(tree):
  return jax.tree.map(lambda a: np.asarray(a, np.float32), tree)


@functools.cache
def measured():
  params, (x, y) = make()
  params, batch = single(params), (single(x), y)
  report = curvature.measure(loss_fn, params, top_k=4, batches=[batch], bootstrap=50)
  return params, batch, report


def test_singular_values_and_curvature_of_every_matrix():
  params, batch, report = measured()
  loss = lambda params: loss_fn(params, batch)
  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  assert report.loss == pytest.approx(float(value), rel=1e-6)
  views = layout.matrix_views(params)
  # By depth, not by name; and a row for each layer of the stack.
  assert [layer.name for layer in report.layers] == [
    'conv/kernel',
    'layers/kernel[0]',
    'layers/kernel[1]',
    'layers/kernel[2]',
    'dense_in/kernel',
    'dense/kernel',
    'head/kernel',
  ]
  types = [layer.layer_type for layer in report.layers]
  assert types == ['conv', *['dense'] * 5, 'head']
  rows = {}
  for layer in report.layers:
    rows.setdefault(layer.path, []).append(layer)
  for path, layers in rows.items():
    view = views[path]
    assert [layer.index for layer in layers] == list(np.ndindex(view.batch_shape))
    gradient = np.asarray(gradients[path.split('/')[0]]['kernel'])
    matrices = np.asarray(view.to_matrices(jnp.asarray(gradient)))
    u, sigma, vt = np.linalg.svd(matrices, full_matrices=False)
    directions = {path: (np.swapaxes(u, 1, 2)[:, :4], vt[:, :4])}
    h = dense_curvature(loss, params, path, directions)
    for i, layer in enumerate(layers):
      assert layer.shape == (view.rows, view.columns)
      assert layer.batch_shape == view.batch_shape
      np.testing.assert_allclose(layer.spectrum, sigma[i], rtol=0, atol=2e-6 * sigma[i, 0])
      np.testing.assert_array_equal(layer.sigma, layer.spectrum[:4])
      there = sigma[i, :4] > 1e-4 * sigma[i, 0]  # Others are rounding's.
      atol = 3e-5 * np.abs(h[i]).max()
      np.testing.assert_allclose(layer.h[there], h[i, there], rtol=0, atol=atol, err_msg=layer.name)


def test_fits_of_a_row_are_those_of_the_functions():
  _, _, report = measured()
  assert any(layer.num_negative for layer in report.layers)
  for layer in report.layers:
    n = layer.num_directions
    sigma, h = layer.sigma[:n], layer.h[:n]
    options = {'bootstrap': 50, 'seed': 0}
    fits = {
      'alpha': curvature.fit_alpha(sigma, h, **options),
      'gamma': curvature.fit_gamma(sigma, **options),
      's': curvature.fit_decay(h, **options),
    }
    for name, fit in fits.items():
      np.testing.assert_equal(getattr(layer, name), fit)
    assert layer.profile == curvature.rank_profile(sigma)
    np.testing.assert_equal(layer.participation_h, curvature.participation_ratio(h[h > 0]))
    assert layer.participation_gradient == curvature.participation_ratio(layer.spectrum)
    alpha, gamma = fits['alpha'].exponent, fits['gamma'].exponent
    np.testing.assert_equal(layer.bound, float(curvature.participation_bound(alpha, gamma)))
    assert layer.num_negative == np.sum(h < 0)
    np.testing.assert_equal(layer.predicted_s, alpha * gamma)
    error = abs(layer.s.exponent - alpha * gamma) / layer.s.exponent
    np.testing.assert_equal(layer.transfer_error, error)
  assert report.settings['top_k'] == 4
  assert report.settings['bootstrap'] == 50


def test_a_quadratic_by_hand():
  # L = ⟨G, W⟩ + tr(Wᵀ A W B) / 2 at W = 0: the gradient is G, h_k = (u_kᵀ A u_k)(v_kᵀ B v_k).
  k = np.arange(1, 6)
  rng = np.random.default_rng(0)
  u, v = (np.linalg.qr(rng.normal(size=(6, 5)))[0] for _ in range(2))
  a, b = (u * k**-1.5) @ u.T, (v * k**-0.5) @ v.T
  g = single((u * k**-1.0) @ v.T)
  a, b = single(a), single(b)
  report = curvature.measure(
    lambda p: jnp.sum(g * p['w']) + jnp.trace(p['w'].T @ a @ p['w'] @ b) / 2,
    {'w': np.zeros((6, 6), np.float32)},
  )
  (layer,) = report.layers
  # The sixth singular value is rounding.
  assert layer.num_directions == 5
  assert len(layer.sigma) == len(layer.h) == 6
  np.testing.assert_allclose(layer.sigma[:5], 1 / k, rtol=1e-5)
  np.testing.assert_allclose(layer.h[:5], k**-2.0, rtol=1e-4)
  assert layer.alpha.exponent == pytest.approx(2, abs=1e-4)
  assert layer.gamma.exponent == pytest.approx(1, abs=1e-4)
  assert layer.s.exponent == pytest.approx(2, abs=1e-4)
  assert layer.bound == pytest.approx(2.5, rel=1e-3)
  assert layer.transfer_error < 1e-4
  assert layer.objection() == ''


def test_a_rounding_sized_singular_value_of_a_head():
  params, batch, report = measured()
  head = report.layers[-1]
  rows_sum_to_zero = np.asarray(jax.grad(loss_fn)(params, batch)['head']['kernel']).sum(1)
  np.testing.assert_allclose(rows_sum_to_zero, 0, atol=1e-6)
  assert head.spectrum[-1] < 1e-6 * head.spectrum[0]
  whole = curvature.measure(
    loss_fn, {'head': params['head']} | params, top_k=9, batches=[batch], bootstrap=0
  ).layers[-1]
  assert len(whole.sigma) == 5
  assert whole.num_directions == whole.gamma.num_points == 4
  # As published: it counts, unless it is exactly zero.
  counted = curvature.measure(
    loss_fn, params, top_k=9, batches=[batch], bootstrap=0, rank_tolerance=0.0
  ).layers[-1]
  assert counted.num_directions == np.sum(counted.sigma > 0) == counted.gamma.num_points
  if counted.sigma[-1] > 0:
    assert counted.gamma.exponent > 2 * whole.gamma.exponent


def test_gauss_newton_is_in_the_report():
  params, batch, _ = measured()
  f = lambda params, batch: network(params, batch[0])
  c = lambda logits, batch: cross_entropy(logits, batch[1])
  options = {'top_k': 3, 'batches': [batch], 'bootstrap': 0}
  report = curvature.measure(loss_fn, params, gauss_newton=(f, c), **options)
  for layer in report.layers:
    assert (layer.h_gauss_newton > 0).all()
  head = report.layers[-1]
  np.testing.assert_allclose(head.h_gauss_newton, head.h, rtol=1e-4)
  wrong = lambda logits, batch: 2 * c(logits, batch)
  with pytest.raises(ValueError, match='must be the loss'):
    curvature.measure(loss_fn, params, gauss_newton=(f, wrong), **options)


def test_least_squares_is_its_own_gauss_newton():
  # Without batches: all three are functions of the parameters alone.
  x = np.random.default_rng(4).normal(size=(9, 5)).astype(np.float32)
  f, c = lambda p: x @ p['w'], lambda z: jnp.sum((z - 1) ** 2) / 2
  params = {'w': np.zeros((5, 4), jnp.bfloat16) + 0.5}
  (layer,) = curvature.measure(lambda p: c(f(p)), params, gauss_newton=(f, c)).layers
  np.testing.assert_allclose(layer.h, layer.h_gauss_newton, rtol=1e-5)
  u, sigma, _ = np.linalg.svd(x.T @ (x @ params['w'].astype(np.float32) - 1))
  # h_k = |x u_k|², in single precision although the weights are not.
  np.testing.assert_allclose(layer.sigma[0], sigma[0], rtol=1e-5)
  np.testing.assert_allclose(layer.h[0], np.sum((x @ u[:, 0]) ** 2), rtol=1e-5)
  assert layer.num_directions == 1  # All columns are the same: of rank one.


def test_sharded_parameters_and_batches():
  params, (x, y), report = measured()
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ('d',))
  put = lambda a, *spec: jax.device_put(
    jnp.asarray(a), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  )
  sharded = jax.tree.map(put, params)
  sharded['layers'] = jax.tree.map(lambda a: put(a, 'd'), params['layers'])
  for batch in ((x, y), (put(x, 'd'), put(y, 'd'))):
    found = curvature.measure(loss_fn, sharded, top_k=4, batches=[batch], bootstrap=0)
    for layer, expected in zip(found.layers, report.layers, strict=True):
      n = expected.num_directions
      atol = 1e-5 * np.abs(expected.h).max()
      np.testing.assert_allclose(layer.h[:n], expected.h[:n], rtol=0, atol=atol)


def test_progress_bars(capsys, monkeypatch):
  loss = lambda p, b: jnp.sum(p['w'] ** 2) * b
  options = {'batches': [np.float32(1), np.float32(2)], 'bootstrap': 0, 'progress': True}
  curvature.measure(loss, {'w': GENERIC}, **options)
  shown = capsys.readouterr().err
  assert 'gradients: 100%' in shown
  assert 'curvature: 100%' in shown
  assert '2/2' in shown
  monkeypatch.setitem(sys.modules, 'tqdm.auto', None)
  with pytest.raises(ImportError, match=r'spectral-optax\[examples\]'):
    curvature.measure(loss, {'w': GENERIC}, **options)


# ---------------------------------------------------------------------------------
# Bad numbers
# ---------------------------------------------------------------------------------


def plane(top, bottom, *, axes=4):
  """A loss of two matrices, and their parameters."""
  loss = lambda p: top(p['top']['kernel']) + bottom(p['bottom']['kernel'])
  eye = np.eye(axes, dtype=np.float32)
  return loss, {'top': {'kernel': eye * 2}, 'bottom': {'kernel': eye}}


def rows(report):
  return {layer.path: layer for layer in report.layers}


GENERIC = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)


def test_negative_curvature_is_counted_and_no_alpha_made_of_it():
  loss, params = plane(
    lambda w: jnp.sum(GENERIC * w) - jnp.sum(w**2) / 2,
    lambda w: jnp.sum(GENERIC * w) + jnp.sum(w**2) / 2,
  )
  report = curvature.measure(loss, params)
  top, bottom = (rows(report)[f'{name}/kernel'] for name in ('top', 'bottom'))
  np.testing.assert_allclose(top.h, -1, rtol=1e-5)
  assert (top.num_negative, bottom.num_negative) == (4, 0)
  assert np.isnan(top.alpha.exponent)
  assert '0 positive points of 4' in top.alpha.reason == top.objection()
  assert np.isnan([top.participation_h, top.bound, top.transfer_error]).all()
  assert not np.isnan(top.gamma.exponent)
  assert bottom.alpha.exponent == pytest.approx(0, abs=1e-5)
  assert 'R² is' in bottom.objection()


@pytest.mark.parametrize(
  ('bad', 'reason'),
  [
    (lambda w: 0 * jnp.sum(w), 'gradient is zero'),
    (lambda w: jnp.sum(jnp.sqrt(w)), 'gradient is not finite'),  # Its slope at zero.
    (lambda w: jnp.nan * jnp.sum(w), 'gradient is not finite'),
  ],
)
def test_a_row_without_a_gradient_says_so_and_leaves_the_others_alone(bad, reason):
  loss, params = plane(bad, lambda w: jnp.sum(GENERIC * w) + jnp.sum(w**4))
  report = curvature.measure(loss, params)
  top, bottom = (rows(report)[f'{name}/kernel'] for name in ('top', 'bottom'))
  assert reason in top.reason == top.objection()
  for fit in (top.alpha, top.gamma, top.s):
    assert reason in fit.reason
    assert np.isnan(fit.exponent)
  assert np.isnan(top.h).all()
  assert top.num_directions == top.num_negative == 0
  assert top.profile.best == ''
  numbers = [top.participation_h, top.participation_gradient, top.bound]
  assert np.isnan(numbers).all()
  if 'zero' in reason:
    assert bottom.reason == ''
    assert np.isfinite(bottom.h).all()


def test_curvature_that_is_not_finite_leaves_no_fit():
  # The slope of |x|^1.5 is finite at zero, its curvature is not.
  loss = lambda p: jnp.sum(GENERIC * p['w']) + jnp.sum(jnp.sqrt(p['w'] ** 2 + 0) ** 1.5)
  smooth = curvature.measure(loss, {'w': GENERIC}).layers[0]
  assert np.isfinite(smooth.h).all()

  @jax.custom_jvp
  def kink(w):
    return jnp.sum(GENERIC * w)

  @kink.defjvp
  def _(primals, tangents):
    (w,), (t,) = primals, tangents
    return kink(w), jnp.sum((GENERIC + jnp.sqrt(w * 0)) * t)

  layer = curvature.measure(lambda p: kink(p['w']), {'w': np.abs(GENERIC)}).layers[0]
  assert np.isfinite(layer.sigma).all()
  assert not np.isfinite(layer.h).any()
  assert layer.alpha.reason == layer.s.reason == 'not finite'
  assert np.isnan(layer.participation_h)
  assert 'not finite' in layer.objection()


def test_what_cannot_be_measured():
  quadratic = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
  with pytest.raises(ValueError, match=r'no matrix among the parameters.*the tree is empty'):
    curvature.measure(quadratic, {})
  with pytest.raises(ValueError, match=r"no matrix among the parameters.*'a/bias'"):
    curvature.measure(quadratic, {'a': {'bias': np.ones(3, np.float32)}})
  with pytest.raises(ValueError, match='top_k must be at least 1'):
    curvature.measure(quadratic, {'w': GENERIC}, top_k=0)
  numbers = {'w': optax.contrib.MuonDimensionNumbers(0, 1)}
  with pytest.raises(TypeError, match=r"'w' with shape \(4, 4\) has dtype complex64"):
    curvature.measure(quadratic, {'w': GENERIC * 1j}, weight_dimension_numbers=numbers)


def test_which_axes_may_be_said():
  loss = lambda p: jnp.sum(p['w'] ** 3)
  tensor = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
  numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
  report = curvature.measure(loss, {'w': tensor}, weight_dimension_numbers={'w': numbers})
  assert [layer.name for layer in report.layers] == ['w[0]', 'w[1]']
  for layer in report.layers:
    assert layer.shape == (3, 4)
    sigma = np.linalg.svd(3 * tensor[layer.index[0]] ** 2, compute_uv=False)
    np.testing.assert_allclose(layer.sigma, sigma, rtol=1e-4)


# ---------------------------------------------------------------------------------
# Frameworks
# ---------------------------------------------------------------------------------

X = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)


def check_frameworks_report(report, names, shapes):
  assert [layer.name for layer in report.layers] == names
  assert [layer.shape for layer in report.layers] == shapes
  for layer in report.layers:
    assert np.isfinite(layer.h).all()
    assert layer.reason == ''
    assert layer.layer_type is not None


def test_flax_nnx_with_batch_statistics():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.z_first = nnx.Linear(4, 5, rngs=rngs)
      self.norm = nnx.BatchNorm(5, rngs=rngs)
      self.a_last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
      return self.a_last(nnx.tanh(self.norm(self.z_first(x))))

  graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

  def loss(params, batch):
    rest, x = batch
    return jnp.mean(nnx.merge(graph, params, rest, copy=True)(x) ** 2)

  report = curvature.measure(loss, params, batches=[(rest, X)], bootstrap=0)
  check_frameworks_report(report, ['z_first/kernel', 'a_last/kernel'], [(4, 5), (5, 3)])


def test_flax_linen():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.tanh(nn.DenseGeneral((2, 3))(x))
      return nn.Dense(2, name='head')(x.reshape(len(x), -1))

  model = Model()
  params = model.init(jax.random.key(0), X)['params']
  loss = lambda params, x: jnp.mean(model.apply({'params': params}, x) ** 2)
  report = curvature.measure(loss, params, batches=[X], bootstrap=0)
  check_frameworks_report(report, ['DenseGeneral_0/kernel', 'head/kernel'], [(4, 6), (6, 2)])


def test_equinox_stacked():
  def layers(key):
    return eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k))(jax.random.split(key, 3))

  model = {'layers': layers(jax.random.key(0)), 'out': eqx.nn.Linear(4, 2, key=jax.random.key(1))}
  arrays, static = eqx.partition(model, eqx.is_array)

  def loss(arrays, x):
    stacked, out_arrays = arrays['layers'], arrays['out']

    def one(h, layer):
      return jnp.tanh(jax.vmap(eqx.combine(layer, static['layers']))(h)), None

    h, _ = jax.lax.scan(one, x, stacked)
    return jnp.mean(jax.vmap(eqx.combine(out_arrays, static['out']))(h) ** 2)

  report = curvature.measure(loss, arrays, batches=[X], bootstrap=0)
  names = [*(f'layers/weight[{i}]' for i in range(3)), 'out/weight']
  check_frameworks_report(report, names, [*[(4, 4)] * 3, (4, 2)])


def test_order_of_use_through_casts_calls_and_unused_parameters():
  keys = ('c', 'a', 'e', 'b', 'd')
  params = {key: {'kernel': GENERIC} for key in keys}

  @jax.jit
  def product(x, w):
    return x @ w

  @jax.checkpoint
  def block(x, p):
    return jnp.tanh(product(x, p['e']['kernel']) @ p['a']['kernel'])

  def loss(p):
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)  # In tree order.
    x = product(X, p['d']['kernel'].T)
    x = block(x, p)
    return jnp.mean((x @ p['b']['kernel']) ** 2)

  problem = curvature.directional.Problem.of(loss, params, None, None, None, None)
  assert problem.in_order_of_use() == [f'{key}/kernel' for key in ('d', 'e', 'a', 'b', 'c')]
