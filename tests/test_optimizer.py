"""The transformations: what they compute, and that they behave as Optax asks."""

import functools
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import spectral_optax
from spectral_optax import exponents, layout, transform
from tests import reference


@functools.partial(jax.jit, static_argnums=0)  # Draws of many shapes, compiled as one.
def mixed_params(dtype=jnp.float32):
  """Convolution, dense, stacked and wide matrices, and what is none."""
  key = iter(jax.random.split(jax.random.key(0), 12))
  normal = lambda *shape: jax.random.normal(next(key), shape, dtype)
  return {
    'Conv_0': {'kernel': normal(3, 3, 2, 6), 'bias': normal(6)},
    'layers': {'kernel': normal(3, 5, 4), 'bias': normal(3, 4)},
    'Dense_0': {'kernel': normal(4, 5), 'bias': normal(5)},
    'Dense_1': {'kernel': normal(5, 4), 'bias': normal(4)},
    'head': {'kernel': normal(4, 3), 'bias': normal(3)},
    'scale': normal(4),
  }


def random_like(tree, seed=1):
  rng = np.random.default_rng(seed)  # NumPy's: JAX would compile a draw for each shape.
  return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), tree)


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def avals(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# ---------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------


def test_transfer_of_each_parameter():
  grads = mixed_params()
  tx = spectral_optax.scale_by_spectral_transfer(2.0, 0.1)
  updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
  conv = reference.update(grads['Conv_0']['kernel'].reshape(18, 6), 2, 0.1)
  np.testing.assert_allclose(updates['Conv_0']['kernel'].reshape(18, 6), conv, atol=1e-5)
  for update, grad in zip(updates['layers']['kernel'], grads['layers']['kernel'], strict=True):
    np.testing.assert_allclose(update, reference.update(grad, 2, 0.1), atol=1e-5)
  for name in ('Dense_0', 'Dense_1', 'head'):
    exact = reference.update(grads[name]['kernel'], 2, 0.1)
    np.testing.assert_allclose(updates[name]['kernel'], exact, atol=1e-5)
    np.testing.assert_array_equal(updates[name]['bias'], grads[name]['bias'])
  np.testing.assert_array_equal(updates['scale'], grads['scale'])


def test_defaults_by_layer_type():
  grads = mixed_params()
  tx = spectral_optax.scale_by_spectral_transfer(solver='gram')
  updates, state = jax.jit(tx.update)(grads, tx.init(grads))
  conv = reference.update(grads['Conv_0']['kernel'].reshape(18, 6), 2, 0.1)
  dense = reference.update(grads['Dense_0']['kernel'], 1.5, 0.008)
  np.testing.assert_allclose(updates['Conv_0']['kernel'].reshape(18, 6), conv, atol=1e-5)
  np.testing.assert_allclose(updates['Dense_0']['kernel'], dense, atol=1e-4)
  assert {k: float(v.ravel()[0]) for k, v in state.alpha.items()} == {
    'Conv_0/kernel': 2.0,
    'Dense_0/kernel': 1.5,
    'Dense_1/kernel': 1.5,
    'head/kernel': 1.5,
    'layers/kernel': 1.5,
  }


def test_readme_says_the_defaults():
  text = (Path(__file__).parents[1] / 'README.md').read_text('utf-8')
  rows = [line.strip('| ').split(' | ') for line in text.splitlines() if line.startswith('| ')]
  said = {row[0]: row[1:] for row in rows}
  parameters = inspect.signature(spectral_optax.spectral_newton).parameters
  momentum = said['`momentum`, `nesterov`, `mu_dtype`'][0].split(', ')[0]
  assert float(momentum) == parameters['momentum'].default
  sizes = [parameters[name].default for name in ('update_rms', 'rms_of')]
  assert said['`update_rms`, `rms_of`'][0] == '{}, `"{}"`'.format(*sizes)
  without_adam = inspect.signature(spectral_optax.scale_by_spectral_newton).parameters
  assert [without_adam[name].default for name in ('update_rms', 'rms_of')] == sizes
  for name, defaults in (
    ('convolutions, `damping="constant"`', exponents.DEFAULT_CONV),
    ('every other matrix, `damping="constant"`', exponents.DEFAULT_OTHER),
  ):
    alpha, damping, turn = map(float, said[name])
    assert (alpha, damping) == defaults
    assert turn == pytest.approx(damping ** (1 / alpha), rel=0.02)
  alpha, damping, turn = said['every matrix, by default']
  assert float(alpha) == exponents.NOISE_ALPHA
  assert damping == 'from the noise'
  assert np.exp(exponents.noise_turn(64).log_sigma) == pytest.approx(float(turn.split()[-1]))


def test_published_table_by_layer_type():
  grads = {
    'Conv_0': {'kernel': jnp.ones((3, 3, 2, 4))},
    'attention': {n: {'kernel': jnp.ones((4, 2, 2))} for n in ('query', 'key', 'value')},
    'mlp': {'up_proj': {'kernel': jnp.ones((4, 8))}, 'down_proj': {'kernel': jnp.ones((8, 4))}},
    'head': {'kernel': jnp.ones((4, 3))},
  }
  tx = spectral_optax.scale_by_spectral_transfer('layer_type')
  state = tx.init(grads)
  table = spectral_optax.PUBLISHED_ALPHA
  expected = {
    'Conv_0/kernel': table['conv'],
    'attention/query/kernel': table['attention'],
    'attention/key/kernel': table['attention'],
    'attention/value/kernel': table['attention'],
    'mlp/up_proj/kernel': table['mlp_up'],
    'mlp/down_proj/kernel': table['mlp_down'],
    'head/kernel': table['head'],
  }
  assert set(state.alpha) == set(expected)
  for path, alpha in expected.items():
    np.testing.assert_allclose(state.alpha[path], alpha, rtol=1e-6)
    np.testing.assert_allclose(state.damping[path], 0.1, rtol=1e-6)  # As published.


def test_published_figures_lie_in_their_published_ranges():
  # arXiv:2606.02596: ranges of the means over architectures and data sets.
  ranges = {
    'conv': (1.94, 2.17),
    'dense': (2.18, 2.18),
    'attention': (1.17, 1.43),
    'mlp_up': (0.69, 1.04),
    'mlp_down': (1.13, 1.19),
    'head': (1.23, 1.65),
  }
  assert set(spectral_optax.PUBLISHED_ALPHA) == set(ranges)
  for name, (low, high) in ranges.items():
    assert low <= spectral_optax.PUBLISHED_ALPHA[name] <= high


@pytest.mark.parametrize('alpha', [0.85, 1.3, 2.0])
def test_damping_defaults_to_the_default_turning_point(alpha):
  params = mixed_params()
  state = spectral_optax.scale_by_spectral_transfer(alpha).init(params)
  for path, turn in (('Conv_0/kernel', 0.1**0.5), ('head/kernel', 0.008 ** (1 / 1.5))):
    np.testing.assert_allclose(state.damping[path], turn**alpha, rtol=1e-5)


FORMS = {
  'number': 1.3,
  'array': jnp.array(1.3),
  'schedule': optax.constant_schedule(1.3),
  'moving schedule': optax.linear_schedule(1.3, 2.0, 10),
  'callable': lambda params: jax.tree.map(lambda _: 1.3, params),
  'prefix': {'Conv_0': 1.3, 'layers': {'kernel': 1.3}, 'Dense_0': 1.3, 'Dense_1': 1.3,
             'head': 1.3, 'scale': None},
  'flat': {'Conv_0': 1.3, 'layers/kernel': 1.3, 'Dense_0/kernel': 1.3, 'Dense_1': 1.3,
           'head': 1.3},
  'root and exception': {'': 1.3, 'layers/kernel': np.full(3, 1.3)},
  'tree of schedules': {'Conv_0': optax.constant_schedule(1.3), 'layers': 1.3, 'Dense_0': 1.3,
                        'Dense_1': jnp.array(1.3), 'head': 1.3, 'scale': None},
}  # fmt: skip


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('which', ['scale_by_spectral_transfer', 'spectral_newton'])
def test_forms_of_alpha_and_damping(form, which):
  params, grads = mixed_params(), random_like(mixed_params())
  make = getattr(spectral_optax, which)
  make = functools.partial(make, 0.1) if which == 'spectral_newton' else make
  value = FORMS[form]
  # The exact solver: a traced α and a known one are approximated differently.
  tx, plain = make(value, value, solver='gram'), make(1.3, 1.3, solver='gram')
  update = jax.jit(tx.update)(grads, tx.init(params), params)
  expected = jax.jit(plain.update)(grads, plain.init(params), params)
  assert_trees_close(update[0], expected[0], rtol=1e-4, atol=1e-5)


def test_schedules_are_called_with_the_count():
  grads = mixed_params()
  tx = spectral_optax.scale_by_spectral_transfer(
    optax.piecewise_constant_schedule(1.0, {2: 2.0}),
    lambda count: 0.1 * (1 + count),
    solver='gram',
  )
  state = tx.init(grads)
  seen = []
  for _ in range(4):
    updates, state = jax.jit(tx.update)(grads, state)
    seen.append((float(state.alpha['head/kernel']), float(state.damping['head/kernel'])))
    exact = reference.update(grads['head']['kernel'], *seen[-1])
    np.testing.assert_allclose(updates['head']['kernel'], exact, atol=1e-4)
  np.testing.assert_allclose(seen, [(1, 0.1), (1, 0.2), (2, 0.3), (2, 0.4)], rtol=1e-6)


def test_momentum_is_that_of_muon():
  grads = [random_like({'w': jnp.ones((4, 3))}, seed) for seed in range(4)]
  for nesterov in (True, False):
    # One Newton-Schulz step with the polynomial x: muon minus its orthogonalisation.
    muon = optax.contrib.scale_by_muon(
      ns_coeffs=(1.0, 0.0, 0.0), ns_steps=1, nesterov=nesterov, beta=0.95,
      weight_dimension_numbers={'w': MuonDimensionNumbers()},
    )  # fmt: skip
    ours = spectral_optax.scale_by_momentum(0.95, nesterov=nesterov)
    their_state, our_state = muon.init(grads[0]), ours.init(grads[0])
    of_muon, of_ours = jax.jit(muon.update), jax.jit(ours.update)
    for grad in grads:
      theirs, their_state = of_muon(grad, their_state)
      update, our_state = of_ours(grad, our_state)
      update = update['w'] / jnp.linalg.norm(update['w'])
      np.testing.assert_allclose(update, theirs['w'], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(our_state.mu['w'], their_state.mu['w'], rtol=1e-6)


def test_whole_step_is_muons_in_the_limit():
  """α = 1, d → 0: exact Muon with consistent RMS, and AdamW for the rest."""
  params = random_like({'kernel': jnp.ones((12, 5))}) | {'bias': jnp.ones(5)}
  ours = spectral_optax.spectral_newton(0.1, 1.0, 1e-7, momentum=0.95, weight_decay=0.01)
  theirs = optax.contrib.muon(
    # Convergent coefficients make it exact; Muon's own only come within 0.3.
    0.1, ns_coeffs=(1.5, -0.5, 0.0), ns_steps=40, beta=0.95, weight_decay=0.01,
    consistent_rms=0.2,
  )  # fmt: skip
  states = [ours.init(params), theirs.init(params)]
  for seed in range(3):
    grads = random_like(params, seed)
    grads['bias'] = jnp.zeros(5)  # Muon's Adam is the Nesterov one.
    updates = []
    for i, tx in enumerate((ours, theirs)):
      update, states[i] = jax.jit(tx.update)(grads, states[i], params)
      updates.append(update)
    assert_trees_close(updates[0], updates[1], atol=2e-6, rtol=1e-4)


def test_updates_have_the_stated_size():
  params, grads = mixed_params(), random_like(mixed_params())
  tx = spectral_optax.spectral_newton(0.5, update_rms=0.3, rms_of='matrix')
  state, update = tx.init(params), jax.jit(tx.update)
  for scale in (1e-12, 1.0, 1e12):
    updates, _ = update(jax.tree.map(lambda g: g * scale, grads), state, params)  # noqa: B023
    for path in ('Conv_0', 'Dense_0', 'Dense_1', 'head'):
      rms = jnp.sqrt(jnp.mean(updates[path]['kernel'] ** 2))
      np.testing.assert_allclose(rms, 0.5 * 0.3, rtol=1e-5)
    each = jnp.sqrt(jnp.mean(updates['layers']['kernel'] ** 2, axis=(1, 2)))
    np.testing.assert_allclose(each, np.full(3, 0.15), rtol=1e-5)


def of_outputs(update: np.ndarray, rms: float, rows: tuple[int, ...], columns: tuple[int, ...]):
  """The formula of `scale_to_rms`, for outputs."""
  mean = lambda axes: np.mean(np.square(update), axis=axes, keepdims=True)
  h = 0.3
  return rms * np.sqrt((1 + h**2) / (mean(rows) + h**2 * mean((*rows, *columns)))) * update


def test_every_output_has_the_stated_size():
  """Columns of a kernel, of a stack's and of a convolution's."""
  params, grads = mixed_params(), random_like(mixed_params())
  how = {'momentum': 0.0, 'damping': 'constant', 'solver': 'gram'}
  plain = spectral_optax.scale_by_spectral_newton(**how, update_rms=None)
  raw, _ = jax.jit(plain.update)(grads, plain.init(params), params)
  axes = {
    'Conv_0': ((0, 1, 2), (3,)),
    'layers': ((1,), (2,)),
    'Dense_0': ((0,), (1,)),
    'head': ((0,), (1,)),
  }
  tx = spectral_optax.spectral_newton(-0.5, update_rms=0.3, rms_of='output', **how)
  state, update = tx.init(params), jax.jit(tx.update)
  for scale in (1e-12, 1.0, 1e12):
    updates, _ = update(jax.tree.map(lambda g: g * scale, grads), state, params)  # noqa: B023
    for name, (rows, columns) in axes.items():
      exact = of_outputs(np.float64(raw[name]['kernel']), 0.15, rows, columns)
      np.testing.assert_allclose(updates[name]['kernel'], exact, rtol=2e-4, atol=2e-5)
      # Not as where the matrix has that size.
      matrix = np.sqrt(np.mean(np.square(raw[name]['kernel']), (*rows, *columns), keepdims=True))
      assert np.abs(exact - 0.15 * raw[name]['kernel'] / matrix).max() > 1e-3


@pytest.mark.parametrize(
  ('rms_of', 'of_matrix'),
  [
    ('layer_type', ['Conv_0']),
    ('wide', ['Conv_0', 'layers', 'Dense_0', 'Dense_1', 'Dense_2', 'head', 'wide_conv',
              'block/mlp/down', 'block/attn/query']),
    ({'': 'output', 'Dense_0': 'matrix', 'layers': 'layer_type'}, ['Dense_0']),
    (lambda params: {name: 'matrix' for name in params if name != 'Conv_0'} | {'Conv_0': 'output'},
     ['layers', 'Dense_0', 'Dense_1', 'head']),
  ],
)  # fmt: skip
def test_what_has_a_size_may_differ_between_layers(rms_of, of_matrix):
  """Also of layers whose matrices are of one shape, and are solved as one batch."""
  params = mixed_params()
  params['Dense_2'] = params['Dense_0']
  if rms_of == 'wide':  # Convolutions and plain dense layers are whole even so.
    wider = {'wide_conv': (2, 2, 1, 6), 'lm_head': (4, 7), 'block/attn/query': (4, 4)}
    wider |= {'block/mlp/up': (4, 6), 'block/mlp/down': (6, 4)}
    params |= {name: {'kernel': jnp.ones(shape)} for name, shape in wider.items()}
  if callable(rms_of):
    of_matrix = [*of_matrix, 'Dense_2']
  grads = random_like(params)
  how = {'momentum': 0.0, 'damping': 'constant', 'solver': 'gram'}
  found = {}
  for each in ('matrix', 'output', rms_of):
    tx = spectral_optax.spectral_newton(-1.0, rms_of=each, **how)
    own, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    if isinstance(each, str):
      found[each] = own
  for name in params.keys() - {'scale'}:
    as_said, other = ('matrix', 'output') if name in of_matrix else ('output', 'matrix')
    kernel = own[name]['kernel']
    np.testing.assert_allclose(kernel, found[as_said][name]['kernel'], rtol=1e-4, atol=1e-6)
    assert np.abs(kernel - found[other][name]['kernel']).max() > 1e-3, name
  # The transformations beneath it read the words themselves.
  kernels = {name: {'kernel': grads[name]['kernel']} for name in params if name != 'scale'}
  to_size = lambda rms_of: jax.jit(spectral_optax.scale_to_rms(rms_of=rms_of).update)
  scaled, _ = to_size(rms_of)(kernels, optax.EmptyState())
  one = {each: to_size(each)(kernels, optax.EmptyState())[0] for each in ('matrix', 'output')}
  for name in kernels:
    each = 'matrix' if name in of_matrix else 'output'
    np.testing.assert_array_equal(scaled[name]['kernel'], one[each][name]['kernel'])


def test_the_type_of_a_layer_shows_in_the_whole_tree():
  """Without its biases a stack of dense layers has the shape of a convolution."""
  params = {'up': {'kernel': jnp.ones((3, 5, 4)), 'bias': jnp.ones((3, 4))}}
  grads, found = random_like(params), {}
  for rms_of in ('matrix', 'output', 'layer_type'):
    tx = spectral_optax.spectral_newton(-1.0, damping='constant', rms_of=rms_of)
    found[rms_of] = jax.jit(tx.update)(grads, tx.init(params), params)[0]['up']['kernel']
  np.testing.assert_array_equal(found['layer_type'], found['output'])
  assert np.abs(found['layer_type'] - found['matrix']).max() > 1e-2


@pytest.mark.parametrize(
  ('rms_of', 'message'),
  [
    ({'head': 'output'}, r"no value for the matrix 'Conv_0/kernel' with shape \(3, 3, 2, 6\)"),
    ({'': 'matrix', 'head': 'row'}, r"of 'head/kernel' with shape \(4, 3\) must be one of"),
    ({'': 'matrix', 'tail': 'output'}, "no parameter"),
    (None, "no value for the matrix"),
  ],
)  # fmt: skip
def test_a_size_that_does_not_fit_the_parameters(rms_of, message):
  params = mixed_params()
  for tx in (
    spectral_optax.spectral_newton(0.1, rms_of=rms_of),
    spectral_optax.scale_by_spectral_newton(rms_of=rms_of),
  ):
    with pytest.raises(ValueError, match=message):
      tx.init(params)


def test_an_output_that_dies_away_is_held_back():
  """Equal outputs have the size that is asked for; much smaller ones less, as much as they are."""
  u = {'kernel': np.float32(np.random.default_rng(0).choice([-1.0, 1.0], (50, 6)))}
  tx = spectral_optax.scale_to_rms(0.2, rms_of='output')
  update = jax.jit(tx.update)
  updates, _ = update(u, tx.init(u))
  np.testing.assert_allclose(updates['kernel'], 0.2 * u['kernel'], rtol=1e-6)
  u['kernel'][:, 1] *= 1e-3
  u['kernel'][:, 2] = 0
  updates, _ = update(u, tx.init(u))
  rms = np.sqrt(np.mean(np.square(updates['kernel']), axis=0))
  # Of four equal ones out of six, r² = 4/6: √(1.09 / (1 + .09 · 4/6)), and 1e-3 √(1.09 / .06).
  np.testing.assert_allclose(rms[[0, 3, 4, 5]], 0.2 * np.sqrt(1.09 / 1.06), rtol=1e-5)
  np.testing.assert_allclose(rms[1], 0.2e-3 * np.sqrt(1.09 / 0.06), rtol=1e-4)
  assert rms[2] == 0
  nothing, _ = tx.update({'kernel': jnp.zeros((3, 2))}, tx.init(u))
  np.testing.assert_array_equal(nothing['kernel'], np.zeros((3, 2)))


@pytest.mark.parametrize(
  'build',
  [
    functools.partial(spectral_optax.spectral_newton, 0.1),
    spectral_optax.scale_by_spectral_newton,
    spectral_optax.scale_by_spectral_transfer,
    spectral_optax.scale_to_rms,
  ],
)
def test_unknown_owner_of_the_size(build):
  words = "rms_of must be one of 'matrix', 'output', 'wide', 'layer_type', got 'column'"
  with pytest.raises(ValueError, match=words):
    build(rms_of='column')


def test_without_update_size_the_transfer_is_left_alone():
  grads = random_like({'kernel': jnp.ones((6, 4))})
  tx = spectral_optax.scale_by_spectral_newton(2.0, 0.1, momentum=0.0, update_rms=None)
  updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
  np.testing.assert_allclose(
    updates['kernel'], reference.update(grads['kernel'], 2, 0.1), atol=1e-5
  )


def test_the_rest_is_adamw():
  params, grads = mixed_params(), random_like(mixed_params())
  tx = spectral_optax.spectral_newton(0.1, adam_learning_rate=0.3, adam_b1=0.8)
  adam = optax.adamw(0.3, b1=0.8, weight_decay=0.0)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  expected, _ = jax.jit(adam.update)(grads, adam.init(params), params)
  for name in ('Conv_0', 'layers', 'Dense_0', 'head'):
    assert_trees_close(updates[name]['bias'], expected[name]['bias'])
  assert_trees_close(updates['scale'], expected['scale'])


def test_weight_decay_is_decoupled_and_masked():
  params, grads = mixed_params(), random_like(mixed_params())
  mask = {'Conv_0': True, 'layers': True, 'Dense_0': False, 'Dense_1': True, 'head': False,
          'scale': True}  # fmt: skip
  for given in (mask, lambda _: mask):
    make = functools.partial(spectral_optax.spectral_newton, 0.1, weight_decay_mask=given)
    with_decay, without = make(weight_decay=0.5), make(weight_decay=0.0)
    a, _ = jax.jit(with_decay.update)(grads, with_decay.init(params), params)
    b, _ = jax.jit(without.update)(grads, without.init(params), params)
    shrink = jax.tree.map(jnp.subtract, a, b)
    for name in ('Conv_0', 'Dense_1', 'layers'):
      np.testing.assert_allclose(
        shrink[name]['kernel'], -0.1 * 0.5 * params[name]['kernel'], atol=1e-6
      )
    for name in ('Dense_0', 'head'):
      np.testing.assert_array_equal(shrink[name]['kernel'], 0 * params[name]['kernel'])
    np.testing.assert_array_equal(shrink['Conv_0']['bias'], 0 * params['Conv_0']['bias'])


def test_own_dimension_numbers():
  params = {'a': jnp.ones((2, 3, 4)), 'b': jnp.ones((3, 4)), 'c': jnp.ones((3, 4))}
  grads = random_like(params)
  numbers = {
    'a': MuonDimensionNumbers(reduction_axis=(2,), output_axis=(0, 1)),
    'b': None,
    'c': MuonDimensionNumbers(),
  }
  for given in (numbers, lambda _: numbers):
    tx = spectral_optax.spectral_newton(
      -1.0, 2.0, 0.1, momentum=0.0, update_rms=None, weight_dimension_numbers=given
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    exact = reference.update(np.moveaxis(grads['a'], 2, 0).reshape(4, 6), 2, 0.1)
    np.testing.assert_allclose(np.moveaxis(updates['a'], 2, 0).reshape(4, 6), exact, atol=1e-5)
    assert set(optax.tree.get(state, 'sigma_max')) == {'a', 'c'}
    adam = optax.adamw(-1.0, weight_decay=0.0)
    expected, _ = jax.jit(adam.update)(grads, adam.init(params), params)
    np.testing.assert_allclose(updates['b'], expected['b'], rtol=1e-5)


def test_same_shapes_are_one_batch():
  """Eight matrices of two shapes (one of them both ways round) compile to two calls."""
  params = {f'layer_{i}': {'kernel': jnp.ones((8, 4))} for i in range(3)}
  params |= {f'wide_{i}': {'kernel': jnp.ones((4, 8))} for i in range(3)}
  params |= {f'square_{i}': {'kernel': jnp.ones((5, 5))} for i in range(2)}
  tx = spectral_optax.scale_by_spectral_transfer(2.0, 0.1, solver='cholesky')
  jaxpr = str(jax.make_jaxpr(tx.update)(params, tx.init(params)))
  assert jaxpr.count('custom_linear_solve') == 2


@pytest.mark.parametrize('solver', ['auto', 'gram'])
def test_large_parameters_alone_give_what_a_stack_gives(solver, monkeypatch):
  """Both ways round, square, stacked, and of sides that are joined: order and size too."""
  shapes = {'wide': (4, 9), 'tall': (9, 4), 'b': (9, 4), 'square': (4, 4), 'stack': (2, 5, 6)}
  params = {name: {'kernel': jnp.ones(shape)} for name, shape in shapes.items()}
  params['stack']['bias'] = jnp.ones((2, 6))
  grads = random_like(params)
  found = []
  for alone in (transform.ALONE, 1):
    monkeypatch.setattr(transform, 'ALONE', alone)
    tx = spectral_optax.scale_by_spectral_newton(1.5, momentum=0.0, solver=solver)
    found.append(jax.jit(tx.update)(grads, tx.init(params)))
  assert_trees_close(*found, rtol=1e-4, atol=1e-5)
  for name, state in found[0][1][1]._asdict().items():
    if name not in ('count', 'measurement', 'fits'):
      assert set(state) == {f'{path}/kernel' for path in shapes}
      assert state['stack/kernel'].shape[:1] == (2,)
  exact = reference.update(grads['tall']['kernel'], 1.5, 0.06**1.5)
  got = found[0][0]['tall']['kernel']
  scaled = exact * (0.2 / np.sqrt(np.mean(exact**2)))
  assert reference.relative_error(got, scaled) <= 0.2  # Within the tolerance, and rescaled.


def test_statistics_are_of_the_right_matrix_where_some_alphas_are_traced():
  """Known and traced exponents are computed apart, and kept together."""
  params = {name: {'kernel': jnp.ones((6, 4))} for name in 'abcd'}
  grads = random_like(params)
  grads['b']['kernel'] *= 10
  alphas = {'a': 1.25, 'b': jnp.array(1.5), 'c': 1.75, 'd': jnp.array(2.0)}
  tx = spectral_optax.scale_by_spectral_transfer(alphas, 0.1)
  state, update = tx.init(params), jax.jit(tx.update)
  for _ in range(20):
    _, state = update(grads, state)
  for name in 'abcd':
    _, sigma, vt = np.linalg.svd(np.float64(grads[name]['kernel']))
    np.testing.assert_allclose(state.sigma_max[f'{name}/kernel'], sigma[0], rtol=0.02)
    assert abs(vt[0] @ np.float64(state.basis[f'{name}/kernel'][:, 0])) > 0.9
    assert state.alpha[f'{name}/kernel'] == np.float32(alphas[name])


@pytest.mark.parametrize('rms_of', ['output', 'matrix'])
def test_update_size_inside_the_transfer_is_that_after_it(rms_of):
  params = mixed_params()
  grads = random_like(params)
  inside = spectral_optax.scale_by_spectral_transfer(1.5, 0.1, update_rms=0.3, rms_of=rms_of)
  after = optax.chain(
    spectral_optax.scale_by_spectral_transfer(1.5, 0.1),
    spectral_optax.scale_to_rms(0.3, rms_of=rms_of),
  )
  (a, _), (b, _) = (jax.jit(tx.update)(grads, tx.init(params)) for tx in (inside, after))
  assert_trees_close(a, b, rtol=1e-5, atol=1e-6)
  rms = np.sqrt(np.mean(np.square(a['head']['kernel'])))
  if rms_of == 'matrix':
    np.testing.assert_allclose(rms, 0.3, rtol=1e-5)
  else:  # What holds outputs back is concave: never more.
    assert rms < 0.3


@pytest.mark.parametrize('scale', [1e-25, 1.0, 1e25])
def test_one_matrix_out_of_range_is_no_trouble_to_the_others(scale):
  params = {n: {'kernel': jnp.ones((6, 4))} for n in 'abc'} | {'d': {'kernel': jnp.ones((9, 5))}}
  grads = random_like(params)
  tx = spectral_optax.scale_by_spectral_transfer(2.0, 0.1, solver='rational')
  update = jax.jit(tx.update)
  expected, _ = update(grads, tx.init(params))
  grads['b']['kernel'] *= scale
  updates, state = update(grads, tx.init(params))
  assert_trees_close(updates, expected, rtol=1e-4, atol=1e-5)
  sigma = np.linalg.norm(np.float64(grads['b']['kernel']), 2)
  assert 0.5 * sigma < state.sigma_max['b/kernel'] <= 1.0001 * sigma
  grads['b']['kernel'] *= jnp.nan
  updates, state = update(grads, tx.init(params))
  assert np.isnan(updates['b']['kernel']).all()
  assert np.isnan(state.sigma_max['b/kernel'])
  del updates['b'], expected['b']
  assert_trees_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_preconditioner_before_and_normalisation_after():
  """A SOAP-like basis before the transfer, NorMuon-like rows after it."""
  params = {'kernel': jax.random.normal(jax.random.key(0), (6, 4))}
  basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (6, 6)))[0]
  rotate = optax.stateless(lambda u, _: jax.tree.map(lambda x: basis.T @ x, u))
  rows = optax.stateless(
    lambda u, _: jax.tree.map(lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True), u)
  )
  tx = optax.chain(
    spectral_optax.scale_by_momentum(0.0),
    rotate,
    spectral_optax.scale_by_spectral_transfer(1.5, 0.1, solver='gram'),
    rows,
    spectral_optax.scale_to_rms(0.2),
    optax.scale_by_learning_rate(1.0),
  )
  grads = random_like(params)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  exact = reference.update(np.asarray(basis.T @ grads['kernel']), 1.5, 0.1)
  exact /= np.linalg.norm(exact, axis=1, keepdims=True)
  exact *= -0.2 * np.sqrt(24) / np.linalg.norm(exact)
  np.testing.assert_allclose(updates['kernel'], exact, atol=2e-5)


