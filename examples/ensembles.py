"""Trains hundreds of small networks at once: seeds x dampings x exponents x learning rates.

    python examples/ensembles.py
    python examples/ensembles.py --alphas 0.5 1 1.5 2 --dampings 0.001 0.01 0.1 1 --seeds 0 1 2 3 4
    python examples/ensembles.py --solver polynomial      # Products alone, for an accelerator

What a functional optimizer is for. `spectral_newton` is made from numbers, and those may be
traced: one training, written as a plain function of (seed, damping, α, learning rate), is mapped
over each of them with `jax.vmap` and compiled once. Ends with a table and writes
runs/ensembles.png and .json: the loss on held-out digits over the damping, for each α at its best
learning rate, and the same over where T(σ) = σ / (σ^α + d) turns, σ* = d^(1/α), which is what to
compare exponents at.

Plain JAX and Optax: the network is a dict of arrays. Everything is small on purpose; the digits
come with scikit-learn.
"""

import argparse
import functools
import os
import pathlib
import sys
import time
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import rich.console
import rich.table
import vision_data
from matplotlib.ticker import LogLocator, NullFormatter
from reporting import environment, write_json
from tqdm import tqdm
from vision_plot import PLAIN, STYLE

import spectral_optax
from spectral_optax import solvers

# From outside in, as the results are: loss[learning rate, α, damping, seed].
AXES = ('learning_rate', 'alpha', 'damping', 'seed')

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ('#E69F00', '#009E73', '#0072B2', '#CC79A7', '#D55E00', '#56B4E9')

Params = dict[str, dict[str, jax.Array]]
Data = tuple[jax.Array, jax.Array]

# ---------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------


def init_params(key: jax.Array, sizes: list[int]) -> Params:
  """Dense layers, He's initialisation. Names and shapes say that a kernel is a matrix."""
  keys = jax.random.split(key, len(sizes) - 1)
  return {
    f'dense_{i}': {
      'kernel': jnp.sqrt(2 / m) * jax.random.normal(keys[i], (m, n)),
      'bias': jnp.zeros(n),
    }
    for i, (m, n) in enumerate(itertools.pairwise(sizes))
  }


def apply(params: Params, x: jax.Array) -> jax.Array:
  """(batch, inputs) -> logits (batch, classes)."""
  for i, layer in enumerate(params.values()):
    x = (x if i == 0 else jax.nn.relu(x)) @ layer['kernel'] + layer['bias'][None]
  return x


