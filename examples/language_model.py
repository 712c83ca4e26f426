"""Trains a small GPT on the bytes of Python's standard library with Spectral Newton.

    python examples/language_model.py
    python examples/language_model.py --optimizers spectral_newton adamw muon --seeds 0 1
    python examples/language_model.py --alpha measured --measure-every 50
    python examples/language_model.py --depth 8 --width 128 --steps 2000

Ends with a table and writes runs/language_model.png and .json. The layers are stacked and
scanned over (`nnx.scan`), so that a deep network compiles as fast as a shallow one. A stacked
kernel is one parameter and, to Spectral Newton, as many matrices as there are layers: nothing need
be said about it, and `--alpha measured` finds an α for each of them.

The optimizers share initialisation, order of text, schedule (linear warm-up, cosine decay) and
weight decay; only the update differs. `make_optimizer` is where that is. Their learning rates
are where to start (`RATES`), not tuned: this is an example, not a comparison.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import rich.console
import rich.table
import stdlib_bytes
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from reporting import environment, write_json
from tqdm import tqdm
from train_vision import OPTIMIZERS, alpha_value, as_pure, damping_value, named_rate
from vision_plot import COLOURS, GREY, PLAIN, STYLE, smooth

import spectral_optax
from spectral_optax import layout

# Peak learning rates to start from.
RATES = {'spectral_newton': 0.01, 'adamw': 0.01, 'muon': 0.01}
MOMENTUM = 0.9  # Spectral Newton's default, and better for Muon too over so few steps.

# Of each batch, to measure curvature on.
MEASURED_SEQUENCES = 4

# Optax's default for AdamW. On the matrices alone, for all three.
WEIGHT_DECAY = 1e-4

# ---------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------


class Block(nnx.Module):
  """Causal attention, then two dense layers; each behind a norm, around both a skip."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    self.norm2 = nnx.LayerNorm(width, rngs=rngs)
    self.up = nnx.Linear(width, 4 * width, rngs=rngs)
    self.down = nnx.Linear(4 * width, width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    mask = nnx.make_causal_mask(jnp.zeros(x.shape[:2]))
    x = x + self.attention(self.norm1(x), mask=mask)
    return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
  """Bytes in, logits of the byte after each out."""

  def __init__(self, *, context: int, width: int, depth: int, heads: int, rngs: nnx.Rngs):
    self.embed = nnx.Embed(256, width, rngs=rngs)
    self.pos_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (context, width)))
    # Every parameter of `blocks` has one axis more, in front: the layers.
    make = nnx.vmap(lambda rngs: Block(width, heads, rngs=rngs))
    self.blocks = nnx.split_rngs(splits=depth)(make)(rngs)
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    x = scan(self.embed(x) + self.pos_embedding[...][None], self.blocks)
    return self.head(self.norm(x))


# ---------------------------------------------------------------------------------
# The optimizers
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """Equal settings share one compiled step."""

  name: str
  learning_rate: float
  steps: int
  weight_decay: float = WEIGHT_DECAY
  alpha: float | str = 'default'
  damping: float | str | None = None
  rms_of: str = 'wide'
  measure_every: int = 100


@functools.cache
def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
  """The three of them. Spectral Newton finds out for itself what is a matrix, stacked or not."""
  peak, decay = settings.learning_rate, settings.weight_decay
  warmup = max(1, settings.steps // 20)
  shape = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(settings.steps, warmup + 1))
  schedule = lambda count: shape(count + 1)
  if settings.name == 'adamw':
    return optax.adamw(schedule, weight_decay=decay, mask=is_matrix)
  if settings.name == 'muon':
    # Every layer's own matrix, and updates of AdamW's size: Muon at its best.
    return optax.contrib.muon(
      schedule,
      beta=MOMENTUM,
      weight_decay=decay,
      muon_weight_dimension_numbers=spectral_optax.weight_dimension_numbers,
      consistent_rms=0.2,
    )
  alpha: Any = settings.alpha
  if alpha == 'measured':
    alpha = spectral_optax.measured_alpha(settings.measure_every)
  return spectral_optax.spectral_newton(
    schedule,
    alpha=alpha,
    damping=settings.damping,
    rms_of=settings.rms_of,
    momentum=MOMENTUM,
    weight_decay=decay,
  )


