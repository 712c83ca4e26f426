"""Activations and errors: for every layer, `(1/B) Σ_i a_i δ_iᵀ` is the gradient that JAX gives."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from spectral_optax import layout
from spectral_optax.curvature.capturing import LayerCapture, capture_layers
from spectral_optax.curvature.flax import capture

RNGS = nnx.Rngs(0)
B = 5


def losses(model, x):
  """One for each sample, with no symmetry."""
  y = model(x)
  target = jax.random.normal(jax.random.key(7), y.shape)
  return jnp.sum((jnp.sin(y) - target) ** 2, axis=tuple(range(1, y.ndim)))


def inputs(*shape):
  return jax.random.normal(jax.random.key(1), (B, *shape))


def mean_of_nnx(model, loss, *batch):
  """The mean loss as a function of the parameters, and the parameters."""
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  copies = lambda p: jax.tree.map(lambda x: x, (p, rest))
  return lambda p: jnp.mean(loss(nnx.merge(graph, *copies(p)), *batch)), params


def mean_of_linen(model, variables, loss, *batch):
  rest = {name: value for name, value in variables.items() if name != 'params'}

  def mean(params):
    bound = model.bind({**rest, 'params': params}, mutable=list(rest))
    return jnp.mean(loss(bound, *batch))

  return mean, variables['params']


def assert_is_the_gradient(captured, mean, params, numbers=None, paths=None):
  """To rounding: that of a sum of as many products as there are rows."""
  gradients = layout.leaves_by_path(jax.jit(jax.grad(mean))(params))
  views = layout.matrix_views(params, numbers)
  assert list(captured) == [p for p in views if paths is None or p in paths]
  for path, layer in captured.items():
    view = views[path]
    expected = np.asarray(gradients[path], np.float64)
    expected = expected.transpose(view.batch_axes + view.matrix_axes)
    expected = expected.reshape(-1, view.rows, view.columns)
    got = np.asarray(layer.gradient()).reshape(expected.shape)
    a, d = (np.abs(np.asarray(x)) for x in (layer.activations, layer.errors))
    size = np.einsum('...ia,...id->...ad', a, d).reshape(expected.shape) / layer.num_samples
    assert np.abs(expected).max() > 0, path
    assert layer.activations.shape[:-2] == layer.errors.shape[:-2] == view.batch_shape
    bound = 32 * np.finfo(np.float32).eps * size.max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound, err_msg=path)


# ---------------------------------------------------------------------------------
# Every kind of layer
# ---------------------------------------------------------------------------------

CONVOLUTIONS = {
  'same': {},
  'valid': {'padding': 'VALID'},
  'strided': {'strides': (2, 3)},
  'dilated': {'kernel_dilation': (2, 1)},
  'dilated input': {'input_dilation': (1, 2), 'padding': ((1, 2), (0, 1))},
  'padded': {'padding': ((3, 0), (1, 2))},
  'circular': {'padding': 'CIRCULAR', 'strides': 2},
  'all': {'padding': ((2, 1), (0, 3)), 'strides': (2, 1), 'kernel_dilation': (1, 2)},
}


def nnx_layers():
  conv = lambda *size, **kw: nnx.Conv(3, 4, size, rngs=RNGS, **kw)
  yield 'Linear', lambda: nnx.Linear(3, 4, rngs=RNGS), (3,), (1, 3, 4)
  yield 'Linear of a sequence', lambda: nnx.Linear(3, 4, rngs=RNGS), (2, 6, 3), (12, 3, 4)
  general = lambda: nnx.LinearGeneral((3, 2), (4, 5), axis=(1, -1), rngs=RNGS)
  yield 'LinearGeneral', general, (3, 7, 2), (7, 6, 20)
  for name, options in CONVOLUTIONS.items():
    yield f'Conv {name}', lambda o=options: conv(3, 2, **o), (6, 7, 3), (None, 18, 4)
  yield 'Conv of a sequence', lambda: conv(3, padding='CAUSAL'), (6, 3), (6, 9, 4)
  yield 'Conv of a volume', lambda: conv(2, 2, 2, strides=2), (4, 3, 4, 3), (8, 24, 4)
  yield 'Conv 1x1', lambda: conv(1, 1, use_bias=False), (3, 3, 3), (9, 3, 4)
  back = lambda **kw: nnx.ConvTranspose(3, 4, (3, 2), strides=2, rngs=RNGS, **kw)
  yield 'ConvTranspose', back, (3, 4, 3), (48, 18, 4)
  yield 'ConvTranspose flipped', lambda: back(transpose_kernel=True), (3, 4, 3), (48, 18, 4)


def linen_layers():
  yield 'Dense', lambda: nn.Dense(4), (3,), (1, 3, 4)
  yield 'DenseGeneral', lambda: nn.DenseGeneral((4, 5), axis=(1, -1)), (3, 7, 2), (7, 6, 20)
  for name in ('strided', 'circular', 'all'):
    options = CONVOLUTIONS[name]
    yield f'Conv {name}', lambda o=options: nn.Conv(4, (3, 2), **o), (6, 7, 3), (None, 18, 4)
  yield 'ConvTranspose', lambda: nn.ConvTranspose(4, (3,), strides=(2,)), (6, 3), (12, 9, 4)
  yield 'remat', lambda: nn.remat(nn.Dense)(4), (3,), (1, 3, 4)


@pytest.mark.parametrize(('make', 'shape', 'sizes'), [
  pytest.param(*row, id=name) for name, *row in nnx_layers()])  # fmt: skip
def test_nnx_layer(make, shape, sizes):
  model, x = make(), inputs(*shape)
  captured = capture(model, losses, x)
  assert list(captured) == ['kernel']
  check_sizes(captured['kernel'], *sizes)
  assert_is_the_gradient(captured, *mean_of_nnx(model, losses, x))


@pytest.mark.parametrize(('make', 'shape', 'sizes'), [
  pytest.param(*row, id=name) for name, *row in linen_layers()])  # fmt: skip
def test_linen_layer(make, shape, sizes):
  model, x = make(), inputs(*shape)
  variables = jax.jit(model.init)(jax.random.key(2), x)
  captured = capture(model, losses, x, variables=variables)
  assert list(captured) == ['kernel']
  check_sizes(captured['kernel'], *sizes)
  assert_is_the_gradient(captured, *mean_of_linen(model, variables, losses, x))


def check_sizes(layer, positions, n, m):
  rows = layer.activations.shape[0]
  assert layer.activations.shape == (rows, n)
  assert layer.errors.shape == (rows, m)
  assert positions is None or rows == B * positions
  assert layer.num_samples == B


def test_dense_rows_are_the_samples():
  # Not only their sum: each row is the input and the error of one sample.
  model = nnx.Linear(3, 4, rngs=RNGS)
  x = inputs(3)
  layer = capture(model, losses, x)['kernel']
  np.testing.assert_array_equal(layer.activations, x)
  target = jax.random.normal(jax.random.key(7), (B, 4))
  z = model(x)
  error = 2 * (jnp.sin(z) - target) * jnp.cos(z)  # ∂ℓ_b/∂z_b: not divided by B.
  np.testing.assert_allclose(layer.errors, error, rtol=1e-5)


def test_patches_are_im2col_in_the_order_of_the_kernel():
  x = inputs(4, 4, 2)
  model = nnx.Conv(2, 3, (3, 3), padding='VALID', rngs=RNGS)
  layer = capture(model, losses, x)['kernel']
  # Rows: sample, then position; columns: window, then channel, as (H, W, I, O) is (HWI, O).
  np.testing.assert_array_equal(layer.activations[0], x[0, :3, :3].reshape(-1))
  np.testing.assert_array_equal(layer.activations[1], x[0, :3, 1:4].reshape(-1))
  np.testing.assert_array_equal(layer.activations[4], x[1, :3, :3].reshape(-1))
  outputs = layer.activations @ model.kernel[...].reshape(-1, 3) + model.bias[...][None]
  np.testing.assert_allclose(outputs.reshape(B, 2, 2, 3), model(x), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------


class NNXNetwork(nnx.Module):
  """Convolution, batch norm, attention, a stack scanned over, one layer used twice, a head."""

  def __init__(self):
    self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=RNGS)
    self.norm = nnx.BatchNorm(8, rngs=RNGS)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=RNGS)
    self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(RNGS.fork(split=3))
    self.blocks = nnx.List([nnx.Linear(8, 8, rngs=RNGS) for _ in range(2)])
    self.head = nnx.Linear(8, 4, rngs=RNGS)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    x = x.reshape(x.shape[0], -1, 8)
    x = x + self.attention(x)
    scan = nnx.scan(
      lambda x, layer: x + jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    x = scan(x, self.layers)
    for _ in range(2):  # Shared.
      x = jnp.tanh(self.blocks[1](nnx.remat(lambda m, x: m(x))(self.blocks[0], x)))
    return self.head(x.mean(1))


NNX_PATHS = [
  'attention/key/kernel', 'attention/out/kernel', 'attention/query/kernel',
  'attention/value/kernel', 'blocks/0/kernel', 'blocks/1/kernel', 'conv/kernel', 'head/kernel',
  'layers/kernel',
]  # fmt: skip


@pytest.mark.parametrize('train', [True, False])
def test_nnx_network(train):
  model, x = NNXNetwork(), inputs(4, 4, 1)
  model.set_attributes(use_running_average=not train)
  before = jax.tree.map(jnp.copy, nnx.state(model))
  captured = capture(model, losses, x)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
  assert list(captured) == NNX_PATHS
  assert_is_the_gradient(captured, *mean_of_nnx(model, losses, x))
  assert captured['layers/kernel'].activations.shape == (3, B * 4, 8)
  assert captured['blocks/0/kernel'].activations.shape == (2 * B * 4, 8)


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + jnp.tanh(nn.Dense(8)(x)), None


class LinenNetwork(nn.Module):
  train: bool

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=not self.train)(x)
    x = x.reshape(x.shape[0], -1, 8)
    x = x + nn.MultiHeadDotProductAttention(2)(x)
    scanned = nn.scan(
      LinenBlock, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
    )
    x, _ = scanned(name='layers')(x, None)
    x = nn.RNN(nn.SimpleCell(6))(x)
    shared = nn.Dense(6, name='shared')
    x = shared(jnp.tanh(shared(x)))
    x = nn.Dropout(0.5, deterministic=not self.train)(x)
    return nn.Dense(4)(x.mean(1))


@pytest.mark.parametrize('train', [True, False])
def test_linen_network(train):
  model, x = LinenNetwork(train), inputs(4, 4, 1)
  keys = {'params': jax.random.key(0), 'dropout': jax.random.key(1)}
  variables = jax.jit(model.init)(keys, x)
  rngs = {'dropout': jax.random.key(2)}
  captured = capture(model, losses, x, variables=variables, rngs=rngs)

  def mean(params):
    y, _ = model.apply({**variables, 'params': params}, x, rngs=rngs, mutable=['batch_stats'])
    return losses(lambda _: y, x).mean()

  assert_is_the_gradient(captured, mean, variables['params'])
  assert captured['layers/Dense_0/kernel'].errors.shape == (2, B * 4, 8)
  assert captured['SimpleCell_0/h/kernel'].errors.shape == (B * 4, 6)
  assert captured['shared/kernel'].errors.shape == (2 * B * 4, 6)


def test_errors_in_training_mode_are_of_all_samples_losses():
  # With batch statistics a sample's activation moves the others' losses too.
  model = nnx.Sequential(nnx.Linear(3, 4, rngs=RNGS), nnx.BatchNorm(4, rngs=RNGS))
  x = inputs(3)
  z = model.layers[0](x)
  for train in (True, False):
    model.set_attributes(use_running_average=not train)
    layer = capture(model, losses, x)['layers/0/kernel']
    own = jax.jacobian(lambda z: losses(nnx.clone(model.layers[1]), z))(z)
    np.testing.assert_allclose(layer.errors, own.sum(0), rtol=2e-4, atol=1e-5)
    alone = jnp.diagonal(own).T  # `own` is (loss, sample, output).
    assert (np.abs(layer.errors - alone).max() > 0.01) == train


def test_under_jit_and_with_a_mean_loss():
  model, x = NNXNetwork(), inputs(4, 4, 1)
  model.eval()
  labels = jnp.arange(B) % 4
  loss = lambda m, x, y: optax.softmax_cross_entropy_with_integer_labels(m(x), y)
  expected = capture(model, loss, x, labels)

  @nnx.jit
  def jitted(model, x, labels):
    return capture(model, lambda *args: loss(*args).mean(), x, labels)

  got = jitted(model, x, labels)
  assert list(got) == list(expected)
  for path, layer in got.items():
    assert isinstance(layer, LayerCapture)
    assert layer.num_samples == B
    np.testing.assert_allclose(layer.errors, expected[path].errors, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.activations, expected[path].activations, rtol=1e-4, atol=1e-5)


def test_any_framework():
  model = eqx.nn.Sequential(
    [
      eqx.nn.Conv2d(1, 4, 3, stride=2, padding=1, key=jax.random.key(0)),
      eqx.nn.Lambda(lambda x: jax.nn.relu(x).reshape(-1)),
      eqx.nn.Linear(16, 3, key=jax.random.key(1)),
    ]
  )
  params, static = eqx.partition(model, eqx.is_inexact_array)
  x = inputs(1, 4, 4)
  loss_fn = lambda p: losses(jax.vmap(eqx.combine(p, static)), x)
  captured = capture_layers(loss_fn, params)
  assert list(captured) == ['layers/0/weight', 'layers/2/weight']
  assert_is_the_gradient(captured, lambda p: loss_fn(p).mean(), params)


def test_axes_in_any_order_and_either_side_of_the_product():
  params = {
    'left': inputs(3)[:, :3].T,
    'right': jax.random.normal(jax.random.key(3), (2, 4, 3)),
    'batched': jax.random.normal(jax.random.key(4), (2, 4, 4)),
    'joined': jax.random.normal(jax.random.key(5), (2, 4, 3)),
  }
  x = inputs(B)

  def loss_fn(params):
    z = jnp.einsum('io,bo->ib', params['left'], x)  # The kernel on the left: (i, b).
    z = jnp.einsum('ib,hki->hbk', jnp.tanh(z), params['right'])
    z = jnp.einsum('hbk,hkl->bhl', jnp.tanh(z), params['batched'])
    return losses(lambda z: jnp.einsum('bhl,hlo->bo', jnp.tanh(z), params['joined']), z)

  numbers = {
    'left': MuonDimensionNumbers(1, 0),
    'right': MuonDimensionNumbers(2, (1, 0)),  # The user's order of columns.
    'batched': MuonDimensionNumbers(1, 2),
    'joined': MuonDimensionNumbers((1, 0), 2),  # And of rows.
  }
  captured = capture_layers(loss_fn, params, weight_dimension_numbers=numbers)
  assert captured['right'].errors.shape == (B, 8)
  assert captured['batched'].errors.shape == (2, B, 4)
  assert_is_the_gradient(captured, lambda p: loss_fn(p).mean(), params, numbers)


def test_a_stack_of_layers_taken_apart_by_hand():
  params = {'layers': {'kernel': jax.random.normal(jax.random.key(0), (3, 4, 4)),
                       'bias': jnp.zeros((3, 4))}}  # fmt: skip
  x = inputs(4)

  def loss_fn(params):
    z = x
    for i in (2, 0, 1, 0):
      z = jnp.tanh(z @ params['layers']['kernel'][i] + params['layers']['bias'][i][None])
    return losses(lambda z: z, z)

  # The first layer has twice the rows of the others: no array of all of them.
  with pytest.raises(ValueError, match='not all as often'):
    capture_layers(loss_fn, params)

  def twice(params):
    z = x
    for i in (2, 0, 1) * 2:
      z = jnp.tanh(z @ params['layers']['kernel'][i] + params['layers']['bias'][i][None])
    return losses(lambda z: z, z)

  captured = capture_layers(twice, params)
  assert captured['layers/kernel'].errors.shape == (3, 2 * B, 4)
  assert_is_the_gradient(captured, lambda p: twice(p).mean(), params)


def test_low_precision_activations_come_as_the_layer_sees_them():
  model = nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=RNGS)
  layer = capture(model, losses, inputs(3))['kernel']
  assert layer.activations.dtype == layer.errors.dtype == jnp.bfloat16
  mean, params = mean_of_nnx(model, losses, inputs(3))
  np.testing.assert_allclose(layer.gradient(), jax.grad(mean)(params)['kernel'][...], atol=0.05)


def test_double_precision(x64):
  model = nnx.Sequential(
    nnx.Conv(2, 3, (3, 3), strides=2, rngs=RNGS, param_dtype=jnp.float64),
    lambda x: jnp.tanh(x).reshape(B, -1),
    nnx.Linear(12, 4, rngs=RNGS, param_dtype=jnp.float64),
  )
  x = inputs(4, 4, 2).astype(jnp.float64)
  mean, params = mean_of_nnx(model, losses, x)
  gradients = layout.leaves_by_path(jax.grad(mean)(params))
  for path, layer in capture(model, losses, x).items():
    assert layer.errors.dtype == jnp.float64
    expected = gradients[path].reshape(-1, gradients[path].shape[-1])
    np.testing.assert_allclose(layer.gradient(), expected, rtol=1e-11, atol=1e-13)


# ---------------------------------------------------------------------------------
# What has no activations and errors
# ---------------------------------------------------------------------------------


class Two(nnx.Module):
  """A plain layer and another."""

  def __init__(self, other, use=None):
    self.plain = nnx.Linear(4, 4, rngs=RNGS)
    self.other = other
    self.use = nnx.static(use or (lambda other, x: other(x)))

  def __call__(self, x):
    return self.use(self.other, jnp.tanh(self.plain(x)))


def by_hand(use):
  return Two(nnx.Linear(4, 4, rngs=RNGS), use)


UNSUPPORTED = {
  'groups': (
    lambda: Two(nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=RNGS)),
    (3, 4),
    'has groups',
  ),
  'mask': (
    lambda: Two(nnx.Conv(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=RNGS)),
    (3, 4),
    "used in 'mul', which is no product",
  ),
  'regularisation': (
    lambda: by_hand(lambda o, x: o(x) + jnp.sum(o.kernel[...] ** 2)),
    (4,),
    'which is no product',
  ),
  'two parameters': (
    lambda: by_hand(lambda o, x: x @ (o.kernel[...] @ o.kernel[...])),
    (4,),
    'multiplied with a parameter',
  ),
  'not used': (lambda: by_hand(lambda o, x: x), (4,), 'does not use it'),
  'half of it': (
    lambda: by_hand(lambda o, x: x[:, :2] @ o.kernel[...][:2]),
    (4,),
    'say so in weight_dimension_numbers',
  ),
  'transposed': (
    lambda: by_hand(lambda o, x: x @ o.kernel[...].T),
    (4,),
    r'rows are the axes \(0,\).* multiplies over the axes \(1,\)',
  ),
  'cond': (
    lambda: by_hand(lambda o, x: jax.lax.cond(x[0, 0] > 0, lambda x: o(x), lambda x: x, x)),
    (4,),
    "used in 'cond'",
  ),
  'carried': (
    lambda: by_hand(
      lambda o, x: jax.lax.scan(
        lambda c, _: ((c[0] @ c[1], 0.9 * c[1]), None), (x, o.kernel[...]), length=2
      )[0][0]
    ),
    (4,),
    'a loop changes it',
  ),
}


@pytest.mark.parametrize('name', UNSUPPORTED)
def test_unsupported(name):
  make, shape, message = UNSUPPORTED[name]
  model, x = make(), inputs(*shape)
  with pytest.raises(ValueError, match=message) as error:
    capture(model, losses, x)
  assert "'other/kernel' with shape" in str(error.value)
  assert 'plain/kernel' not in str(error.value)
  mean, params = mean_of_nnx(model, losses, x)
  for options in ({'unsupported': 'skip'}, {'paths': ['plain/kernel']}):
    captured = capture(model, losses, x, **options)
    assert_is_the_gradient(captured, mean, params, paths=['plain/kernel'])


def test_the_axes_that_the_error_names_are_those_to_give():
  # Without a bias nothing shows that the first axis alone is reduced over.
  model = nnx.LinearGeneral(4, (2, 3), use_bias=False, rngs=RNGS)
  with pytest.raises(ValueError, match=r'multiplies over the axes \(0,\)'):
    capture(model, losses, inputs(4))
  numbers = {'kernel': MuonDimensionNumbers(0, (1, 2))}
  captured = capture(model, losses, inputs(4), weight_dimension_numbers=numbers)
  assert_is_the_gradient(captured, *mean_of_nnx(model, losses, inputs(4)), numbers)


def test_arguments():
  model, x = nnx.Linear(3, 4, rngs=RNGS), inputs(3)
  with pytest.raises(TypeError, match=r'linen\.Module, got function'):
    capture(lambda x: x, losses, x)
  with pytest.raises(ValueError, match='A linen model needs variables'):
    capture(nn.Dense(4), losses, x)
  with pytest.raises(ValueError, match='variables and rngs are for linen'):
    capture(model, losses, x, variables={})
  with pytest.raises(ValueError, match=r'num_samples is 4, and loss_fn returns 5 losses'):
    capture(model, losses, x, num_samples=4)
  with pytest.raises(ValueError, match="paths has 'none'"):
    capture(model, losses, x, paths=['none'])
  with pytest.raises(ValueError, match="'raise' or 'skip'"):
    capture(model, losses, x, unsupported='ignore')
  with pytest.raises(ValueError, match=r'their mean, a scalar; it returns 1 array.* \(5, 4\)'):
    capture(model, lambda m, x: m(x), x)
  with pytest.raises(ValueError, match='say over how many samples'):
    capture_layers(lambda p: jnp.sum(x @ p['kernel']), {'kernel': jnp.ones((3, 4))})
  with pytest.raises(ValueError, match='must be positive'):
    capture_layers(lambda p: jnp.sum(x @ p['kernel']), {'kernel': jnp.ones((3, 4))}, num_samples=0)
  # A mean over tokens, not over sequences.
  layer = capture(model, lambda m, x: losses(m, x).mean(), x, num_samples=3 * B)['kernel']
  assert layer.num_samples == 3 * B
  mean, params = mean_of_nnx(model, losses, x)
  np.testing.assert_allclose(layer.gradient(), jax.grad(mean)(params)['kernel'][...], rtol=1e-4)
