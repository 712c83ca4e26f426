"""The optimizer inside the training loops that users have."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import spectral_optax
from tests.flax_versions import as_pure


class NNXModel(nnx.Module):
  """Convolution, norm, a stack scanned over, attention and a head."""

  def __init__(self, rngs: nnx.Rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
    self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs))(rngs.fork(split=3))
    self.head = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    x = x.reshape(x.shape[0], -1, 8)
    x = x + self.attention(x)
    body = nnx.scan(
      lambda x, layer: x + jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return self.head(body(x, self.layers).mean(1))


NNX_MATRICES = {
  'attention/key/kernel', 'attention/out/kernel', 'attention/query/kernel',
  'attention/value/kernel', 'conv/kernel', 'head/kernel', 'layers/kernel',
}  # fmt: skip

X = jnp.float32(np.random.default_rng(0).standard_normal((32, 4, 4, 1)))
Y = jnp.argmax(X.reshape(32, 4, 4).sum(-1), -1)


def loss_of(logits):
  return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def test_nnx_optimizer():
  model = NNXModel(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, spectral_optax.spectral_newton(0.1), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss, grads = nnx.value_and_grad(lambda m: loss_of(m(X)))(model)
    optimizer.update(model, grads)
    return loss

  losses = [float(step(model, optimizer)) for _ in range(60)]
  assert losses[-1] < 0.4 * losses[0]
  state = as_pure(optimizer.opt_state)
  sigma = optax.tree.get(state, 'sigma_max')
  assert set(sigma) == NNX_MATRICES
  assert sigma['layers/kernel'].shape == (3,)
  assert all((np.asarray(s) > 0).all() for s in sigma.values())


def test_split_state_and_scan_training_loop():
  graph, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
  tx = spectral_optax.spectral_newton(0.1)

  def loss_fn(params):
    # A copy: the norm's running averages are written to.
    return loss_of(nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))(X))

  def step(carry, _):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  _, losses = jax.jit(lambda c: jax.lax.scan(step, c, length=60))((params, tx.init(params)))
  assert losses[-1] < 0.4 * losses[0]


class LinenModel(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(8, (3, 3))(x))
    x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
    return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


def test_linen_train_state():
  model = LinenModel()
  state = TrainState.create(
    apply_fn=model.apply,
    params=model.init(jax.random.key(0), X)['params'],
    tx=spectral_optax.spectral_newton(0.1, weight_decay=1e-2),
  )

  @jax.jit
  def step(state):
    loss, grads = jax.value_and_grad(lambda p: loss_of(state.apply_fn({'params': p}, X)))(
      state.params
    )
    return state.apply_gradients(grads=grads), loss

  losses = []
  for _ in range(60):
    state, loss = step(state)
    losses.append(float(loss))
  assert losses[-1] < 0.4 * losses[0]
  assert set(optax.tree.get(state.opt_state, 'sigma_max')) == {
    'Conv_0/kernel', 'Dense_0/kernel', 'Dense_1/kernel'}  # fmt: skip


@pytest.mark.parametrize('own', ['default', 'tree of alphas', 'tree of numbers'])
def test_equinox(own):
  model = eqx.nn.MLP(16, 4, 8, 2, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)
  arguments = {
    'default': {},
    # Trees of the model's own type, which is callable and yet no function.
    'tree of alphas': {'alpha': jax.tree.map(lambda _: 1.3, params)},
    'tree of numbers': {
      'weight_dimension_numbers': spectral_optax.weight_dimension_numbers(params)
    },
  }[own]
  tx = spectral_optax.spectral_newton(0.1, **arguments)

  def loss_fn(params):
    return loss_of(jax.vmap(eqx.combine(params, static))(X.reshape(32, 16)))

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state, losses = tx.init(params), []
  for _ in range(60):
    params, state, loss = step(params, state)
    losses.append(float(loss))
  assert losses[-1] < 0.4 * losses[0]
  assert set(optax.tree.get(state, 'sigma_max')) == {f'layers/{i}/weight' for i in range(3)}


def test_orbax_round_trip(tmp_path):
  params = {'layers': {'0': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}}
  tx = spectral_optax.spectral_newton(0.1)
  state = tx.init(params)
  _, state = jax.jit(tx.update)(params, state, params)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'state', jax.eval_shape(tx.init, params))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