def is_matrix(params: Any) -> Any:
  """Not by the number of axes: a stacked bias has two."""
  stop = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
  numbers = spectral_optax.weight_dimension_numbers(params)
  return jax.tree.map(lambda n: n is not None, numbers, is_leaf=stop)


# ---------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------


def loss_fn(model: GPT, x: jax.Array, y: jax.Array) -> jax.Array:
  """Mean cross entropy in nats per byte."""
  return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def loss_of_few(model: GPT, x: jax.Array, y: jax.Array) -> Callable[[nnx.State], jax.Array]:
  """The loss of a few sequences as a function of the parameters, to measure its curvature.

  What that costs grows with their number.
  """
  graph, _, rest = nnx.split(model, nnx.Param, ...)

  def value_fn(params: nnx.State) -> jax.Array:
    copied = nnx.merge(graph, params, rest, copy=True)
    return loss_fn(copied, x[:MEASURED_SEQUENCES], y[:MEASURED_SEQUENCES])

  return value_fn


@nnx.jit(donate_argnames=('model', 'optimizer'))
def train_step(model: GPT, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
  loss, grads = nnx.value_and_grad(loss_fn)(model, x, y)
  # Looked at with `--alpha measured` alone.
  optimizer.update(model, grads, value_fn=loss_of_few(model, x, y))
  return loss


@nnx.jit
def evaluation_step(model: GPT, x: jax.Array, y: jax.Array) -> jax.Array:
  return loss_fn(model, x, y)


def evaluate(model: GPT, text: np.ndarray, context: int, batch_size: int) -> float:
  """Mean loss over all of the text, in sequences that do not overlap; what is left is dropped."""
  starts = np.arange(0, len(text) - context, context)
  count = len(starts) // batch_size
  windows = text[starts[: count * batch_size, None] + np.arange(context + 1)].astype(np.int32)
  batches = jnp.split(jnp.asarray(windows), count)
  losses = [float(evaluation_step(model, some[:, :-1], some[:, 1:])) for some in batches]
  return float(np.mean(losses))


@dataclasses.dataclass
class Run:
  """One training."""

  seed: int
  model: GPT
  optimizer: nnx.Optimizer
  losses: list[float]  # Of every step's batch, before the step.
  step_seconds: list[float]
  validation_loss: float


def train(
  settings: OptimizerSettings,
  seed: int,
  data: stdlib_bytes.Bytes,
  held_out: stdlib_bytes.Bytes,
  args: argparse.Namespace,
) -> Run:
  """Trains from a fresh initialisation, and evaluates once, at the end."""
  model = GPT(
    context=args.context,
    width=args.width,
    depth=args.depth,
    heads=args.heads,
    rngs=nnx.Rngs(seed),
  )
  optimizer = nnx.Optimizer(model, make_optimizer(settings), wrt=nnx.Param)
  rng = np.random.default_rng(seed)
  losses, seconds = [], []
  title = f'{OPTIMIZERS[settings.name]}, seed {seed}'
  with tqdm(total=settings.steps, desc=title, disable=args.quiet, mininterval=0.5) as bar:
    for _ in range(settings.steps):
      x, y = map(jnp.asarray, data.sample(args.batch_size, rng))
      start = time.perf_counter()
      losses.append(float(train_step(model, optimizer, x, y)))  # Waits for the step.
      seconds.append(time.perf_counter() - start)
      rate = args.batch_size * args.context / np.mean(seconds[-20:])
      bar.set_postfix(
        {'loss': f'{np.mean(losses[-20:]):.3f}', 'bytes/s': f'{rate:,.0f}'}, refresh=False
      )
      bar.update()
  validation = evaluate(model, held_out.text, args.context, args.batch_size)
  return Run(seed, model, optimizer, losses, seconds, validation)


# ---------------------------------------------------------------------------------
# What is known at the end
# ---------------------------------------------------------------------------------


def spectra(run: Run) -> dict[str, list[dict[str, Any]]]:
  """Every parameter's matrices, one a layer: σ of the momentum over its RMS, and T(σ)."""
  state = as_pure(run.optimizer.opt_state)
  is_momentum = lambda x: isinstance(x, spectral_optax.MomentumState)
  (momentum,) = filter(is_momentum, jax.tree.leaves(state, is_leaf=is_momentum))
  alphas, dampings = (optax.tree.get(state, name) for name in ('alpha', 'damping'))
  leaves = layout.leaves_by_path(momentum.mu)
  found = {}
  # Inferred from all names and shapes that are there: biases say how layers are stacked.
  for path, view in layout.matrix_views(as_pure(nnx.state(run.model, nnx.Param))).items():
    matrices = np.asarray(view.to_matrices(leaves[path]), np.float64)
    sigmas = np.linalg.svd(matrices, compute_uv=False)
    sigmas /= np.maximum(np.sqrt(np.mean(sigmas**2, -1, keepdims=True)), np.finfo(float).tiny)
    own = lambda of, path=path, like=sigmas[:, 0]: np.broadcast_to(np.ravel(of[path]), like.shape)
    found[path] = [
      {
        'alpha': float(alpha),
        'damping': float(damping),
        'sigma': sigma.tolist(),
        'transferred': np.asarray(spectral_optax.transfer(sigma, alpha, damping)).tolist(),
      }
      for sigma, alpha, damping in zip(sigmas, own(alphas), own(dampings), strict=True)
    ]
  return found


def measured(run: Run) -> dict[str, Any]:
  """With `--alpha measured`: what was found, and R², one number a layer; None where no fit is."""
  state = as_pure(run.optimizer.opt_state)
  columns = [optax.tree.get(state, name) for name in ('measured_alpha', 'measured_r_squared')]
  if any(column is None for column in columns):
    return {}
  of = lambda column, path: np.ravel(column[path]).astype(float).tolist()
  alphas, fits = columns
  return {path: {'alpha': of(alphas, path), 'r_squared': of(fits, path)} for path in alphas}


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
  """Loss curves; and, of Spectral Newton, what T makes of the spectra of all layers."""
  found = report['spectra']
  with plt.rc_context(STYLE):
    figure = plt.figure(figsize=(12, 5.4) if found else (6, 5.4), dpi=150, layout='constrained')
    if found:
      halves: Any = figure.subfigures(1, 2, width_ratios=[5, 7])
      _plot_losses(halves[0].subplots(), report)
      _plot_spectra(halves[1], found)
    else:
      _plot_losses(figure.subplots(), report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _plot_losses(axes: Any, report: dict[str, Any]) -> None:
  for name, result in report['optimizers'].items():
    curves = smooth(np.array([run['train_losses'] for run in result['runs']], float))
    steps = np.arange(1, curves.shape[1] + 1)
    label = f'{OPTIMIZERS[name]}: {result["validation_loss"]["mean"]:.3f}'
    if len(curves) > 1:
      label += f' ± {result["validation_loss"]["std"]:.3f}'
      axes.fill_between(steps, curves.min(0), curves.max(0), color=COLOURS[name], alpha=0.18, lw=0)
    axes.plot(steps, curves.mean(0), color=COLOURS[name], linewidth=2, label=label)
  task = report['task']
  axes.set_xlabel('step')
  axes.set_ylabel('training loss, nats per byte, running mean')
  axes.set_title(f'Bytes of Python: {task["depth"]} layers of width {task["width"]}', fontsize=13)
  axes.legend(title='validation loss', alignment='left', loc='upper right')


def _plot_spectra(figure: Any, found: dict[str, list[dict[str, Any]]]) -> None:
  figure.suptitle('Momentum at the end, one line a layer: σ, and T(σ) without noise', fontsize=13)
  wanted = ('query', 'value', 'out', 'up', 'down', 'head')
  names = [next(path for path in found if path.split('/')[-2] == name) for name in wanted]
  panels = figure.subplots(2, 3, sharey=True)
  top = 1.5 * max(
    max(layer[k]) for n in names for layer in found[n] for k in ('sigma', 'transferred')
  )
  for axes, name in zip(panels.flat, names, strict=True):
    layers = found[name]
    for i, layer in enumerate(layers):
      sigma, transferred = np.array(layer['sigma']), np.array(layer['transferred'])
      # Without directions that are there by rounding alone.
      there = sigma > 1e-4 * sigma.max(initial=0)
      rank = np.arange(1, len(sigma) + 1)[there]
      # From light (the first layer) to dark.
      style = {'alpha': (i + 1) / len(layers), 'linewidth': 1.5}
      axes.plot(rank, sigma[there], color=GREY, label='σ$_k$, over its RMS', **style)
      axes.plot(
        rank,
        transferred[there],
        color=COLOURS['spectral_newton'],
        label='T(σ$_k$) = σ$_k$ / (σ$_k^α$ + d)',
        **style,
      )
    alphas = sorted({round(layer['alpha'], 2) for layer in layers})
    text = f'{alphas[0]:g}' if len(alphas) == 1 else f'{alphas[0]:g} to {alphas[-1]:g}'
    axes.set_title(f'{name.split("/")[-2]}, α = {text}')
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_ylim(0.02, top)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.minorticks_off()
  for axes in panels[-1]:
    axes.set_xlabel('rank k')
  handles, labels = panels.flat[0].get_legend_handles_labels()
  figure.legend(handles[-2:], labels[-2:], loc='outside lower center', ncols=2, fontsize=11.5)


def results_table(report: dict[str, Any]) -> rich.table.Table:
  task = report['task']
  several = len(task['seeds']) > 1
  seeds = f'mean ± standard deviation of {len(task["seeds"])} seeds' if several else 'one seed'
  table = rich.table.Table(
    title=f'{task["depth"]} scanned layers of width {task["width"]}, {task["steps"]} steps of'
    f' {task["batch_size"]} x {task["context"]} bytes',
    caption=f'Validation: {task["validation_bytes"]:,} bytes, held out, {seeds}. Step: median,'
    ' gradient and update, without compilation. Learning rates are not tuned.',
  )
  table.add_column('optimizer')
  for heading in ('peak rate', 'nats/byte', 'bits/byte', 'ms/step'):
    table.add_column(heading, justify='right')
  for name, result in report['optimizers'].items():
    loss = result['validation_loss']
    number = lambda scale, loss=loss: (
      f'{scale * loss["mean"]:.3f}' + (f' ± {scale * loss["std"]:.3f}' if several else '')
    )
    table.add_row(
      OPTIMIZERS[name],
      f'{result["learning_rate"]:g}',
      number(1.0),
      number(float(1 / np.log(2))),
      f'{result["ms_per_step"]:.1f}',
    )
  return table


def compare(args: argparse.Namespace) -> dict[str, Any]:
  """Trains every optimizer with every seed."""
  data, held_out = stdlib_bytes.hold_out(stdlib_bytes.load(args.context, limit=args.text_bytes))
  rates = {**RATES, **args.learning_rates}
  runs: dict[str, list[Run]] = {}
  for name in args.optimizers:
    settings = OptimizerSettings(name, rates[name], args.steps, args.weight_decay)
    if name == 'spectral_newton':
      settings = dataclasses.replace(
        settings,
        alpha=args.alpha,
        damping=args.damping,
        rms_of=args.rms_of,
        measure_every=args.measure_every,
      )
    runs[name] = [train(settings, seed, data, held_out, args) for seed in args.seeds]
  spread = lambda values: {
    'mean': float(np.mean(values)),
    'std': float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
  }
  own = runs['spectral_newton'][-1] if 'spectral_newton' in runs else None
  return {
    'task': {
      **{k: getattr(args, k) for k in ('context', 'width', 'depth', 'heads', 'steps')},
      'batch_size': args.batch_size,
      'weight_decay': args.weight_decay,
      'train_bytes': len(data.text),
      'validation_bytes': len(held_out.text),
      'seeds': list(args.seeds),
    },
    'spectral_newton': {
      'alpha': args.alpha,
      'damping': args.damping,
      'rms_of': args.rms_of,
      'measure_every': args.measure_every if args.alpha == 'measured' else None,
    },
    'optimizers': {
      name: {
        'learning_rate': rates[name],
        'validation_loss': spread([run.validation_loss for run in of]),
        # Not the first step, which compiles.
        'ms_per_step': 1e3 * float(np.median([s for run in of for s in run.step_seconds[1:]])),
        'runs': [
          {'seed': r.seed, 'validation_loss': r.validation_loss, 'train_losses': r.losses}
          for r in of
        ],
      }
      for name, of in runs.items()
    },
    # Of the last seed.
    'spectra': spectra(own) if own else {},
    'measured': measured(own) if own else {},
    'environment': environment(),
  }


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description='A small GPT on bytes, layers scanned over.')
  add = parser.add_argument
  names = list(OPTIMIZERS)
  add(
    '--optimizers',
    nargs='+',
    choices=names,
    default=names[:1],
    metavar='NAME',
    help=f'{", ".join(names)}; default the first',
  )
  add('--steps', type=int, default=400, help='%(default)s')
  add('--batch-size', type=int, default=16, help='sequences of a step, %(default)s')
  add('--context', type=int, default=64, help='bytes of a sequence, %(default)s')
  add('--width', type=int, default=64, help='%(default)s')
  add('--depth', type=int, default=4, help='layers, %(default)s')
  add('--heads', type=int, default=4, help='of attention, %(default)s')
  add('--text-bytes', type=int, default=2_000_000, help='how much text at most, %(default)s')
  add('--seeds', type=int, nargs='+', default=[0], help='default 0')
  add(
    '--learning-rates',
    nargs='+',
    type=named_rate,
    default=[],
    metavar='NAME=LR',
    help='peak rates; those not named are 0.01',
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
  choices = ('wide', 'matrix', 'output', 'layer_type')
  add('--rms-of', default=choices[0], choices=choices, help="whose updates have AdamW's size")
  add('--measure-every', type=int, default=100, help='steps, with --alpha measured, %(default)s')
  add('--output', type=pathlib.Path, help='PNG or JSON; default runs/language_model')
  add('--quiet', action='store_true', help='no progress bar')
  return parser


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line and returns what it has written as JSON."""
  parser = make_parser()
  args = parser.parse_args(argv)
  for name in ('steps', 'batch_size', 'context', 'width', 'depth', 'heads', 'measure_every'):
    if getattr(args, name) < 1:
      parser.error(f'--{name.replace("_", "-")} must be at least 1')
  if args.width % args.heads:
    parser.error(f'--width {args.width} is no multiple of --heads {args.heads}')
  # A block of held-out text has a 64th of it, and fills a batch.
  least = 64 * (args.batch_size * args.context + 1)
  if args.text_bytes < least:
    parser.error(f'--text-bytes must be at least {least} for these batches')
  args.learning_rates = dict(args.learning_rates)
  output = (args.output or pathlib.Path('runs', 'language_model')).with_suffix('.json')

  # Without a terminal rich would fold the table to 80 columns.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 100)
  start = time.perf_counter()
  report = compare(args)
  console.print(results_table(report))
  write_json(output, report)
  plot(report, output.with_suffix('.png'))
  seconds = time.perf_counter() - start
  written = f'{output}, {output.with_suffix(".png")}'
  console.print(f'{written}, after {seconds:.0f} s', soft_wrap=True)
  return report


if __name__ == '__main__':
  sys.exit(0 if main() else 1)
