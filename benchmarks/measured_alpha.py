"""What `measured_alpha` costs on the example's network, and how far its α are off.

    python benchmarks/measured_alpha.py              # A few minutes on two CPU cores

Cost: a whole training step (gradient, update, new parameters), compiled, of `alpha="default"`
and of `measured_alpha(every=100)`, where it measures and where it does not, taking turns.

Error: while the example trains, α of every matrix along the leading directions of its momentum,
by one measurement with 1, 2, 4, ... draws of the random signs, and by the running averages of
the training itself, against the same without the noise between layers (as many draws as
matrices) on many images, and beside `curvature.measure`, whose directions are the gradient's.
"""

import argparse
import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
sys.path.append(str(pathlib.Path(__file__).parents[1] / 'examples'))

import _measure
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reporting
import rich.console
import train_vision
import vision_data
from flax import nnx

import spectral_optax
from spectral_optax import curvature, layout
from spectral_optax.solvers import low_rank

EVERY, TOP_K, BATCH = 100, 8, 128
NO_NOISE = 16  # Draws; the network has ten matrices.


class Training:
  """The example's network under an optimizer, as pure functions."""

  def __init__(self, alpha: Any, data: vision_data.Dataset, images: int, seed: int = 0):
    model = train_vision.ResNet(
      data.train_images.shape[-1],
      data.num_classes,
      width=16,
      depth=1,
      stride=2 if data.train_images.shape[1] > 16 else 1,
      rngs=nnx.Rngs(seed),
    )
    self.graph, params, statistics = nnx.split(model, nnx.Param, ...)
    self.data, self.images, self.rng = data, images, np.random.default_rng(seed)
    rate = optax.warmup_cosine_decay_schedule(0, 0.02, 15, 312)
    self.tx = spectral_optax.spectral_newton(rate, alpha, weight_decay=1e-4)
    pure = (train_vision.as_pure(params), train_vision.as_pure(statistics))
    self.carry = (*pure, self.tx.init(pure[0]))
    self.step = jax.jit(self._step)

  def loss(self, params, statistics, images, labels):
    model = nnx.merge(self.graph, params, statistics, copy=True)
    loss, _ = train_vision.loss_and_logits(model, images, labels)
    return loss, train_vision.as_pure(nnx.state(model, nnx.BatchStat))

  def _step(self, carry, images, labels):
    params, statistics, state = carry
    grad = jax.grad(self.loss, has_aux=True)
    grads, new = grad(params, statistics, images, labels)
    few = images[: self.images], labels[: self.images]
    value_fn = lambda p: self.loss(p, statistics, *few)[0]
    updates, state = self.tx.update(grads, state, params, value_fn=value_fn)
    return optax.apply_updates(params, updates), new, state

  def batch(self, size: int = BATCH) -> tuple[jax.Array, jax.Array]:
    index = self.rng.integers(len(self.data.train_images), size=size)
    return jnp.asarray(self.data.train_images[index]), jnp.asarray(self.data.train_labels[index])

  def train(self, steps: int) -> None:
    for _ in range(steps):
      self.carry = self.step(self.carry, *self.batch())

  def momentum(self) -> dict[str, jax.Array]:
    """Each matrix's, as a batch of one matrix."""
    of = lambda x: isinstance(x, spectral_optax.MomentumState)
    (found,) = filter(of, jax.tree.leaves(self.carry[2], is_leaf=of))
    mu = layout.leaves_by_path(found.mu)
    views = layout.matrix_views(self.carry[0])
    return {path: view.to_matrices(mu[path]) for path, view in views.items()}


# ---------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------


