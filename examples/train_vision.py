"""Trains a residual network on real images with Spectral Newton, AdamW and Muon in turn.

    python examples/train_vision.py                       # Fashion-MNIST, or the digits
    python examples/train_vision.py --data cifar-10 --data-dir ~/data --epochs 10
    python examples/train_vision.py --optimizers spectral_newton --alpha 1.5 --damping 0.03
    python examples/train_vision.py --tune --update-rms 0.1 0.2 0.4

Ends with a table and writes runs/train_vision.png and .json. The three optimizers share
initialisation, order of images, schedule (linear warm-up, cosine decay) and weight decay;
only the update differs. `make_optimizer` is where that is.

How the default learning rates were chosen (`TUNED`): `--tune` trains every optimizer with
the same grid of peak learning rates, a factor of 2 apart, and the same seeds, which are not
those of the default run, over the full schedule, and takes the rate with the smallest mean
loss on validation images. Those are held out of the training images; no run trains on
them, and tuning never sees the test images. benchmarks/results/train_vision_tuning.json has
every one of those losses.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores, and updates be many times
# slower on a busy machine. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.table
import vision_data
import vision_plot
from flax import nnx
from reporting import environment, write_json
from tqdm import tqdm

import spectral_optax
from spectral_optax import solvers

# Flax 0.12.6, the newest that runs with JAX 0.9, has it under its older name.
as_pure = getattr(nnx, 'as_pure', None) or nnx.pure

OPTIMIZERS = {'spectral_newton': 'Spectral Newton', 'adamw': 'AdamW', 'muon': 'Muon'}

# Peak learning rates, by
#   python examples/train_vision.py --tune --update-rms 0.1 0.2 0.4
#   python examples/train_vision.py --tune --data digits
# (benchmarks/results/train_vision_tuning.json). CIFAR-10 borrows Fashion-MNIST's.
TUNED = {
  'fashion-mnist': {'spectral_newton': 0.04, 'adamw': 0.04, 'muon': 0.04},
  'digits': {'spectral_newton': 0.0025, 'adamw': 0.02, 'muon': 0.0025},
}

# Of each batch, to measure curvature on.
MEASURED_IMAGES = 16

# Optax's default for AdamW. On the matrices alone, for all three.
WEIGHT_DECAY = 1e-4


@dataclasses.dataclass(frozen=True)
class Task:
  """What a data set is trained with unless a flag says otherwise."""

  epochs: int
  batch_size: int
  train_images: int
  validation_images: int
  seeds: tuple[int, ...] = (0, 1)
  tuning_seeds: tuple[int, ...] = (100, 101)
  grid: tuple[float, ...] = tuple(0.0025 * 2**i for i in range(8))


TASKS = {
  'fashion-mnist': Task(4, 128, 10_000, 5_000),
  'cifar-10': Task(4, 128, 10_000, 5_000),
  'digits': Task(
    20,
    64,
    1_100,
    300,
    tuning_seeds=(100, 101, 102),
    grid=tuple(0.0003125 * 2**i for i in range(8)),
  ),
}


# ---------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------


class Block(nnx.Module):
  """Two 3x3 convolutions and a way around them."""

  def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
    self.conv1 = conv(inputs, outputs, (3, 3), strides=stride)
    self.norm1 = norm(outputs)
    self.conv2 = conv(outputs, outputs, (3, 3))
    self.norm2 = norm(outputs)
    changes = stride != 1 or inputs != outputs
    self.shortcut = conv(inputs, outputs, (1, 1), strides=stride) if changes else None

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = self.norm1(self.conv1(x), use_running_average=not train)
    y = self.norm2(self.conv2(nnx.relu(y)), use_running_average=not train)
    return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
  """Three stages of `depth` blocks, `width`, 2 `width` and 4 `width` channels wide."""

  def __init__(
    self, channels: int, classes: int, *, width: int, depth: int, stride: int, rngs: nnx.Rngs
  ):
    self.stem = nnx.Conv(channels, width, (3, 3), strides=stride, use_bias=False, rngs=rngs)
    self.stem_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
    blocks, inputs = [], width
    for stage in range(3):
      for i in range(depth):
        outputs = width * 2**stage
        blocks.append(Block(inputs, outputs, 2 if stage and i == 0 else 1, rngs=rngs))
        inputs = outputs
    self.blocks = nnx.List(blocks)
    self.head = nnx.Linear(inputs, classes, rngs=rngs)

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nnx.relu(self.stem_norm(self.stem(x), use_running_average=not train))
    for block in self.blocks:
      x = block(x, train=train)
    return self.head(x.mean((1, 2)))


# ---------------------------------------------------------------------------------
# The optimizers
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """All but the learning rate. Equal settings share one compiled step."""

  name: str
  steps: int
  weight_decay: float = WEIGHT_DECAY
  alpha: float | str = 'default'
  damping: float | str | None = None
  solver: str = 'auto'
  update_rms: float = 0.2
  tolerance: float | None = None
  momentum: float = 0.9
  rms_of: str = 'wide'


def make_optimizer(
  settings: OptimizerSettings, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  """The three of them. Spectral Newton finds out for itself what is a matrix."""
  decay = settings.weight_decay
  if settings.name == 'adamw':
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.adamw(learning_rate, weight_decay=decay, mask=matrices)
  if settings.name == 'muon':
    # Convolutions too, and updates of AdamW's size: Muon at its best.
    return optax.contrib.muon(
      learning_rate,
      beta=settings.momentum,
      weight_decay=decay,
      muon_weight_dimension_numbers=spectral_optax.weight_dimension_numbers,
      consistent_rms=0.2,
    )
  return spectral_optax.spectral_newton(
    learning_rate,
    alpha=spectral_optax.measured_alpha() if settings.alpha == 'measured' else settings.alpha,
    damping=settings.damping,
    solver=settings.solver,
    tolerance=settings.tolerance,
    momentum=settings.momentum,
    update_rms=settings.update_rms,
    rms_of=settings.rms_of,
    weight_decay=decay,
  )


@functools.cache
def scheduled_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
  """With warm-up and cosine decay, and the peak rate in its state.

  A rate in the state can be changed without compiling the step again, which is what makes
  tuning affordable; for one training, `make_optimizer(settings, schedule)` is all one needs.
  """
  warmup = max(1, settings.steps // 20)
  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(settings.steps, warmup + 1))

  def build(learning_rate: Any) -> optax.GradientTransformation:
    return make_optimizer(settings, lambda count: learning_rate * shape(count + 1))

  return optax.inject_hyperparams(build)(learning_rate=0.0)


# ---------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------


def loss_and_logits(
  model: ResNet, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  logits = model(images, train=True)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def loss_of_few(
  model: ResNet, images: jax.Array, labels: jax.Array
) -> Callable[[nnx.State], jax.Array]:
  """The loss of a few images as a function of the parameters, to measure its curvature.

  What that costs grows with their number.
  """
  graph, _, statistics = nnx.split(model, nnx.Param, ...)

  def value_fn(params: nnx.State) -> jax.Array:
    copied = nnx.merge(graph, params, statistics, copy=True)
    return loss_and_logits(copied, images[:MEASURED_IMAGES], labels[:MEASURED_IMAGES])[0]

  return value_fn


@nnx.jit(donate_argnames=('model', 'optimizer'))
def train_step(
  model: ResNet, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  grad = nnx.value_and_grad(loss_and_logits, has_aux=True)
  (loss, logits), grads = grad(model, images, labels)
  # Looked at with `--alpha measured` alone.
  optimizer.update(model, grads, value_fn=loss_of_few(model, images, labels))
  return loss, jnp.mean(logits.argmax(-1) == labels)


@nnx.jit
def gradient(model: ResNet, images: jax.Array, labels: jax.Array) -> nnx.State:
  return nnx.grad(loss_and_logits, has_aux=True)(model, images, labels)[0]


@nnx.jit
def evaluation_step(
  model: ResNet, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  logits = model(images, train=False)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.sum(), jnp.sum(logits.argmax(-1) == labels)


def evaluate(model: ResNet, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
  """Mean loss and accuracy."""
  size, x, y = 1000, jnp.asarray(images), jnp.asarray(labels)
  sums = [
    jax.device_get(evaluation_step(model, x[i : i + size], y[i : i + size]))
    for i in range(0, len(images), size)
  ]
  loss, correct = np.sum(np.asarray(sums, np.float64), axis=0) / len(images)
  return float(loss), float(correct)


@dataclasses.dataclass
class Run:
  """One training."""

  model: ResNet
  optimizer: nnx.Optimizer
  losses: list[float]  # Of every step's batch, before the step.
  accuracies: list[float]
  step_seconds: list[float]
  loss: float  # On the images that the run was evaluated on.
  accuracy: float


def train(
  settings: OptimizerSettings,
  learning_rate: float,
  seed: int,
  data: vision_data.Dataset,
  evaluation: tuple[np.ndarray, np.ndarray],
  args: argparse.Namespace,
  title: str,
) -> Run:
  """Trains from a fresh initialisation, and evaluates once, at the end."""
  images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
  model = ResNet(
    images.shape[-1],
    data.num_classes,
    width=args.width,
    depth=args.depth,
    stride=2 if images.shape[1] > 16 else 1,
    rngs=nnx.Rngs(seed),
  )
  optimizer = nnx.Optimizer(model, scheduled_optimizer(settings), wrt=nnx.Param)
  optimizer.opt_state.hyperparams['learning_rate'][...] = learning_rate  # type: ignore

  shuffle = np.random.default_rng(seed)
  order = np.empty(0, np.int64)
  losses, accuracies, seconds = [], [], []
  with tqdm(total=settings.steps, desc=title, disable=args.quiet, mininterval=0.5) as bar:
    for _ in range(settings.steps):
      if len(order) < args.batch_size:  # An epoch; what is left of the last one is dropped.
        order = shuffle.permutation(len(images))
      batch, order = order[: args.batch_size], order[args.batch_size :]
      x, y = jax.block_until_ready((images[batch], labels[batch]))
      start = time.perf_counter()
      loss, accuracy = train_step(model, optimizer, x, y)
      losses.append(float(loss))  # Waits for the step.
      seconds.append(time.perf_counter() - start)
      accuracies.append(float(accuracy))
      bar.set_postfix(
        {
          'loss': f'{np.mean(losses[-20:]):.3f}',
          'accuracy': f'{np.mean(accuracies[-20:]):.1%}',
          'images/s': f'{args.batch_size / np.mean(seconds[-20:]):.0f}',
        },
        refresh=False,
      )
      bar.update()
  loss, accuracy = evaluate(model, *evaluation)
  return Run(model, optimizer, losses, accuracies, seconds, loss, accuracy)


# ---------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------


def time_updates(
  runs: dict[str, Run], data: vision_data.Dataset, batch_size: int, rounds: int
) -> dict[str, float]:
  """Median seconds of one update, alone: gradient in, new parameters out.

  With each trained network's own gradient, state and parameters, compiled before, the
  optimizers taking turns so that a busy moment hits them all.
  """
  images = jnp.asarray(data.train_images[:batch_size])
  labels = jnp.asarray(data.train_labels[:batch_size])
  calls: dict[str, Callable[[], Any]] = {}
  for name, run in runs.items():
    transformation = optax.with_extra_args_support(run.optimizer.tx)
    loss = loss_of_few(run.model, images, labels)

    @jax.jit
    def step(grads, state, params, transformation=transformation, loss=loss):
      updates, state = transformation.update(grads, state, params, value_fn=loss)
      return optax.apply_updates(params, updates), state

    grads = gradient(run.model, images, labels)
    arguments = (
      as_pure(nnx.state(grads, nnx.Param)),
      as_pure(run.optimizer.opt_state),
      as_pure(nnx.state(run.model, nnx.Param)),
    )
    calls[name] = functools.partial(step, *arguments)
    jax.block_until_ready(calls[name]())
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return {name: float(np.median(times)) for name, times in seconds.items()}


def spectra(optimizer: nnx.Optimizer) -> dict[str, dict[str, Any]]:
  """Every matrix's momentum, from Spectral Newton's state: σ over its RMS, and T(σ)."""
  state = as_pure(optimizer.opt_state)
  is_momentum = lambda x: isinstance(x, spectral_optax.MomentumState)
  (momentum,) = filter(is_momentum, jax.tree.leaves(state, is_leaf=is_momentum))
  alphas, dampings = (optax.tree.get(state, name) for name in ('alpha', 'damping'))
  found = {}
  for path, mu in jax.tree_util.tree_leaves_with_path(momentum.mu):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    matrix = np.asarray(mu, np.float64).reshape(-1, mu.shape[-1])  # Flax: outputs last.
    sigma = np.linalg.svd(matrix, compute_uv=False)
    sigma /= max(np.sqrt(np.mean(sigma**2)), np.finfo(float).tiny)
    alpha, damping = float(alphas[name]), float(dampings[name])
    found[name] = {
      'shape': list(mu.shape),
      'alpha': alpha,
      'damping': damping,
      'sigma': sigma.tolist(),
      'transferred': np.asarray(spectral_optax.transfer(sigma, alpha, damping)).tolist(),
    }
  return found


# ---------------------------------------------------------------------------------
# The two commands
# ---------------------------------------------------------------------------------


def optimizer_settings(
  name: str, steps: int, update_rms: float, args: argparse.Namespace
) -> OptimizerSettings:
  if name == 'adamw':
    return OptimizerSettings(name, steps, args.weight_decay)
  if name == 'muon':
    return OptimizerSettings(name, steps, args.weight_decay, momentum=args.momentum)
  return OptimizerSettings(
    name,
    steps,
    args.weight_decay,
    args.alpha,
    args.damping,
    args.solver,
    update_rms,
    args.tolerance,
    args.momentum,
    args.rms_of,
  )


def compare(
  data: vision_data.Dataset, steps: int, args: argparse.Namespace, console: rich.console.Console
) -> dict[str, Any]:
  """Trains every optimizer with every seed; table, picture and JSON."""
  rates = {**TUNED.get(data.name, TUNED['fashion-mnist']), **args.learning_rates}
  test = data.test_images, data.test_labels
  runs: dict[str, list[Run]] = {}
  for name in args.optimizers:
    settings = optimizer_settings(name, steps, args.update_rms[0], args)
    runs[name] = [
      train(settings, rates[name], seed, data, test, args, f'{OPTIMIZERS[name]}, seed {seed}')
      for seed in args.seeds
    ]
  updates = time_updates(
    {name: of[-1] for name, of in runs.items()}, data, args.batch_size, args.timing_rounds
  )
  spread = lambda values: {
    'mean': float(np.mean(values)),
    'std': float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
  }
  results = {
    name: {
      'learning_rate': rates[name],
      'test_accuracy': spread([run.accuracy for run in of]),
      'test_loss': spread([run.loss for run in of]),
      # Not the first step, which compiles.
      'ms_per_step': 1e3 * float(np.median([s for run in of for s in run.step_seconds[1:]])),
      'ms_per_update': 1e3 * updates[name],
      'seconds_in_optimizer': steps * updates[name],
      'runs': [
        {
          'seed': seed,
          'test_accuracy': run.accuracy,
          'test_loss': run.loss,
          'train_losses': run.losses,
          'train_accuracies': run.accuracies,
        }
        for seed, run in zip(args.seeds, of, strict=True)
      ],
    }
    for name, of in runs.items()
  }
  report = {
    'task': describe_task(data, steps, args),
    'spectral_newton': {
      'alpha': args.alpha,
      'damping': args.damping,
      'solver': args.solver,
      'tolerance': args.tolerance,
      'update_rms': args.update_rms[0],
      'rms_of': args.rms_of,
      'momentum': args.momentum,
    },
    'optimizers': results,
    'spectra': spectra(runs['spectral_newton'][-1].optimizer) if 'spectral_newton' in runs else {},
    'environment': environment(),
  }
  console.print(results_table(report, data, args))
  return report


def results_table(
  report: dict[str, Any], data: vision_data.Dataset, args: argparse.Namespace
) -> rich.table.Table:
  task, several = report['task'], len(args.seeds) > 1
  seeds = f'mean ± standard deviation of {len(args.seeds)} seeds' if several else 'one seed'
  table = rich.table.Table(
    title=f'{data.name}: {task["train_images"]} training images, {task["epochs"]} epochs,'
    f' {task["steps"]} steps',
    caption=(
      f'Test: {len(data.test_labels)} images, {seeds}. Step: median over training, gradient'
      f' and update, without compilation. Update: the optimizer alone, compiled, on a real'
      f' gradient, median of {args.timing_rounds} runs, the optimizers taking turns;'
      f' updates, s: that times {task["steps"]}, the seconds that a training spends in the'
      f' optimizer.'
    ),
  )
  table.add_column('optimizer')
  for heading in (
    'peak rate',
    'accuracy %',
    'test loss',
    'ms/step',
    'ms/update',
    'updates, s',
  ):
    table.add_column(heading, justify='right')

  def number(value: dict[str, float], scale: float, digits: int) -> str:
    text = f'{scale * value["mean"]:.{digits}f}'
    return text + (f' ± {scale * value["std"]:.{digits}f}' if several else '')

  for name, result in report['optimizers'].items():
    table.add_row(
      OPTIMIZERS[name],
      f'{result["learning_rate"]:g}',
      number(result['test_accuracy'], 100, 2),
      number(result['test_loss'], 1, 4),
      f'{result["ms_per_step"]:.1f}',
      f'{result["ms_per_update"]:.2f}',
      f'{result["seconds_in_optimizer"]:.2f}',
    )
  return table


def tune(
  data: vision_data.Dataset,
  validation: tuple[np.ndarray, np.ndarray],
  steps: int,
  args: argparse.Namespace,
  console: rich.console.Console,
) -> dict[str, Any]:
  """Every optimizer, every rate of the grid, every tuning seed; validation images only."""
  report: dict[str, Any] = {
    'task': {**describe_task(data, steps, args), 'validation_images': len(validation[1])},
    'grid': args.grid,
    'rows': [],
    'environment': environment(),
  }
  start = time.perf_counter()
  variants = [
    (name, update_rms)
    for name in args.optimizers
    for update_rms in (args.update_rms if name == 'spectral_newton' else [None])
  ]
  for name, update_rms in variants:
    settings = optimizer_settings(name, steps, update_rms or 0.2, args)
    row: dict[str, Any] = {'optimizer': name, 'validation_loss': {}, 'validation_accuracy': {}}
    if name != 'adamw':
      row['momentum'] = args.momentum
    if name == 'spectral_newton':
      row |= {
        'alpha': args.alpha,
        'damping': args.damping,
        'solver': args.solver,
        'update_rms': update_rms,
        'rms_of': args.rms_of,
      }
    means = []
    for rate in args.grid:
      title = f'{OPTIMIZERS[name]}{f" (RMS {update_rms:g})" if update_rms else ""}, {rate:g}'
      done = [train(settings, rate, s, data, validation, args, title) for s in args.seeds]
      key = f'{rate:g}'
      row['validation_loss'][key] = [run.loss for run in done]
      row['validation_accuracy'][key] = [run.accuracy for run in done]
      means.append(float(np.mean([run.loss for run in done])))
    finite = [m if math.isfinite(m) else math.inf for m in means]
    best = int(np.argmin(finite))
    row |= {
      'mean_validation_loss': dict(zip(row['validation_loss'], means, strict=True)),
      'best_learning_rate': args.grid[best],
      'best_is_at_the_edge': best in (0, len(args.grid) - 1),
    }
    report['rows'].append(row)
    report['wall_seconds'] = round(time.perf_counter() - start)
    write_tuning(args.output, data.name, report)  # So far.

  table = rich.table.Table(
    title=f'{data.name}: mean validation loss by peak learning rate, seeds {args.seeds}',
    caption=f'{len(validation[1])} validation images, {steps} steps. The best in bold.',
  )
  table.add_column('peak rate', justify='right')
  for row in report['rows']:
    suffix = f',\nRMS {row["update_rms"]:g}' if row.get('update_rms') else ''
    table.add_column(OPTIMIZERS[row['optimizer']] + suffix, justify='right')
  for rate in args.grid:
    cells = [
      ('[bold]{:.4f}[/bold]' if rate == row['best_learning_rate'] else '{:.4f}').format(
        row['mean_validation_loss'][f'{rate:g}']
      )
      for row in report['rows']
    ]
    table.add_row(f'{rate:g}', *cells)
  console.print(table)
  if any(row['best_is_at_the_edge'] for row in report['rows']):
    console.print('A best rate is at the edge of the grid: extend it with --grid, for all.')
  return report


def write_tuning(path: pathlib.Path, name: str, report: dict[str, Any]) -> None:
  """Puts a data set's report into the file, beside those of other data sets."""
  others = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
  write_json(path, {**others, name: report})