# ---------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------


def test_state_says_what_is_known_of_the_spectrum():
  params, grads = mixed_params(), random_like(mixed_params())
  tx = spectral_optax.spectral_newton(0.1, damping='constant', momentum=0.0)
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(15):
    _, state = update(grads, state, params)
  get = functools.partial(optax.tree.get, state)
  sigma = np.linalg.svd(np.float64(grads['Conv_0']['kernel']).reshape(18, 6), compute_uv=False)
  np.testing.assert_allclose(get('sigma_max')['Conv_0/kernel'], sigma[0], rtol=0.01)
  ratio = np.sum(sigma**2) ** 2 / np.sum(sigma**4)
  np.testing.assert_allclose(get('participation_ratio')['Conv_0/kernel'], ratio, rtol=1e-5)
  assert get('sigma_max')['layers/kernel'].shape == (3,)
  stacked = np.linalg.svd(np.float64(grads['layers']['kernel']), compute_uv=False)
  np.testing.assert_allclose(get('sigma_max')['layers/kernel'], stacked[:, 0], rtol=0.02)
  assert get('alpha')['Conv_0/kernel'] == 2.0
  assert get('damping')['head/kernel'] == np.float32(0.008)


def test_statistics_by_path_are_a_mapping_and_one_array():
  params = mixed_params()
  tx = spectral_optax.scale_by_spectral_transfer(jnp.array(2.0), 0.1)
  state = jax.jit(tx.update)(random_like(params), tx.init(params))[1]
  assert len(jax.tree.leaves(state)) == len(state) - 2  # Nothing is measured, no fit is kept.
  sigma = state.sigma_max
  assert dict(sigma).keys() == sigma.keys() == state.basis.keys()
  assert len(sigma) == 5
  assert state.basis['layers/kernel'].shape[0] == 3
  norms = np.linalg.norm(state.basis['layers/kernel'], axis=1)
  np.testing.assert_allclose(norms, np.ones((3, 1)), rtol=1e-5)
  with pytest.raises(KeyError, match='no/kernel'):
    sigma['no/kernel']
  flags = jax.tree.map(lambda _: True, state)
  assert flags == jax.tree.map(lambda _: True, state)
  assert flags != jax.tree.map(lambda _: False, state)
  # Under a vmap its axis comes first.
  seeds = jax.vmap(lambda a: spectral_optax.scale_by_spectral_transfer(a, 0.1).init(params))(
    jnp.array([1.0, 2.0])
  )
  np.testing.assert_array_equal(seeds.alpha['layers/kernel'], [[1.0] * 3, [2.0] * 3])