def cost(data: vision_data.Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
  plain = Training('default', data, args.images)
  plain.train(EVERY - 1)
  batch = plain.batch()
  variants = {}
  for draws in args.draws[:2]:
    alpha = spectral_optax.measured_alpha(EVERY, TOP_K, draws=draws)
    training = Training(alpha, data, args.images)
    training.train(EVERY - 2)
    before = training.carry
    training.train(1)  # The next one measures.
    variants[draws] = {'not': (training, before), 'measuring': (training, training.carry)}
  calls = {('plain', 0): functools.partial(plain.step, plain.carry, *batch)}
  for draws, of in variants.items():
    for name, (training, carry) in of.items():
      calls[name, draws] = functools.partial(training.step, carry, *batch)
  times: dict[Any, list[float]] = {key: [] for key in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  for _ in range(args.rounds):
    for key, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times[key].append(time.perf_counter() - start)
  median = {key: float(np.median(values)) for key, values in times.items()}
  rows = []
  for draws in variants:
    base, measuring, idle = (
      median['plain', 0],
      median['measuring', draws],
      median['not', draws],
    )
    rows.append(
      {
        'draws': draws,
        'images': args.images,
        'default_ms': 1e3 * base,
        'not_measuring_over_default': idle / base,
        'measuring_over_default': measuring / base,
        # Of training time, at one measurement in EVERY steps.
        'measurements': (measuring - idle) / (EVERY * base),
        'everything': ((EVERY - 1) * idle + measuring) / (EVERY * base) - 1,
      }
    )
  return rows


# ---------------------------------------------------------------------------------
# Error
# ---------------------------------------------------------------------------------


def fitted(sigma: dict[str, Any], h: dict[str, Any]) -> dict[str, tuple[float, bool]]:
  """α by path, and whether `measured_alpha` would take it."""
  rule = spectral_optax.measured_alpha()
  fits = {}
  for path, values in h.items():
    line = curvature.masked_power_law(np.asarray(sigma[path][0]), np.asarray(values[0]))
    negative = float(np.mean(np.asarray(values) <= 0))
    good = line.r_squared >= rule.min_r_squared and negative <= rule.max_negative
    fits[path] = float(line.slope), bool(good)
  return fits


def error(data: vision_data.Dataset, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
  online = spectral_optax.measured_alpha(args.every, TOP_K, draws=1)
  training = Training(online, data, args.images)

  @functools.partial(jax.jit, static_argnames='draws')
  def measured(carry, momentum, images, labels, key, draws):
    params, statistics, _ = carry
    loss = lambda p: training.loss(p, statistics, images, labels)[0]
    triples = {
      path: low_rank.leading_directions(m, min(TOP_K, *m.shape[1:])) for path, m in momentum.items()
    }
    directions = {path: (u, v) for path, (u, _, v) in triples.items()}
    h = curvature.joint_curvature(loss, params, directions, key, draws=draws)
    return {path: sigma for path, (_, sigma, _) in triples.items()}, h

  def loss_of_batch(params, batch):
    statistics, images, labels = batch
    return training.loss(params, statistics, images, labels)[0]

  for begin, end in itertools.pairwise([0, *args.steps]):
    training.train(end - begin)
    momentum, many = training.momentum(), training.batch(args.reference)
    call = functools.partial(measured, training.carry, momentum)
    reference = fitted(*call(*many, jax.random.key(0), NO_NOISE))
    rows = {}
    for draws in (*args.draws, NO_NOISE):
      found = [
        fitted(*call(*training.batch(args.images), jax.random.key(i), draws))
        for i in range(args.repeats)
      ]
      rows[f'one measurement, {draws} draws'] = found
    state = training.carry[2]
    alpha, taken = (dict(optax.tree.get(state, name)) for name in ('measured_alpha', 'alpha'))
    rows['running averages'] = [
      {
        p: (float(a), abs(float(taken[p]) - np.clip(float(a), *online.clip)) < 1e-6)
        for p, a in alpha.items()
      }
    ]
    report = curvature.measure(
      loss_of_batch,
      training.carry[0],
      top_k=TOP_K,
      batches=[(training.carry[1], *many)],
      bootstrap=0,
    )
    rows["curvature.measure: the gradient's directions"] = [
      {layer.path: (layer.alpha.exponent, True) for layer in report.layers}
    ]
    for name, found in rows.items():
      off = [abs(f[p][0] - reference[p][0]) for f in found for p in reference]
      good = [f[p][1] for f in found for p in reference]
      off_good = [o for o, g in zip(off, good, strict=True) if g]
      yield {
        'step': end,
        'how': name,
        'median_error': float(np.nanmedian(off)),
        'taken': float(np.mean(good)),
        'median_error_of_taken': float(np.median(off_good)) if off_good else float('nan'),
        'alpha': {p: float(np.nanmean([f[p][0] for f in found])) for p in reference},
        'reference': {p: a for p, (a, _) in reference.items()},
      }


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line; returns what the JSON holds."""
  parser = argparse.ArgumentParser(description='What measuring α while training costs.')
  add = parser.add_argument
  add('--data', default='auto', choices=('auto', *vision_data.NAMES))
  add('--data-dir')
  add('--images', type=int, default=train_vision.MEASURED_IMAGES, help='measured on, %(default)s')
  add('--draws', type=int, nargs='+', default=[1, 2, 4])
  add('--rounds', type=int, default=30, help='timings of each step')
  add('--steps', type=int, nargs='+', default=[100, 200, 300], help='to look at the error at')
  add('--every', type=int, default=20, help='of the running averages, %(default)s')
  add('--repeats', type=int, default=10, help='measurements of each kind, %(default)s')
  add('--reference', type=int, default=512, help='images of the reference, %(default)s')
  add('--output', type=pathlib.Path)
  args = parser.parse_args(argv)
  data = vision_data.load(args.data, args.data_dir)
  console = rich.console.Console(width=None if sys.stdout.isatty() else 120)

  costs = cost(data, args)
  columns = ['draws', 'default ms', 'not measuring', 'measuring', 'measurements', 'everything']
  cells = [
    [
      str(row['draws']),
      f'{row["default_ms"]:.1f}',
      f'{row["not_measuring_over_default"]:.3f}',
      f'{row["measuring_over_default"]:.2f}',
      f'{100 * row["measurements"]:+.1f} %',
      f'{100 * row["everything"]:+.1f} %',
    ]
    for row in costs
  ]
  title = f'A training step on {data.name}, {BATCH} images, measured on {args.images}'
  console.print(
    _measure.rich_table(title, columns, cells, 'Of training time, at every=100. Steps: × default.')
  )
  print(_measure.markdown_table(columns, cells))
  errors = list(error(data, args))
  columns = ['step', 'how', 'median error of α', 'taken', 'error of those']
  cells = [
    [
      str(row['step']),
      row['how'],
      f'{row["median_error"]:.2f}',
      f'{100 * row["taken"]:.0f} %',
      f'{row["median_error_of_taken"]:.2f}',
    ]
    for row in errors
  ]
  console.print(_measure.rich_table('α of ten matrices', columns, cells, ''))
  print(_measure.markdown_table(columns, cells))
  content = {'cost': costs, 'error': errors, 'environment': reporting.environment()}
  results = pathlib.Path(__file__).parent / 'results' / 'measured_alpha.json'
  reporting.write_json(args.output or results, content)
  return content


if __name__ == '__main__':
  main()