def loss_and_accuracy(params: Params, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  logits = apply(params, x)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
  return loss, jnp.mean(logits.argmax(-1) == y)


# ---------------------------------------------------------------------------------
# One training, as a function of numbers
# ---------------------------------------------------------------------------------


def make_optimizer(
  learning_rate: Any, alpha: Any, damping: Any, *, steps: int, solver: str
) -> optax.GradientTransformationExtraArgs:
  """Cosine decay from `learning_rate`. All three numbers may be traced."""
  shape = optax.cosine_decay_schedule(1.0, steps)
  return spectral_optax.spectral_newton(
    lambda count: learning_rate * shape(count), alpha=alpha, damping=damping, solver=solver
  )


def start(learning_rate, alpha, damping, seed, *, sizes: list[int], **options: Any) -> Any:
  """Fresh parameters and their optimizer's state."""
  params = init_params(jax.random.key(seed), sizes)
  return params, make_optimizer(learning_rate, alpha, damping, **options).init(params)


def advance(
  carry: Any,
  first: jax.Array,
  data: Data,
  learning_rate,
  alpha,
  damping,
  seed,
  *,
  length: int,
  batch_size: int,
  **options: Any,
) -> tuple[Any, jax.Array]:
  """Steps `first` to `first + length`, and the mean of their losses.

  A seed has its own initialisation and batches, the same for every α, damping and rate:
  what differs between two of those is not chance.
  """
  x, y = data
  optimizer = make_optimizer(learning_rate, alpha, damping, **options)

  def step(carry, count):
    params, state = carry
    key = jax.random.fold_in(jax.random.key(seed), count)
    which = jax.random.randint(key, [batch_size], 0, len(x))
    grad = jax.value_and_grad(loss_and_accuracy, has_aux=True)
    (loss, _), grads = grad(params, x[which], y[which])
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  carry, losses = jax.lax.scan(step, carry, first + jnp.arange(length))
  return carry, losses.mean()


def evaluate(carry: Any, test: Data) -> dict[str, jax.Array]:
  """Of a trained network: held-out loss and accuracy, and how far T may have been off."""
  params, state = carry
  loss, accuracy = loss_and_accuracy(params, *test)
  errors = [jnp.max(error) for error in optax.tree.get(state, 'transfer_error').values()]
  return {
    'test_loss': loss,
    'test_accuracy': accuracy,
    'transfer_error': jnp.max(jnp.stack(errors)),
  }


# ---------------------------------------------------------------------------------
# All of them at once
# ---------------------------------------------------------------------------------


def over_grid(function: Any, others: int = 0) -> Any:
  """A function of (..., learning rate, α, damping, seed), mapped over an array of each.

  Args:
    function: Its last four arguments are numbers.
    others: How many arguments come before; the first, what a training carries, has an axis
      for each of the four, the others are the same for all.

  Returns:
    A function of four vectors; what it gives has four axes in front, as in `AXES`.
  """
  for which in reversed(range(len(AXES))):
    mapped: list[int | None] = [None] * (others + len(AXES))
    mapped[others + which] = 0
    if others:
      mapped[0] = 0
    function = jax.vmap(function, in_axes=tuple(mapped))
  return function


def train_ensemble(
  grid: dict[str, list[float]], train: Data, test: Data, args: argparse.Namespace
) -> dict[str, Any]:
  """Trains one network for each point of the grid.

  Args:
    grid: Values by name, see `AXES`.
    train: Images (count, pixels) and labels.
    test: Likewise.
    args: See `make_parser`.

  Returns:
    Arrays: `train_losses` (chunks, *grid), a chunk being `args.every` steps; `test_loss`,
    `test_accuracy` and `transfer_error` (*grid).
  """
  options = {'steps': args.steps, 'solver': args.solver}
  numbers = [jnp.asarray(grid[name], jnp.float32) for name in AXES[:-1]]
  numbers.append(jnp.asarray(grid['seed'], jnp.uint32))
  sizes = [train[0].shape[1], *[args.width] * args.depth, 10]
  carry = jax.jit(over_grid(functools.partial(start, sizes=sizes, **options)))(*numbers)
  some = functools.partial(advance, length=args.every, batch_size=args.batch_size, **options)
  # Compiled once: the number of the first step is an argument, so is the data.
  program = jax.jit(over_grid(some, others=3), donate_argnums=0)

  networks, losses = int(np.prod([len(values) for values in grid.values()])), []
  with tqdm(total=args.steps, desc=f'{networks} networks', disable=args.quiet) as bar:
    for first in range(0, args.steps, args.every):
      carry, loss = program(carry, jnp.asarray(first), train, *numbers)
      losses.append(np.asarray(loss))  # Waits for the steps.
      bar.set_postfix({'median loss': f'{np.nanmedian(losses[-1]):.4f}'}, refresh=False)
      bar.update(args.every)

  finish = lambda carry: evaluate(carry, test)
  for _ in AXES:
    finish = jax.vmap(finish)
  return {'train_losses': np.stack(losses), **jax.device_get(jax.jit(finish)(carry))}


# ---------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------


def best_rates(test_loss: np.ndarray) -> np.ndarray:
  """Which learning rate is best for each (α, damping), by the mean over seeds."""
  means = test_loss.mean(-1)
  return np.argmin(np.where(np.isfinite(means), means, np.inf), axis=0)


def summarise(grid: dict[str, list[float]], results: dict[str, Any]) -> list[dict[str, Any]]:
  """One row for each (α, damping), at its best learning rate."""
  best, rows = best_rates(results['test_loss']), []
  for i, alpha in enumerate(grid['alpha']):
    for j, damping in enumerate(grid['damping']):
      names = ('test_loss', 'test_accuracy', 'transfer_error')
      loss, accuracy, error = (results[name][best[i, j], i, j] for name in names)
      rows.append(
        {
          'alpha': alpha,
          'damping': damping,
          'turn': damping ** (1 / alpha) if alpha else None,
          'learning_rate': grid['learning_rate'][best[i, j]],
          'test_loss': [float(x) for x in loss],
          'test_accuracy': [float(x) for x in accuracy],
          'transfer_error': float(error.max()),
        }
      )
  return rows


def results_table(rows: list[dict[str, Any]], report: dict[str, Any]) -> rich.table.Table:
  seeds = len(report['grid']['seed'])
  several = seeds > 1
  table = rich.table.Table(
    title=f'{report["networks"]} networks in {report["seconds"]:.0f} s, {report["task"]["steps"]}'
    ' steps each',
    caption=f'{"Mean ± standard deviation of" if several else "Of"} {seeds} seed(s); the learning'
    ' rate is the best of the grid, chosen on the loss that is shown.',
  )
  approximate = any(row['transfer_error'] > 0 for row in rows)
  headings = ['α', 'damping', 'σ*', 'rate', 'loss, held-out', 'accuracy %']
  for heading in headings + ['T off by, %'] * approximate:
    table.add_column(heading, justify='right')

  def number(values: list[float], scale: float, digits: int) -> str:
    text = f'{scale * np.mean(values):.{digits}f}'
    return text + (f' ± {scale * np.std(values, ddof=1):.{digits}f}' if several else '')

  means = [np.mean(row['test_loss']) for row in rows]
  least = np.nanmin(means) if np.isfinite(means).any() else None
  for row, mean in zip(rows, means, strict=True):
    table.add_row(
      f'{row["alpha"]:g}',
      f'{row["damping"]:g}',
      f'{row["turn"]:.3f}' if row['turn'] is not None else '',
      f'{row["learning_rate"]:g}',
      number(row['test_loss'], 1, 4),
      number(row['test_accuracy'], 100, 2),
      *[f'{100 * row["transfer_error"]:.1f}'] * approximate,
      style='bold' if mean == least else None,
    )
  return table


def plot(rows: list[dict[str, Any]], report: dict[str, Any], path: pathlib.Path) -> None:
  """The held-out loss over d, and over σ*: means of the seeds, and their range."""
  with plt.rc_context(STYLE):
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), dpi=150, sharey=True, layout='constrained')
    for i, alpha in enumerate(report['grid']['alpha']):
      own = sorted((r for r in rows if r['alpha'] == alpha), key=lambda r: r['damping'])
      losses = np.array([row['test_loss'] for row in own])
      style: Any = {'color': COLOURS[i % len(COLOURS)]}
      for axes, name in zip(panels, ('damping', 'turn'), strict=True):
        if own[0][name] is None:  # α = 0 turns nowhere.
          continue
        x = np.array([row[name] for row in own])
        axes.fill_between(x, losses.min(-1), losses.max(-1), alpha=0.18, linewidth=0, **style)
        axes.plot(x, losses.mean(-1), marker='o', markersize=4, label=f'α = {alpha:g}', **style)
    panels[0].set_xlabel('damping d')
    panels[1].set_xlabel('where T turns over, σ* = d$^{1/α}$, in units of the RMS of σ')
    panels[0].set_ylabel('held-out loss at the best learning rate')
    for axes in panels:
      axes.set_xscale('log')
      axes.xaxis.set_major_formatter(PLAIN)
    panels[0].set_yscale('log')
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(PLAIN)
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].legend()
    seeds = len(report['grid']['seed'])
    figure.suptitle(
      f'Digits: {report["networks"]} networks, one compiled program; mean and range of'
      f' {seeds} seed{"s" if seeds > 1 else ""}',
      fontsize=13,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description='Many small networks in one compiled program.')
  add = parser.add_argument
  add('--alphas', type=float, nargs='+', default=[1.0, 1.5, 2.0], help='1 1.5 2')
  dampings, rates = [0.001, 0.01, 0.1, 1.0, 10.0], [0.0025, 0.01, 0.04, 0.16]
  add('--dampings', type=float, nargs='+', default=dampings, help='0.001 0.01 0.1 1 10')
  add('--learning-rates', type=float, nargs='+', default=rates, help='0.0025 0.01 0.04 0.16')
  add('--seeds', type=int, nargs='+', default=[0, 1, 2, 3], help='0 1 2 3')
  add('--steps', type=int, default=200, help='%(default)s')
  add('--every', type=int, default=10, help='steps from one report to the next, %(default)s')
  add('--batch-size', type=int, default=64, help='%(default)s')
  add('--width', type=int, default=32, help='%(default)s')
  add('--depth', type=int, default=2, help='hidden layers, %(default)s')
  choices = ('auto', *(name for name in solvers.SOLVERS if name != 'cholesky'))
  add('--solver', default='gram', choices=choices, help='%(default)s, which is exact')
  add('--output', type=pathlib.Path, help='PNG or JSON; default runs/ensembles')
  add('--quiet', action='store_true', help='no progress bar')
  return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line and returns what it has written as JSON."""
  parser = make_parser()
  args = parser.parse_args(argv)
  for name in ('steps', 'every', 'batch_size', 'width', 'depth'):
    if getattr(args, name) < 1:
      parser.error(f'--{name.replace("_", "-")} must be at least 1')
  if args.steps % args.every:
    parser.error(f'--steps {args.steps} is no multiple of --every {args.every}')
  # A traced number cannot be looked at: here is where a bad one is caught.
  for name, least in (('alphas', 0.0), ('dampings', 0.0), ('learning_rates', 0.0), ('seeds', 0)):
    values = getattr(args, name)
    if not all(np.isfinite(x) and x >= least for x in values):
      parser.error(f'--{name.replace("_", "-")} must be finite and not negative, got {values}')
    if len(set(values)) < len(values):
      parser.error(f'--{name.replace("_", "-")} has a value twice: {values}')
  output = (args.output or pathlib.Path('runs', 'ensembles')).with_suffix('.json')

  data = vision_data.load('digits')
  flat = lambda images: jnp.asarray(images.reshape(len(images), -1))
  train = flat(data.train_images), jnp.asarray(data.train_labels)
  test = flat(data.test_images), jnp.asarray(data.test_labels)
  grid = {
    'learning_rate': args.learning_rates,
    'alpha': args.alphas,
    'damping': args.dampings,
    'seed': args.seeds,
  }
  begin = time.perf_counter()
  results = train_ensemble(grid, train, test, args)
  rows = summarise(grid, results)
  report: dict[str, Any] = {
    'task': {
      'data': data.name,
      'train_images': len(train[1]),
      'test_images': len(test[1]),
      **{k: getattr(args, k) for k in ('steps', 'every', 'batch_size', 'width', 'depth', 'solver')},
    },
    'axes': AXES,
    'grid': grid,
    'networks': int(results['test_loss'].size),
    'seconds': time.perf_counter() - begin,
    'best': rows,
    **{name: values.tolist() for name, values in results.items()},
    'environment': environment(),
  }
  # Without a terminal rich would fold the table to 80 columns.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 100)
  console.print(results_table(rows, report))
  edges = {min(args.learning_rates), max(args.learning_rates)}
  at_the_edge = sum(row['learning_rate'] in edges for row in rows)
  if at_the_edge and len(args.learning_rates) > 2:
    console.print(
      f'{at_the_edge} of {len(rows)} best rates are at the edge of the grid: extend it with'
      ' --learning-rates.'
    )
  write_json(output, report)
  plot(rows, report, output.with_suffix('.png'))
  console.print(f'{output}, {output.with_suffix(".png")}', soft_wrap=True)
  return report


if __name__ == '__main__':
  sys.exit(0 if main() else 1)