def test_bad_gradients_reach_the_update_and_leave_the_state():
  params, grads = mixed_params(), random_like(mixed_params())
  tx = spectral_optax.scale_by_spectral_newton()
  update = jax.jit(tx.update)
  _, before = update(grads, tx.init(params))
  bad = jax.tree.map(lambda g: g, grads)
  bad['Dense_0']['kernel'] = bad['Dense_0']['kernel'].at[1, 2].set(jnp.nan)
  bad['layers']['kernel'] = bad['layers']['kernel'].at[1, 0, 0].set(jnp.inf)
  bad['head']['bias'] = bad['head']['bias'].at[0].set(jnp.inf)
  updates, state = update(bad, before)
  assert np.isnan(updates['Dense_0']['kernel']).all()
  assert np.isnan(updates['layers']['kernel'][1]).all()
  assert np.isfinite(updates['layers']['kernel'][0]).all()
  assert not np.isfinite(updates['head']['bias'][0])
  assert np.isnan(state[1].sigma_max['Dense_0/kernel'])
  updates, state = update(grads, state)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))


def test_apply_if_finite_sees_bad_gradients():
  params, grads = mixed_params(), random_like(mixed_params())
  tx = optax.apply_if_finite(spectral_optax.spectral_newton(0.1), 3)
  state = tx.init(params)
  _, state = jax.jit(tx.update)(grads, state, params)
  bad = jax.tree.map(lambda g: g, grads)
  bad['Dense_0']['kernel'] = bad['Dense_0']['kernel'].at[1, 2].set(jnp.nan)
  updates, after = jax.jit(tx.update)(bad, state, params)
  assert not after.last_finite
  assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
  assert_trees_close(after.inner_state, state.inner_state, rtol=0, atol=0)


