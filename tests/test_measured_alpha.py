"""α measured along the training: all layers at once, averages, fallbacks, the step itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spectral_optax
from spectral_optax import curvature, layout
from spectral_optax.curvature import _convolutions
from spectral_optax.solvers import low_rank

# ---------------------------------------------------------------------------------
# A loss whose curvature is known
# ---------------------------------------------------------------------------------

# By path: (shape, α). Of different sides, tall and wide, and a stack of two layers.
MATRICES = {
  'a/kernel': ((9, 5), (1.3,)),
  'b/kernel': ((5, 8), (2.2,)),
  'layers/kernel': ((2, 6, 6), (0.8, 1.7)),
}


def orthonormal(rng, n, k):
  return np.linalg.qr(rng.normal(size=(n, k)))[0]


def power_law_problem(sign=1.0, cross=0.0, spread=0.0):
  """Gradients G = U Σ Vᵀ and a quadratic loss with h_k = sign σ_k^α along u_k v_kᵀ.

  `cross` couples the layers, as any network does; `spread` scatters log h_k.
  """
  rng = np.random.default_rng(0)
  grads, forms = {}, {}
  for path, (shape, alphas) in MATRICES.items():
    *_, rows, columns = shape
    k = min(rows, columns)
    of_path, of_form = [], []
    for alpha in alphas:
      u, v = orthonormal(rng, rows, k), orthonormal(rng, columns, k)
      sigma = np.arange(1, k + 1) ** -1.0
      h = sign * sigma**alpha * np.exp(spread * rng.normal(size=k))
      of_path.append(3.0 * (u * sigma) @ v.T)
      of_form.append((u, v, h))
    grads[path] = np.stack(of_path).reshape(shape)
    forms[path] = of_form
  weights = {path: rng.normal(size=shape) for path, (shape, _) in MATRICES.items()}

  def loss(params):
    total, linear = 0.0, 0.0
    for path, of_form in forms.items():
      room, name = path.split('/')
      matrices = params[room][name].reshape(-1, *MATRICES[path][0][-2:])
      for w, (u, v, h) in zip(matrices, of_form, strict=True):
        total += jnp.sum(jnp.asarray(h, w.dtype) * jnp.einsum('rk,rc,ck->k', u, w, v) ** 2) / 2
      linear += jnp.sum(jnp.asarray(weights[path], matrices.dtype) * params[room][name])
    off_diagonal = linear**2 / 2 - sum(
      jnp.sum(jnp.asarray(weights[p], jnp.float32) * params[p.split('/')[0]]['kernel']) ** 2 / 2
      for p in forms
    )
    return total + cross * off_diagonal + 0.0 * jnp.sum(params['a']['bias'])

  nest = lambda flat: {path.split('/')[0]: {'kernel': x} for path, x in flat.items()}
  grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nest(grads))
  params = jax.tree.map(jnp.zeros_like, grads)
  grads['a']['bias'], params['a']['bias'] = jnp.ones(5), jnp.zeros(5)
  return loss, params, grads


def directions_of(grads, k=5):
  directions = {}
  for path, (shape, _) in MATRICES.items():
    g = grads[path.split('/')[0]]['kernel'].reshape(-1, *shape[-2:])
    u, _, v = jax.jit(low_rank.leading_directions, static_argnums=1)(g, k)
    directions[path] = u, v
  return directions


def measured_state(state):
  names = ('measured_alpha', 'measured_r_squared', 'measured_negative', 'alpha', 'damping')
  return {name: dict(optax.tree.get(state, name)) for name in names}


# ---------------------------------------------------------------------------------
# Leading directions
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(30, 12), (12, 30), (10, 10)])
def test_leading_directions_are_those_of_the_svd(shape):
  rng = np.random.default_rng(1)
  k = min(shape)
  sigma = 2.0 ** -np.arange(k)
  matrices = np.stack(
    [(orthonormal(rng, shape[0], k) * sigma) @ orthonormal(rng, shape[1], k).T for _ in range(2)]
  ).astype(np.float32)
  u, found, v = low_rank.leading_directions(jnp.asarray(1e-20 * matrices), 4)
  exact_u, exact, exact_v = np.linalg.svd(matrices.astype(np.float64))
  np.testing.assert_allclose(found, 1e-20 * exact[:, :4], rtol=1e-4)
  for vectors, of in ((u, exact_u.swapaxes(1, 2)), (v, exact_v)):
    along = np.einsum('bkn,bkn->bk', vectors, of[:, :4])
    np.testing.assert_allclose(np.abs(along), 1, atol=1e-3)
  # And u σ = G v, signs included, however close the σ are.
  np.testing.assert_allclose(
    np.asarray(u) * np.asarray(found)[:, :, None] * 1e20,
    np.einsum('brc,bkc->bkr', matrices, v),
    atol=1e-6,
  )


@pytest.mark.parametrize('matrix', [np.zeros((6, 4)), np.full((6, 4), np.nan)])
def test_directions_of_nothing_are_nothing(matrix):
  u, sigma, v = low_rank.leading_directions(jnp.asarray(matrix[None], jnp.float32), 3)
  assert not np.asarray(sigma).any()
  assert not np.asarray(u).any()
  assert np.isfinite(np.asarray(v)).all()


# ---------------------------------------------------------------------------------
# All layers at once
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize('draws', [1, 2, 4, 8])
def test_signs_are_orthogonal_between_columns(draws):
  signs = np.asarray(curvature.orthogonal_signs(jax.random.key(3), draws, 11))
  assert signs.shape == (draws, 11)
  assert (np.abs(signs) == 1).all()
  products = signs.T @ signs / draws
  same = (np.arange(11)[:, None] - np.arange(11)) % draws == 0
  assert (products[~same] == 0).all()
  assert (np.abs(products[same]) == 1).all()
  other = np.asarray(curvature.orthogonal_signs(jax.random.key(4), draws, 11))
  assert (other != signs).any()


def test_as_many_draws_as_matrices_are_exact():
  loss, params, grads = power_law_problem(cross=0.3)
  directions = directions_of(grads)
  exact, _ = curvature.directional_curvature(loss, params, directions)
  joint = jax.jit(lambda p, d: curvature.joint_curvature(loss, p, d, jax.random.key(0), draws=4))(
    params, directions
  )
  for path, h in exact.items():
    np.testing.assert_allclose(joint[path], h, rtol=1e-5, atol=1e-5)


def test_fewer_draws_are_right_on_average_over_all_signs():
  # Four matrices, one draw: sixteen sign patterns, of which pairs give the same.
  loss, params, grads = power_law_problem(cross=0.3)
  directions = directions_of(grads)
  exact, _ = curvature.directional_curvature(loss, params, directions)
  one = jax.jit(lambda key: curvature.joint_curvature(loss, params, directions, key))
  patterns = {}
  for seed in range(100):
    key = jax.random.key(seed)
    signs = np.asarray(curvature.orthogonal_signs(key, 1, 4))[0]
    patterns.setdefault(tuple(signs * signs[0]), key)
    if len(patterns) == 8:
      break
  assert len(patterns) == 8
  found = [one(key) for key in patterns.values()]
  for path, h in exact.items():
    all_of = np.stack([f[path] for f in found])
    np.testing.assert_allclose(all_of.mean(0), h, rtol=1e-4, atol=1e-5)
    assert np.abs(all_of - h).max() > 0.05  # One draw alone is noisy.


def test_directions_may_differ_in_number_and_half_precision_is_measured_in_float32():
  loss, params, grads = power_law_problem()
  directions = directions_of(grads)
  few = {
    path: (u[:, : 2 + i], v[:, : 2 + i]) for i, (path, (u, v)) in enumerate(directions.items())
  }
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  joint = curvature.joint_curvature(loss, halves, few, jax.random.key(0), draws=4)
  exact, _ = curvature.directional_curvature(loss, params, directions)
  for i, path in enumerate(exact):
    assert joint[path].dtype == jnp.float32
    np.testing.assert_allclose(joint[path], exact[path][:, : 2 + i], rtol=1e-5, atol=1e-6)


def test_the_network_is_traced_once_however_many_layers_and_directions():
  loss, params, grads = power_law_problem()
  calls = []

  def counted(params):
    calls.append(1)
    return loss(params)

  curvature.joint_curvature(counted, params, directions_of(grads), jax.random.key(0), draws=2)
  assert len(calls) == 1


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda d: {'a/bias': d['a/kernel']}, "'a/bias' is no matrix among the parameters"),
    (lambda d: {'a/kernel': d['b/kernel']}, "Directions of 'a/kernel' have shapes"),
  ],
)
def test_errors_of_directions(change, message):
  loss, params, grads = power_law_problem()
  with pytest.raises(ValueError, match=message):
    curvature.joint_curvature(loss, params, change(directions_of(grads)), jax.random.key(0))


# ---------------------------------------------------------------------------------
# In the optimizer
# ---------------------------------------------------------------------------------


def optimizer(alpha, which='spectral_newton', **arguments):
  if which == 'spectral_newton':
    return spectral_optax.spectral_newton(0.1, alpha, **arguments)
  return spectral_optax.scale_by_spectral_newton(alpha, **arguments)


@pytest.mark.parametrize('which', ['spectral_newton', 'scale_by_spectral_newton'])
def test_the_exponents_of_the_loss_are_found_and_taken(which):
  loss, params, grads = power_law_problem(cross=0.3)
  tx = optimizer(spectral_optax.measured_alpha(every=1, draws=4), which)
  state = tx.init(params)
  updates, state = jax.jit(functools.partial(tx.update, value_fn=loss))(grads, state, params)
  found = measured_state(state)
  for path, (_, alphas) in MATRICES.items():
    expected = np.array(alphas) if len(alphas) > 1 else alphas[0]
    np.testing.assert_allclose(found['measured_alpha'][path], expected, atol=2e-3)
    np.testing.assert_allclose(found['alpha'][path], expected, atol=2e-3)
    np.testing.assert_allclose(found['measured_r_squared'][path], 1, atol=1e-4)
    assert not np.asarray(found['measured_negative'][path]).any()
    # The turn of T stays where the default has it.
    np.testing.assert_allclose(
      found['damping'][path], (0.008 ** (1 / 1.5)) ** np.asarray(found['alpha'][path]), rtol=1e-5
    )
  # The update is that of the same α and d said by the user; not as constants, which XLA would fold.
  said = lambda alpha, damping: optimizer(alpha, which, damping=damping)
  numbers = found['alpha'], found['damping']
  begun = said(*numbers).init(params)
  expected, _ = jax.jit(lambda numbers: said(*numbers).update(grads, begun, params))(numbers)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected
  )


def test_measured_every_so_many_steps():
  loss, params, grads = power_law_problem()
  tx = optimizer(spectral_optax.measured_alpha(every=3, draws=4))
  update = jax.jit(functools.partial(tx.update, value_fn=loss))
  state, seen = tx.init(params), []
  for _ in range(6):
    _, state = update(grads, state, params)
    seen.append(float(measured_state(state)['measured_alpha']['a/kernel']))
    sigma = optax.tree.get(state, 'measured_sigma')['a/kernel']
    seen[-1] = (seen[-1], float(sigma[0]))
  assert np.isnan([a for a, _ in seen]).tolist() == [True, True, False, False, False, False]
  # 1 - decay after one measurement, 1 - decay² after two.
  np.testing.assert_allclose([s for _, s in seen], [0, 0, 0.2, 0.2, 0.2, 0.36], rtol=1e-5)


@pytest.mark.parametrize('problem', [{'sign': -1.0}, {'spread': 3.0}])
def test_fallback_without_a_good_fit(problem):
  loss, params, grads = power_law_problem(**problem)
  alpha = spectral_optax.measured_alpha(
    every=1, draws=4, fallback={'a': 1.1, 'b': 1.2, 'layers': 0.9}, min_r_squared=0.9999
  )
  tx = optimizer(alpha)
  state = tx.init(params)
  assert float(measured_state(state)['alpha']['b/kernel']) == pytest.approx(1.2)
  _, state = jax.jit(functools.partial(tx.update, value_fn=loss))(grads, state, params)
  found = measured_state(state)
  for path, expected in {'a/kernel': 1.1, 'b/kernel': 1.2, 'layers/kernel': 0.9}.items():
    np.testing.assert_allclose(found['alpha'][path], expected, rtol=1e-6)
  negative = np.asarray(found['measured_negative']['layers/kernel'])
  assert (negative == (1 if 'sign' in problem else 0)).all()


def update_all(txs, value_fn, grads, params):
  """One update of each, in one program: what they measure alike is compiled once."""
  update = lambda grads, states: {
    name: tx.update(grads, states[name], params, value_fn=value_fn)[1] for name, tx in txs.items()
  }
  states = jax.jit(update)(grads, {name: tx.init(params) for name, tx in txs.items()})
  return {name: measured_state(state) for name, state in states.items()}


def test_each_rule_of_trust_by_itself():
  loss, params, grads = power_law_problem(spread=0.5)
  rules = {'strict': {'min_r_squared': 0.9999}, 'lenient': {'min_r_squared': 0.0}}
  measured_alpha = functools.partial(spectral_optax.measured_alpha, every=1, draws=4)
  txs = {name: optimizer(measured_alpha(clip=(0, 9), **of)) for name, of in rules.items()}
  found = update_all(txs, loss, grads, params)
  taken = {name: float(of['alpha']['a/kernel']) for name, of in found.items()}
  measured = float(found['strict']['measured_alpha']['a/kernel'])
  assert taken == pytest.approx({'strict': 1.5, 'lenient': measured})
  assert abs(measured - 1.5) > 0.05

  # One negative direction of five.
  sign = jnp.asarray([1.0, 1, 1, -1, 1])
  u, v = directions_of(grads)['a/kernel']
  mixed = lambda p: jnp.sum(
    sign * jnp.arange(1, 6) ** -1.3 * jnp.einsum('kr,rc,kc->k', u[0], p['a']['kernel'], v[0]) ** 2
  )
  expected = {0.1: 1.5, 0.25: 1.3}
  txs = {most: optimizer(measured_alpha(max_negative=most)) for most in expected}
  for most, of in update_all(txs, mixed, grads, params).items():
    assert float(of['measured_negative']['a/kernel']) == pytest.approx(0.2)
    assert float(of['alpha']['a/kernel']) == pytest.approx(expected[most], abs=2e-3)


def test_clip():
  loss, params, grads = power_law_problem()
  tx = optimizer(spectral_optax.measured_alpha(every=1, draws=4, clip=(1.0, 2.0)))
  update = jax.jit(functools.partial(tx.update, value_fn=loss))
  found = measured_state(update(grads, tx.init(params), params)[1])
  np.testing.assert_allclose(found['alpha']['b/kernel'], 2.0)
  np.testing.assert_allclose(found['alpha']['layers/kernel'], [1.0, 1.7], atol=2e-3)
  assert float(found['measured_alpha']['b/kernel']) == pytest.approx(2.2, abs=2e-3)


def test_noise_between_layers_falls_out_of_the_average():
  loss, params, grads = power_law_problem(cross=0.02)
  errors = {}
  for steps in (1, 60):
    alpha = spectral_optax.measured_alpha(every=1, decay=0.98, min_r_squared=0.0, clip=(0, 9))
    tx = optimizer(alpha)

    def step(state, _, tx=tx):
      return tx.update(grads, state, params, value_fn=loss)[1], None

    state, _ = jax.jit(lambda s, n=steps: jax.lax.scan(step, s, length=n))(tx.init(params))
    found = measured_state(state)['measured_alpha']
    errors[steps] = np.concatenate(
      [np.ravel(found[path]) - np.array(alphas) for path, (_, alphas) in MATRICES.items()]
    )
  size = {steps: np.abs(e).mean() for steps, e in errors.items()}
  assert size[60] < size[1] / 2, errors


def test_a_bad_measurement_leaves_the_averages_alone():
  loss, params, grads = power_law_problem()
  tx = optimizer(spectral_optax.measured_alpha(every=1, draws=4))
  # One program for both losses.
  update = jax.jit(lambda g, s, f: tx.update(g, s, params, value_fn=lambda p: f * loss(p)))
  state = tx.init(params)
  for _ in range(2):
    _, state = update(grads, state, 1.0)
  updates, after = update(grads, state, jnp.nan)
  for name in ('measured_h', 'measured_sigma', 'measured_alpha', 'alpha'):
    before, now = (optax.tree.get(s, name).flat for s in (state, after))
    np.testing.assert_allclose(now, before, rtol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))

  spoiled = jax.tree.map(lambda g: g * jnp.nan, grads)
  _, after = update(spoiled, state, 1.0)
  for name in ('measured_h', 'measured_sigma', 'measured_alpha'):
    before, now = (optax.tree.get(s, name).flat for s in (state, after))
    np.testing.assert_array_equal(now, before)


def test_a_matrix_with_two_directions_takes_the_fallback_for_good():
  params = {'narrow': {'kernel': jnp.ones((4, 2))}, 'a': {'kernel': jnp.eye(4)}}
  loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
  tx = optimizer(spectral_optax.measured_alpha(every=1, fallback=0.7))
  grads = jax.tree.map(lambda p: p + jnp.arange(p.size).reshape(p.shape), params)
  update = jax.jit(functools.partial(tx.update, value_fn=loss))
  found = measured_state(update(grads, tx.init(params), params)[1])
  assert np.isnan(found['measured_alpha']['narrow/kernel'])
  np.testing.assert_allclose(found['alpha']['narrow/kernel'], 0.7)


@pytest.mark.parametrize('missing', ['value_fn', 'params'])
@pytest.mark.parametrize('which', ['spectral_newton', 'scale_by_spectral_newton'])
def test_update_without_what_is_measured(which, missing):
  loss, params, grads = power_law_problem()
  tx = optimizer(spectral_optax.measured_alpha(), which)
  given = {'params': params, 'value_fn': loss}
  del given[missing]
  with pytest.raises(ValueError, match=f'got no {missing}: call tx.update'):
    tx.update(grads, tx.init(params), **given)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'every': 0}, 'every of measured_alpha must be at least 1, got 0'),
    ({'top_k': 2}, 'top_k of measured_alpha must be at least 3, got 2'),
    ({'draws': 3}, 'draws must be a power of two, got 3'),
    ({'clip': (2.0, 1.0)}, 'clip of measured_alpha must be two numbers'),
    ({'clip': (-1.0, 1.0)}, 'clip of measured_alpha must be two numbers'),
    ({'decay': 1.0}, 'decay of measured_alpha must be at least 0 and less than 1'),
    ({'min_r_squared': 1.5}, 'min_r_squared of measured_alpha must be at most 1'),
    ({'max_negative': -0.1}, 'max_negative of measured_alpha must be a part'),
    ({'fallback': spectral_optax.measured_alpha()}, 'fallback of measured_alpha must not be'),
  ],
)
def test_errors_at_construction(arguments, message):
  with pytest.raises(ValueError, match=message):
    spectral_optax.measured_alpha(**arguments)


def test_a_solver_that_needs_to_know_alpha_is_refused():
  _, params, _ = power_law_problem()
  tx = optimizer(spectral_optax.measured_alpha(fallback=2.0), solver='cholesky')
  with pytest.raises(ValueError, match='solver="cholesky" computes alpha = 2 alone'):
    tx.init(params)


def test_state_is_stable_under_scan_wrappers_and_injected_hyperparameters():
  loss, params, grads = power_law_problem()
  build = lambda learning_rate: spectral_optax.spectral_newton(
    learning_rate, alpha=spectral_optax.measured_alpha(every=2, draws=4), mu_dtype=jnp.bfloat16
  )
  tx = optax.chain(
    optax.clip_by_global_norm(10.0), optax.inject_hyperparams(build)(learning_rate=0.1)
  )
  halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(
      jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads), state, params, value_fn=loss
    )
    return (optax.apply_updates(params, updates), state), None

  # A scan asks for the same structure, shapes and types before and after.
  (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=4))((halves, tx.init(halves)))
  assert float(measured_state(state)['alpha']['a/kernel']) == pytest.approx(1.3, abs=0.03)
  assert jax.tree.structure(jax.eval_shape(tx.init, halves)) == jax.tree.structure(state)


def test_double_precision(x64):
  del x64
  loss, params, grads = power_law_problem()
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
  tx = optimizer(spectral_optax.measured_alpha(every=1, draws=4))
  update = jax.jit(functools.partial(tx.update, value_fn=loss))
  _, state = update(wide(grads), tx.init(wide(params)), wide(params))
  found = optax.tree.get(state, 'measured_alpha')
  assert found.flat.dtype == jnp.float64
  # The gradients were rounded to float32.
  np.testing.assert_allclose(found['a/kernel'], 1.3, atol=1e-5)


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_sharded_parameters_are_measured_as_whole_ones(kind):
  loss, params, grads = power_law_problem(cross=0.3)

  def of_whole(params):
    # What is made of explicitly sharded parameters is the loss's own affair.
    split = lambda x: any(jax.typeof(x).sharding.spec)
    whole = jax.sharding.PartitionSpec()
    return loss(jax.tree.map(lambda x: jax.sharding.reshard(x, whole) if split(x) else x, params))

  tx = optimizer(spectral_optax.measured_alpha(every=1, draws=4))
  step = jax.jit(functools.partial(tx.update, value_fn=of_whole))
  expected, _ = step(grads, tx.init(params), params)
  mesh = jax.make_mesh((2,), ('x',), axis_types=(getattr(jax.sharding.AxisType, kind),))
  with jax.set_mesh(mesh):
    last = lambda x: jax.sharding.PartitionSpec(
      *(None,) * (x.ndim - 1), 'x' if x.shape[-1] % 2 == 0 else None
    )
    put = lambda tree: jax.tree.map(
      lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, last(x))), tree
    )
    updates, state = step(put(grads), tx.init(put(params)), put(params))
    found = measured_state(state)['measured_alpha']
  for path, (_, alphas) in MATRICES.items():
    np.testing.assert_allclose(np.ravel(found[path]), alphas, atol=2e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, expected)


def test_without_measuring_the_state_holds_nothing_of_it():
  _, params, grads = power_law_problem()
  tx = optimizer('default')
  state = tx.init(params)
  assert optax.tree.get(state, 'measurement') is None
  # And what is given to measure is not looked at.
  refuse = lambda _: pytest.fail('called')
  jax.jit(functools.partial(tx.update, value_fn=refuse))(grads, state, params)


def test_map_params():
  _, params, _ = power_law_problem()
  tx = optimizer(spectral_optax.measured_alpha())
  state = tx.init(params)
  marked = optax.tree.map_params(tx, lambda x: x + 1, state)
  assert jax.tree.structure(marked) == jax.tree.structure(state)
  for name in ('measured_h', 'measured_sigma'):
    assert not np.asarray(optax.tree.get(marked, name).flat).any()


# ---------------------------------------------------------------------------------
# Convolutions inside control flow
# ---------------------------------------------------------------------------------

ORDER = '[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'


def convolve(x, kernel, **how):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(x, kernel, (2, 1), 'SAME', dimension_numbers=numbers, **how)


# Images, window, the rest. Those of "small" are shorter than the window along one axis, and, in
# the gradient, with gaps in them.
CONVOLUTIONS = {
  'plain': ((8, 7), (3, 3, 4, 6), {}),
  'grouped': ((8, 7), (3, 3, 2, 6), {'feature_group_count': 2}),
  'dilated': ((8, 7), (3, 2, 4, 6), {'rhs_dilation': (1, 2)}),
  'small': ((4, 2), (3, 3, 4, 6), {}),
  'smaller': ((1, 2), (5, 3, 2, 6), {'feature_group_count': 2}),
}


@pytest.mark.parametrize('inside', ['cond', 'scan', 'jit'])
@pytest.mark.parametrize('kind', CONVOLUTIONS)
def test_convolutions_of_gradients_are_brought_into_the_fast_order(kind, inside):
  image, shape, how = CONVOLUTIONS[kind]
  x, kernel = jax.random.normal(jax.random.key(0), (2, *image, 4)), jnp.ones(shape)
  kernel += jax.random.normal(jax.random.key(1), shape)
  loss = lambda x, k: jnp.sum(jnp.sin(convolve(x, k, **how)))

  def function(x, kernel):
    gradient = jax.grad(loss, argnums=(0, 1))
    if inside == 'cond':
      zeros = (jnp.zeros_like(x), jnp.zeros_like(kernel))
      return jax.lax.cond(jnp.sum(x) > -1e9, gradient, lambda *_: zeros, x, kernel)
    if inside == 'scan':
      step = lambda carry, _: (jax.tree.map(jnp.tanh, gradient(*carry)), None)
      return jax.lax.scan(step, (x, kernel), length=1)[0]
    return jax.jit(gradient)(x, kernel)

  fast = _convolutions.channels_last(function)
  for a, b in zip(fast(x, kernel), function(x, kernel), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

  def lines(f):
    text = jax.jit(f).lower(x, kernel).as_text().splitlines()
    return [line for line in text if 'stablehlo.convolution' in line]

  orders = lambda f: [ORDER in line for line in lines(f)]
  assert all(orders(fast))
  assert len(orders(fast)) == len(orders(function)) > 1
  assert not all(orders(function))  # Or there would be nothing to do.

  def fits(line):  # The window, into the image, of operands of one order.
    images, windows = re.findall(r'tensor<([\dx]+)xf32>', line)[:2]
    sides = [tuple(map(int, shape.split('x'))) for shape in (images, windows)]
    return all(i >= w for i, w in zip(sides[0][1:-1], sides[1][:-2], strict=True))

  assert all(map(fits, lines(fast)))


@pytest.mark.parametrize('solver', ['rational', 'polynomial'])
def test_t_is_fitted_anew_where_alpha_has_changed_and_only_there(solver):
  rng = np.random.default_rng(0)
  noise = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  # Two of one side, and one that has a fit of its own.
  shapes = {'a': (12, 8), 'b': (8, 12), 'c': (20, 16)}
  grads = {name: {'kernel': noise(*shape)} for name, shape in shapes.items()}
  config = spectral_optax.measured_alpha(1000)
  tx = spectral_optax.scale_by_spectral_transfer(config, solver=solver)
  update = jax.jit(lambda state: tx.update(grads, state, grads, value_fn=optax.tree.norm))
  # The same α, traced, without anything kept.
  other = spectral_optax.scale_by_spectral_transfer(lambda _: jnp.float32(1.5), solver=solver)
  want, _ = jax.jit(other.update)(grads, other.init(grads))
  start = tx.init(grads)
  first, state = update(start)
  again, after = update(state)
  assert start.fits.shape == state.fits.shape
  assert start.fits.size > 10
  for found in (first, again):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, want)
  np.testing.assert_array_equal(after.fits, state.fits)
  # What was kept is what is used: of zeros there comes zero.
  nothing, _ = update(state._replace(fits=0 * state.fits))
  assert optax.tree.norm(nothing) == 0
  # Not at the first step, nor after another α.
  for other_state in (
    start,
    state._replace(alpha=layout.ByPath(state.alpha.flat + 1, state.alpha.shapes)),
    state._replace(damping=layout.ByPath(state.damping.flat + 1, state.damping.shapes)),
  ):
    found, after = update(other_state._replace(fits=0 * state.fits))
    np.testing.assert_array_equal(after.fits, state.fits)
    jax.tree.map(np.testing.assert_array_equal, found, first)
