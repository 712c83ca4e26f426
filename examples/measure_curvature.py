"""Trains a residual network on real images, and measures its curvature on the way.

    python examples/measure_curvature.py                  # Fashion-MNIST, or the digits
    python examples/measure_curvature.py --points 0 10 30 100 300 --images 2048
    python examples/measure_curvature.py --data digits --epochs 5 --width 8

At a few points of training, every layer's gradient is decomposed over the same images, and
the exact curvature measured along its leading singular directions. Written to
runs/measure_curvature: a report as JSON for each point, the tables of the last one, its
plots, and how α moved. The network, the data and the optimizers are those of train_vision.py.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

# As in train_vision.py. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import train_vision
import vision_data
from flax import nnx
from matplotlib.figure import Figure
from reporting import environment, write_json
from tqdm import tqdm

from spectral_optax import curvature
from spectral_optax.curvature import plots

PLOTS = ('curvature', 'spectral_transfer', 'depth', 'rank_profile', 'transfer')


def main(argv: list[str] | None = None) -> dict[int, curvature.CurvatureReport]:
  """Runs the command line; returns the reports by step."""
  args = parse(argv)
  # Without a terminal rich would fold the tables to 80 columns.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 150)
  start = time.perf_counter()
  reports, losses = train_and_measure(args)
  for step, report in reports.items():
    report.to_json(args.output / f'step_{step}.json')
  last = list(reports.values())[-1]
  console.print(course_table(reports))
  console.print(last.table())
  console.print(last.table('type'))
  tables = '\n\n'.join(last.table(by, 'markdown') for by in ('layer', 'type'))
  (args.output / 'tables.md').write_text(tables + '\n', encoding='utf-8')
  for kind in PLOTS + (('alignment',) if last.alignment else ()):
    last.plot(kind).savefig(args.output / f'{kind}.png')
  plot_course(reports).savefig(args.output / 'course.png')
  write_json(
    args.output / 'summary.json',
    {
      'task': {
        name: getattr(args, name)
        for name in (
          *('data', 'train_images', 'steps', 'batch_size', 'width', 'depth', 'optimizer'),
          *('learning_rate', 'seed', 'images', 'measure_batch_size', 'top_k'),
        )
      },
      'course': {
        step: {
          'loss': report.loss,
          'alpha': {x.name: x.alpha.exponent for x in report.layers},
          'r_squared': {x.name: x.alpha.r_squared for x in report.layers},
          'negative': {x.name: x.num_negative for x in report.layers},
        }
        for step, report in reports.items()
      },
      'alpha_tree': last.alpha_tree(),
      'train_losses': losses,
      'environment': environment(),
    },
  )
  seconds = time.perf_counter() - start
  console.print(f'{args.output}, after {seconds:.0f} s', soft_wrap=True)
  return reports


# ---------------------------------------------------------------------------------
# Training and measuring
# ---------------------------------------------------------------------------------


def train_and_measure(
  args: argparse.Namespace,
) -> tuple[dict[int, curvature.CurvatureReport], list[float]]:
  """A training that stops at `args.points` to measure."""
  data = args.dataset
  images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
  model = train_vision.ResNet(
    images.shape[-1],
    data.num_classes,
    width=args.width,
    depth=args.depth,
    stride=2 if images.shape[1] > 16 else 1,
    rngs=nnx.Rngs(args.seed),
  )
  settings = train_vision.OptimizerSettings(args.optimizer, args.steps)
  optimizer = nnx.Optimizer(model, train_vision.scheduled_optimizer(settings), wrt=nnx.Param)
  optimizer.opt_state.hyperparams['learning_rate'][...] = args.learning_rate  # type: ignore

  # One function for all measurements, and the running averages in the batch: nothing is
  # compiled twice.
  graph = nnx.graphdef(model)

  def mean_loss(network, x, y):
    return train_vision.loss_and_logits(network, x, y)[0]

  def loss_fn(params, batch):
    rest, x, y = batch
    return mean_loss(nnx.merge(graph, params, rest, copy=True), x, y)

  def measure() -> curvature.CurvatureReport:
    _, params, rest = nnx.split(model, nnx.Param, ...)
    size = args.measure_batch_size
    starts = range(0, args.images, size)
    report = curvature.measure(
      loss_fn,
      params,
      top_k=args.top_k,
      batches=[(rest, images[i : i + size], labels[i : i + size]) for i in starts],
      memory_budget=args.memory_budget,
      progress=not args.quiet,
    )
    if size < args.images:  # The decomposition is of one batch.
      return report
    captured = curvature.flax.capture(model, mean_loss, images[:size], labels[:size])
    return curvature.align_report(report, captured)

  reports, losses = {}, []
  shuffle, order = np.random.default_rng(args.seed), np.empty(0, np.int64)
  with tqdm(total=args.steps, desc='training', disable=args.quiet, mininterval=0.5) as bar:
    for step in range(args.steps + 1):
      if step in args.points:
        reports[step] = measure()
      if step == args.steps:
        break
      if len(order) < args.batch_size:
        order = shuffle.permutation(len(images))
      batch, order = order[: args.batch_size], order[args.batch_size :]
      loss, _ = train_vision.train_step(model, optimizer, images[batch], labels[batch])
      losses.append(float(loss))
      bar.set_postfix({'loss': f'{np.mean(losses[-20:]):.3f}'}, refresh=False)
      bar.update()
  return reports, losses


# ---------------------------------------------------------------------------------
# How α moved
# ---------------------------------------------------------------------------------


def course_table(reports: dict[int, curvature.CurvatureReport]) -> rich.table.Table:
  table = rich.table.Table(
    title='α by step (R²; negative h of those measured)',
    caption='In brackets: nothing to go by, R² < 0.8 or over a quarter of h negative.',
  )
  table.add_column('layer', no_wrap=True)
  for step, report in reports.items():
    table.add_column(f'step {step}\nloss {report.loss:.3f}', justify='right')
  for rows in zip(*(report.layers for report in reports.values()), strict=True):
    cells = []
    for layer in rows:
      cell = f'{layer.alpha.exponent:.2f}'
      if layer.objection():
        cell = f'({cell})'
      cells.append(f'{cell}  {layer.alpha.r_squared:.2f}  {layer.num_negative:2d}')
    table.add_row(rows[0].name, *cells)
  return table


def plot_course(reports: dict[int, curvature.CurvatureReport]) -> Any:
  """α of each layer along training; hollow where its fit is no good."""
  import matplotlib

  with matplotlib.rc_context(plots.STYLE):
    figure = Figure(figsize=(7, 4.2), dpi=150, layout='constrained')
    axes = figure.subplots()
    steps = list(reports)
    by_layer = list(zip(*(report.layers for report in reports.values()), strict=True))
    colours = matplotlib.colormaps['viridis'](np.linspace(0, 0.92, len(by_layer)))
    for colour, layers in zip(colours, by_layer, strict=True):
      places = np.arange(len(steps))
      alpha = np.array([layer.alpha.exponent for layer in layers])
      axes.plot(places, alpha, color=colour, label=plots.short_name(layers[0].name))
      for place, layer in zip(places, layers, strict=True):
        fill = 'white' if layer.objection() else colour
        axes.plot(place, layer.alpha.exponent, 'o', ms=6, mfc=fill, mec=colour)
    axes.set_xticks(range(len(steps)), [f'{step}' for step in steps])
    axes.set_xlabel('step')
    axes.set_ylabel('curvature exponent α')
    axes.set_title('Hollow: R² < 0.8, or over a quarter of the h$_k$ negative', loc='left')
    figure.legend(loc='outside right center', fontsize=8)
  return figure


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description='Curvature of a residual network, as it is trained.')
  add = parser.add_argument
  add('--data', default='auto', choices=('auto', *vision_data.NAMES), help='data set')
  add('--data-dir', help='folder of the data set, where it needs one')
  add('--train-images', type=int, help='how many; default by data set')
  add('--epochs', type=int, help='default by data set')
  add('--batch-size', type=int, help='in training; default by data set')
  add('--width', type=int, default=16, help='channels of the first stage, %(default)s')
  add('--depth', type=int, default=1, help='blocks in each of the three stages, %(default)s')
  add('--optimizer', default='spectral_newton', choices=list(train_vision.OPTIMIZERS))
  add('--learning-rate', type=float, help='peak; default as tuned for train_vision.py')
  add('--seed', type=int, default=0)
  add('--points', type=int, nargs='+', help='steps to measure at; default 0, 20, 100 and the end')
  add('--images', type=int, default=1024, help='to measure on, %(default)s')
  add('--measure-batch-size', type=int, help='of these at once, default all of them')
  add('--top-k', type=int, default=20, help='singular directions of each layer, %(default)s')
  add('--memory-budget', type=int, default=2**31, help='bytes, %(default)s')
  add('--output', type=pathlib.Path, default=pathlib.Path('runs', 'measure_curvature'))
  add('--quiet', action='store_true', help='no progress bars')
  return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = make_parser()
  args = parser.parse_args(argv)
  try:
    data = vision_data.load(args.data, args.data_dir)
  except (FileNotFoundError, ValueError) as error:
    parser.error(str(error))
  task = train_vision.TASKS[data.name]
  count = min(args.train_images or task.train_images, len(data.train_images))
  args.dataset = dataclasses.replace(
    data, train_images=data.train_images[:count], train_labels=data.train_labels[:count]
  )
  args.data = data.name
  args.train_images = count
  args.batch_size = min(args.batch_size or task.batch_size, count)
  args.images = min(args.images, count)
  args.measure_batch_size = min(args.measure_batch_size or args.images, args.images)
  args.images -= args.images % args.measure_batch_size  # Batches of one size.
  args.steps = (args.epochs or task.epochs) * (count // args.batch_size)
  rates = train_vision.TUNED.get(data.name, train_vision.TUNED['fashion-mnist'])
  args.learning_rate = args.learning_rate or rates[args.optimizer]
  default = [0, 20, 100, args.steps]
  args.points = sorted({p for p in args.points or default if 0 <= p <= args.steps})
  if not args.points:
    parser.error(f'none of --points lies in the {args.steps} steps of the training')
  return args


if __name__ == '__main__':
  main()