@pytest.mark.parametrize('mu_dtype', [None, jnp.bfloat16])
@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_state_is_stable_in_shape_and_dtype(dtype, mu_dtype):
  with jax.enable_x64(dtype == jnp.float64):
    params = mixed_params(dtype)
    tx = spectral_optax.spectral_newton(0.1, optax.linear_schedule(1.0, 2.0, 10), mu_dtype=mu_dtype)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(random_like(params), state, params)
    assert avals(after) == avals(state)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    expected = mu_dtype or dtype
    assert optax.tree.get(after, 'mu', filtering=_in_momentum)['head']['kernel'].dtype == expected
    assert optax.tree.get(after, 'sigma_max')['head/kernel'].dtype == (
      jnp.float64 if dtype == jnp.float64 else jnp.float32
    )
    # Both branches of a cond must agree, so nothing drifts on the way.
    jax.lax.cond(True, lambda: after, lambda: state)


def _in_momentum(path, _):
  return any(getattr(k, 'tuple_name', None) == 'MomentumState' for k in path)


@pytest.mark.parametrize('mode', ['auto', 'explicit'])
def test_state_is_stable_in_sharding(mode):
  axis_type = {'auto': jax.sharding.AxisType.Auto, 'explicit': jax.sharding.AxisType.Explicit}
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(axis_type[mode],) * 2)
  spec = jax.sharding.PartitionSpec
  specs = {
    'a': {'kernel': spec('x', 'y'), 'bias': spec('y')},
    'b': {'kernel': spec(None, 'y'), 'bias': spec()},
    'c': {'kernel': spec('x', None), 'bias': spec()},
    'Conv_0': {'kernel': spec(None, None, 'x', 'y'), 'bias': spec('y')},
  }
  plain = {
    'a': {'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)},
    'b': {'kernel': jnp.ones((8, 4)), 'bias': jnp.ones(4)},
    'c': {'kernel': jnp.ones((4, 8)), 'bias': jnp.ones(8)},
    'Conv_0': {'kernel': jnp.ones((3, 3, 4, 6)), 'bias': jnp.ones(6)},
  }
  plain_grads = random_like(plain)
  tx = spectral_optax.spectral_newton(0.1)
  expected, _ = jax.jit(tx.update)(plain_grads, tx.init(plain), plain)
  with jax.set_mesh(mesh):
    place = lambda tree: jax.tree.map(
      lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s)), tree, specs
    )
    params, grads = place(plain), place(plain_grads)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    updates, after = update(grads, state, params)
    _, after = update(grads, after, params)
    if mode == 'explicit':
      types = lambda tree: jax.tree.map(jax.typeof, tree)
      assert types(after) == types(state)
      assert types(updates) == types(params)
  assert_trees_close(jax.device_get(updates), expected, atol=2e-6)


