"""Run by `test_hang` in a process of its own: python -m tests.hang_script SOLVER CASE.

Prints `done` when it comes to its end, which a program that waits on its own thread
pool does not.
"""

import os
import sys

if hasattr(os, 'sched_setaffinity'):  # Two threads in the pool, also on a large machine.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import jax.numpy as jnp
import optax

import spectral_optax

SHAPES = [(24, 8), (16, 16), (32, 12), (9, 27), (40, 20), (6, 6)]
STEPS = 100


def params():
  """Six shapes of matrix, three of each: a stack of two, and one the other way round."""
  tree = {}
  for i, (m, n) in enumerate(SHAPES):
    tree[f'Stack_{i}'] = {'kernel': jnp.ones((2, m, n)), 'bias': jnp.zeros((2, n))}
    tree[f'Dense_{i}'] = {'kernel': jnp.ones((n, m)), 'bias': jnp.zeros(m)}
  return tree


def optimizer(solver):
  alpha = 2.0 if solver == 'cholesky' else jnp.asarray(1.5)
  if solver == 'auto':
    alpha = 'default'
  return spectral_optax.spectral_newton(1e-3, alpha, solver=solver)


def noise(key, tree):
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(key, len(leaves))
  return structure.unflatten(
    [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  )


def training(tx, gradient, steps):
  """One program of many steps."""

  def step(carry, key):
    p, state = carry
    updates, state = tx.update(gradient(key, p), state, p)
    return (optax.apply_updates(p, updates), state), None

  def run(key):
    p = noise(key, params())
    (p, _), _ = jax.lax.scan(step, (p, tx.init(p)), jax.random.split(key, steps))
    return p

  return run


def model_gradient(key, p):
  """A model whose backward pass keeps the pool busy with products of its own."""
  x = jax.random.normal(key, (512, 256))
  wide = jnp.ones((256, 256)) / 256

  def loss(p):
    total = jnp.zeros([])
    for layer in p.values():
      k = layer['kernel']
      k = k if k.ndim == 2 else k.sum(0)
      y = jnp.tanh(x @ wide)[:, : k.shape[0]] @ k
      total += jnp.mean(jnp.tanh(y @ y.T @ x) ** 2)
    return total

  return jax.grad(loss)(p)


def main(solver, case):
  tx, key = optimizer(solver), jax.random.key(0)
  if case == 'steps':
    p = params()
    step = jax.jit(lambda key, state: tx.update(noise(key, p), state, p))
    state, end = tx.init(p), p
    for k in jax.random.split(key, STEPS):
      end, state = step(k, state)
  elif case == 'model':
    end = jax.jit(training(tx, model_gradient, 15))(key)
  elif case == 'seeds':  # `vmap` around the optimizer batches what was a loop.
    end = jax.jit(jax.vmap(training(tx, noise, 20)))(jax.random.split(key, 3))
  elif case == 'devices':  # Every device of the process runs the program.
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    keys = jax.device_put(jax.random.split(key, 8), sharded)
    end = jax.jit(jax.shard_map(
      jax.vmap(training(tx, noise, 20)), mesh=mesh,
      in_specs=jax.sharding.PartitionSpec('data'),
      out_specs=jax.sharding.PartitionSpec('data'), check_vma=False,
    ))(keys)  # fmt: skip
  else:
    raise ValueError(case)
  if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(end)):
    raise AssertionError('not finite')
  print('done')


if __name__ == '__main__':
  main(*sys.argv[1:])