def describe_task(
  data: vision_data.Dataset, steps: int, args: argparse.Namespace
) -> dict[str, Any]:
  return {
    'data': data.name,
    'train_images': len(data.train_images),
    'epochs': args.epochs,
    'steps': steps,
    'batch_size': args.batch_size,
    'width': args.width,
    'depth': args.depth,
    'weight_decay': args.weight_decay,
    'seeds': list(args.seeds),
  }


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def alpha_value(text: str) -> float | str:
  return text if text in ('default', 'layer_type', 'measured') else float(text)


def damping_value(text: str) -> float | str:
  return text if text in ('noise', 'constant') else float(text)


def named_rate(text: str) -> tuple[str, float]:
  name, _, rate = text.partition('=')
  if name not in OPTIMIZERS:
    raise argparse.ArgumentTypeError(f'{name!r} is none of {", ".join(OPTIMIZERS)}')
  return name, float(rate)


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description='Spectral Newton, AdamW and Muon on a residual network.'
  )
  add = parser.add_argument
  names = list(OPTIMIZERS)
  add(
    '--optimizers', nargs='+', choices=names, default=names, metavar='NAME', help=', '.join(names)
  )
  add(
    '--data',
    default='auto',
    choices=('auto', *vision_data.NAMES),
    help='data set; auto: what is there',
  )
  add('--data-dir', help='folder of the data set, where it needs one')
  add('--train-images', type=int, help='how many; default by data set')
  add('--epochs', type=int, help='default by data set')
  add('--batch-size', type=int, help='default by data set')
  add('--width', type=int, default=16, help='channels of the first stage, %(default)s')
  add('--depth', type=int, default=1, help='blocks in each of the three stages, %(default)s')
  add('--seeds', type=int, nargs='+', help='default by data set; others to tune')
  add(
    '--learning-rates',
    nargs='+',
    type=named_rate,
    default=[],
    metavar='NAME=LR',
    help='peak rates; those not named are the tuned ones',
  )
  add('--weight-decay', type=float, default=WEIGHT_DECAY, help="the matrices', %(default)s")
  add(
    '--alpha',
    type=alpha_value,
    default='default',
    help='number, "default", "layer_type" or "measured"',
  )
  damping_help = 'number, "noise" or "constant"; default: what goes with alpha'
  add('--damping', type=damping_value, help=damping_help)
  choices = ('auto', *solvers.SOLVERS)
  add('--solver', default='auto', choices=choices, help='cholesky: with --alpha 2 alone')
  add('--tolerance', type=float, help="of approximate solvers; default the library's")
  add('--momentum', type=float, default=0.9, help="Spectral Newton's and Muon's, %(default)s")
  add('--update-rms', type=float, nargs='+', default=[0.2], help='0.2; several with --tune')
  choices = ('wide', 'matrix', 'output', 'layer_type')
  add('--rms-of', default=choices[0], choices=choices, help='what has that size')
  add('--tune', action='store_true', help='tune the learning rates in place of comparing')
  add('--grid', type=float, nargs='+', help='learning rates for --tune; default by data set')
  add(
    '--timing-rounds', type=int, default=100, help='runs of each update that are timed, %(default)s'
  )
  add('--output', type=pathlib.Path, help='PNG or JSON; default runs/train_vision(_tuning)')
  add('--quiet', action='store_true', help='no progress bar')
  return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line and returns what it has written as JSON."""
  parser = make_parser()
  args = parser.parse_args(argv)
  if len(args.update_rms) > 1 and not args.tune:
    parser.error('several --update-rms only with --tune')
  if args.solver == 'cholesky' and args.alpha != 2:
    parser.error('--solver cholesky computes alpha = 2 alone: add --alpha 2')
  try:
    data = vision_data.load(args.data, args.data_dir)
  except (FileNotFoundError, ValueError) as error:
    parser.error(str(error))

  task = TASKS[data.name]
  args.epochs = args.epochs or task.epochs
  args.seeds = args.seeds or list(task.tuning_seeds if args.tune else task.seeds)
  args.grid = args.grid or list(task.grid)
  args.learning_rates = dict(args.learning_rates)
  name = 'train_vision_tuning' if args.tune else 'train_vision'
  args.output = (args.output or pathlib.Path('runs', name)).with_suffix('.json')

  data, *validation = vision_data.hold_out(data, task.validation_images)
  count = min(args.train_images or task.train_images, len(data.train_images))
  data = dataclasses.replace(
    data, train_images=data.train_images[:count], train_labels=data.train_labels[:count]
  )
  args.batch_size = min(args.batch_size or task.batch_size, count)
  steps = args.epochs * (count // args.batch_size)

  # Without a terminal rich would fold the tables to 80 columns.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 100)
  start = time.perf_counter()
  if args.tune:
    report = tune(data, (validation[0], validation[1]), steps, args, console)
    written = [args.output]
  else:
    report = compare(data, steps, args, console)
    write_json(args.output, report)
    written = [args.output, args.output.with_suffix('.png')]
    vision_plot.plot(report, OPTIMIZERS, written[1])
  seconds = time.perf_counter() - start
  console.print(f'{", ".join(map(str, written))}, after {seconds:.0f} s', soft_wrap=True)
  return report


if __name__ == '__main__':
  sys.exit(0 if main() else 1)