def test_init_on_shapes():
  params = mixed_params()
  tx = spectral_optax.spectral_newton(0.1)
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
  assert avals(tx.init(shapes)) == avals(tx.init(params))
  assert jax.tree.map(jnp.shape, jax.eval_shape(tx.init, params)) == jax.tree.map(
    jnp.shape, tx.init(params)
  )


@pytest.mark.parametrize(
  'tx',
  [
    spectral_optax.spectral_newton(0.1),
    spectral_optax.spectral_newton(0.1, weight_dimension_numbers={'w': MuonDimensionNumbers()}),
    spectral_optax.spectral_newton(0.1, {'w': 1.3, 'b': 1.0}, mu_dtype=jnp.bfloat16),
    spectral_optax.scale_by_spectral_newton(1.3),
  ],
  ids=['inferred', 'own numbers', 'own alphas', 'without Adam'],
)
def test_map_params(tx):
  params = {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)}
  state = tx.init(params)
  # The momentum is seen as parameters, the spectra are not.
  marked = optax.tree.map_params(tx, lambda x: x + 1, state)
  assert jax.tree.structure(marked) == jax.tree.structure(state)
  for name in ('alpha', 'damping', 'sigma_max', 'basis', 'participation_ratio', 'transfer_error'):
    assert_trees_close(optax.tree.get(marked, name), optax.tree.get(state, name))
  moved = optax.tree.get(marked, 'mu', filtering=_in_momentum)
  assert all((np.asarray(x) == 1).all() for x in jax.tree.leaves(moved))


def test_map_params_with_shardings_of_the_parameters():
  params = mixed_params()
  tx = spectral_optax.spectral_newton(0.1)
  ranks = jax.tree.map(jnp.ndim, params)

  def check(x, rank):
    # `partition` leaves a hole where the other half's parameters are.
    assert isinstance(x, optax.MaskedNode) or x.ndim == rank
    return x

  optax.tree.map_params(
    tx, check, tx.init(params), ranks, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )


# ---------------------------------------------------------------------------------
# Where it is used
# ---------------------------------------------------------------------------------


def test_unexpected_extra_args_and_no_recompilation():
  params, grads = mixed_params(), random_like(mixed_params())
  tx = spectral_optax.spectral_newton(0.1)
  traces = []

  @functools.partial(jax.jit, donate_argnums=(1, 2))
  def step(grads, state, params):
    traces.append(1)
    updates, state = tx.update(grads, state, params, not_expected=1, value=2.0)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  for _ in range(3):
    params, state = step(grads, state, params)
  assert len(traces) == 1
  assert step._cache_size() == 1


def quadratic(params):
  return sum(jnp.sum((p - 1) ** 2) for p in jax.tree.leaves(params))


def run(tx, params, steps):
  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(quadratic)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  return jax.lax.scan(step, (params, tx.init(params)), length=steps)


def test_inside_scan_vmap_over_seeds_and_hyperparameters():
  params = {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}

  def final(learning_rate, alpha, damping, seed):
    noise = jax.random.normal(jax.random.key(seed), (4, 3))
    start = {'kernel': params['kernel'] + noise, 'bias': params['bias']}
    tx = spectral_optax.spectral_newton(learning_rate, alpha, damping, solver='gram')
    return run(tx, start, 30)[1][-1]

  values = [(0.1, 2.0, 0.1, 0), (0.3, 1.3, 0.02, 1), (0.1, 0.5, 0.3, 2)]
  mapped = jax.jit(jax.vmap(final))(*map(jnp.array, zip(*values, strict=True)))
  for got, v in zip(mapped, values, strict=True):
    np.testing.assert_allclose(got, final(*v), rtol=1e-3)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
    lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    lambda tx: optax.apply_if_finite(tx, 2),
  ],
  ids=['chain', 'MultiSteps', 'masked', 'apply_if_finite'],
)
def test_wrappers(wrap):
  params = mixed_params()
  tx = wrap(spectral_optax.spectral_newton(0.2))
  (_, state), values = jax.jit(lambda p: run(tx, p, 80))(params)
  assert values[-1] < 0.3 * values[0]
  assert len(optax.tree.get(state, 'sigma_max')) == 5


def test_masked_parameters_are_left_alone():
  params, grads = mixed_params(), random_like(mixed_params())
  mask = {'Conv_0': True, 'layers': False, 'Dense_0': True, 'Dense_1': True, 'head': False,
          'scale': False}  # fmt: skip
  tx = optax.masked(spectral_optax.spectral_newton(0.1, {'Conv_0': 2.0, 'layers': 1.0,
                    'Dense_0': 1.3, 'Dense_1': 1.3, 'head': 1.0}), mask)  # fmt: skip
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  assert set(optax.tree.get(state, 'alpha')) == {
    'Conv_0/kernel', 'Dense_0/kernel', 'Dense_1/kernel'}  # fmt: skip
  assert_trees_close(updates['layers'], grads['layers'], rtol=0, atol=0)
  whole = spectral_optax.spectral_newton(0.1, 1.3)
  expected, _ = jax.jit(whole.update)(grads, whole.init(params), params)
  assert_trees_close(updates['Dense_0'], expected['Dense_0'])


def test_inject_hyperparams():
  params, grads = mixed_params(), random_like(mixed_params())
  injected = optax.inject_hyperparams(spectral_optax.spectral_newton)(
    learning_rate=0.1, alpha=1.3, damping=0.2, solver='gram'
  )
  plain = spectral_optax.spectral_newton(0.1, 1.3, 0.2, solver='gram')
  state = jax.jit(injected.init)(params)
  traces = []

  @jax.jit
  def update(*args):
    traces.append(1)
    return injected.update(*args)

  updates, state = update(grads, state, params)
  expected, inner = jax.jit(plain.update)(grads, plain.init(params), params)
  assert_trees_close(updates, expected, rtol=1e-4, atol=1e-5)
  assert_trees_close(state.inner_state, inner, rtol=1e-4, atol=1e-5)
  # A new value is used without compiling again.
  state.hyperparams['damping'] = jnp.float32(0.5)
  _, state = update(grads, state, params)
  assert len(traces) == 1
  np.testing.assert_allclose(
    optax.tree.get(state, 'damping', filtering=_is_by_path)['head/kernel'], 0.5
  )


def _is_by_path(_, value):
  return isinstance(value, layout.ByPath)


def test_inject_hyperparams_with_a_schedule_and_a_rule():
  params, grads = mixed_params(), random_like(mixed_params())
  injected = optax.inject_hyperparams(spectral_optax.spectral_newton, static_args=('alpha',))(
    learning_rate=optax.linear_schedule(0.1, 0.0, 10),
    alpha=lambda p: jax.tree.map(lambda _: 1.3, p),
  )
  state = injected.init(params)
  _, state = jax.jit(injected.update)(grads, state, params)
  assert state.hyperparams['learning_rate'] == np.float32(0.1)
  np.testing.assert_allclose(optax.tree.get(state, 'alpha')['head/kernel'], 1.3)


def parabola():
  target = jnp.array([1.0, -1.0, 1.0])
  return jnp.array([-1.0, 10.0, 1.0]), target, lambda p: jnp.sum((p - target) ** 2)


def rosenbrock():
  f = lambda p: (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2
  return jnp.zeros(2), jnp.ones(2), f


def matrix_parabola():
  target = jnp.array([[3.0, -2.0], [1.0, 4.0]])
  return jnp.zeros((2, 2)), target, lambda p: jnp.sum((p - target) ** 2)


def mixed_target():
  target = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
  start = jax.tree.map(jnp.zeros_like, target)
  return start, target, lambda p: sum(jnp.sum((a - b) ** 2) for a, b in zip(p, target, strict=True))


@pytest.mark.parametrize('solver', ['auto', 'svd', 'gram'])
@pytest.mark.parametrize('problem', [parabola, rosenbrock, matrix_parabola, mixed_target])
def test_converges_on_optax_targets(problem, solver):
  start, target, f = problem()
  tx = spectral_optax.spectral_newton(1e-2, solver=solver)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(f)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  state = tx.init(start)
  (end, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=6000))((start, state))
  assert_trees_close(end, target, rtol=3e-2, atol=3e-2)


def test_learning_rate_schedule():
  params, grads = mixed_params(), random_like(mixed_params())
  with_schedule = spectral_optax.spectral_newton(optax.constant_schedule(0.1))
  with_number = spectral_optax.spectral_newton(0.1)
  a, _ = jax.jit(with_schedule.update)(grads, with_schedule.init(params), params)
  b, _ = jax.jit(with_number.update)(grads, with_number.init(params), params)
  assert_trees_close(a, b)


# ---------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'alpha': -0.5}, 'alpha.*-0.5'),
    ({'damping': -1e-3}, 'damping.*-0.001'),
    ({'solver': 'lu'}, 'solver must be.*lu'),
    ({'normalize': 'l2'}, 'normalize must be.*l2'),
    ({'momentum': 1.0}, 'momentum must be.*1.0'),
    ({'alpha': 1.5, 'solver': 'cholesky'}, 'alpha = 2 alone'),
    ({'alpha': jnp.array(2.0), 'solver': 'cholesky'}, 'known\nwhile tracing|known while tracing'),
  ],
)
@pytest.mark.parametrize('which', ['spectral_newton', 'scale_by_spectral_newton'])
def test_errors_at_construction(which, arguments, message):
  make = getattr(spectral_optax, which)
  make = functools.partial(make, 0.1) if which == 'spectral_newton' else make
  with pytest.raises(ValueError, match=message):
    make(**arguments)


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    ({'alpha': {'Conv_0': -1.0, '': 1.0}}, ValueError, r"Conv_0/kernel.*\(3, 3, 2, 6\)"),
    ({'alpha': {'': 1.0}, 'damping': {'': 0.1, 'head/kernel': -2.0}}, ValueError,
     r"-2.0 for 'head/kernel' with shape \(4, 3\)"),
    ({'alpha': {'': 2.0, 'Conf_0': 1.0}}, ValueError, "alpha.*entry at 'Conf_0'"),
    ({'alpha': {'Conv_0': 2.0}}, ValueError,
     r"alpha has no value for the matrix 'Dense_0/kernel' with shape \(4, 5\)"),
    ({'alpha': {'': 2.0, 'layers/kernel': np.ones(4)}}, ValueError,
     r"alpha of 'layers/kernel'.*\(3, 5, 4\) has shape \(4,\).*\(3,\) matrices"),
    ({'alpha': {'': 2.0, 'head': 'big'}}, ValueError, "alpha of 'head/kernel'.*'big'"),
    ({'alpha': 'by_type'}, ValueError, "'by_type'"),
    ({'alpha': lambda p: p['no such layer']}, ValueError, 'neither a rule.*nor a schedule'),
    ({'solver': 'cholesky'}, ValueError, r"got alpha = 1.5 for 'Conv_0/kernel' with shape"),
    ({'alpha': lambda count: 2.0 + 0 * count, 'solver': 'cholesky'}, ValueError,
     "alpha = 2 alone.*for 'Conv_0/kernel'"),
    ({'weight_dimension_numbers': {'Conv_0': {'kernel': MuonDimensionNumbers(4, 3)}}},
     ValueError, r"'Conv_0/kernel'.*4 is not an axis of its shape \(3, 3, 2, 6\)"),
    ({'weight_dimension_numbers': {'Dense_0': {'kernel': MuonDimensionNumbers(0, 0)}}},
     ValueError, r"'Dense_0/kernel' with shape \(4, 5\)"),
    ({'weight_dimension_numbers': {'nowhere': MuonDimensionNumbers()}}, ValueError, 'nowhere'),
  ],
)  # fmt: skip
@pytest.mark.parametrize('which', ['spectral_newton', 'scale_by_spectral_newton'])
def test_errors_at_init(which, arguments, error, message):
  make = getattr(spectral_optax, which)
  make = functools.partial(make, 0.1) if which == 'spectral_newton' else make
  tx = make(**arguments)
  with pytest.raises(error, match=message):
    tx.init(mixed_params())


def test_complex_matrices_are_refused():
  params = {'Dense_0': {'kernel': jnp.ones((3, 2), jnp.complex64)}}
  with pytest.raises(TypeError, match=r"'Dense_0/kernel' with shape \(3, 2\) has dtype complex64"):
    spectral_optax.spectral_newton(0.1, weight_dimension_numbers=MuonDimensionNumbers()).init(
      params
    )
