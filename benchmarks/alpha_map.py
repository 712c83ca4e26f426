"""Measures the curvature of every layer of five architectures as they train, on real data.

    python benchmarks/alpha_map.py                    # All of it: under an hour on two cores
    python benchmarks/alpha_map.py --runs mlp-digits gpt-bytes
    python benchmarks/alpha_map.py --quick            # Small networks, to see whether it runs

What A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes", arXiv:2606.02596,
claims of networks, measured on ours: the curvature exponent α by layer type, the spectral
transfer law s = αγ, the participation ratio and its bound, the profiles of the spectra, the
Spectral Alignment Decomposition, what LayerNorm, skips and the number of outputs do to it, and how
all that moves in training. Beside every published figure is ours, and whether they agree.

A measured point is a file under --work; what is there already is not measured again, so that
an interrupted command goes on where it was. Ends with tables (Markdown), plots and JSON in
benchmarks/results/. The verdicts are computed from the figures, by the rule given with each.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'examples'))

import _alpha_claims
import _networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import stdlib_bytes
import train_vision
import vision_data
from flax import nnx
from reporting import environment, write_json
from tqdm import tqdm

from spectral_optax import curvature

RESULTS = pathlib.Path(__file__).parent / 'results' / 'alpha_map.json'
TOP_K = 20
POOL = _networks.POOL


# ---------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
  """A training, and when it is measured.

  Attributes:
    network: Which architecture.
    data: "fashion-mnist", "digits" or "bytes".
    options: Of the network.
    learning_rate: Peak, of AdamW with warm-up and cosine decay.
    batch_size: In training.
    steps: Of training.
    points: Steps to measure at; the last one is added.
    samples: To measure on, the same at each point.
    measured_at_once: Of these, the size of a batch.
    outputs: Of the network on bytes.
    ablation: What is changed, in the runs beside those of the main table; "" in those.
  """

  network: str
  data: str
  options: Mapping[str, Any]
  learning_rate: float
  batch_size: int
  steps: int
  points: tuple[int, ...]
  samples: int = 512
  measured_at_once: int = 256
  outputs: int = 256
  ablation: str = ''

  @property
  def all_points(self) -> list[int]:
    return sorted({p for p in self.points if p < self.steps} | {self.steps})


CONTEXT = 64
VGG_FASHION = (16, POOL, 32, POOL, 64, 64, POOL, 64, 64, 64, 64)
VGG_DIGITS = (16, 32, POOL, 64, 64, POOL, 64, 64, 64, 64)


def main_runs() -> dict[str, Run]:
  """Five architectures, three data sets."""
  fashion = {'batch_size': 128, 'steps': 312, 'points': (0, 20, 78)}  # 78 steps: an epoch.
  digits = {'batch_size': 64, 'steps': 340, 'points': (0, 20, 85)}  # 17 steps.
  gpt = {'batch_size': 32, 'steps': 600, 'points': (0, 20, 150)}
  small = {'width': 48, 'depth': 3, 'heads': 4}
  return {
    'resnet-fashion': Run('resnet', 'fashion-mnist', {'width': 16, 'depth': 2}, 1e-2, **fashion),
    'vgg-fashion': Run(
      'vgg', 'fashion-mnist', {'plan': VGG_FASHION, 'hidden': 64}, 2e-3, **fashion
    ),
    'mlp-fashion': Run('mlp', 'fashion-mnist', {'width': 128, 'depth': 4}, 2e-3, **fashion),
    'vit-fashion': Run('vit', 'fashion-mnist', {'patch': 7, **small}, 3e-3, **fashion),
    'gpt-bytes': Run(
      'gpt', 'bytes', {**small, 'width': 64}, 1e-2, samples=96, measured_at_once=48, **gpt
    ),
    'resnet-digits': Run('resnet', 'digits', {'width': 16, 'depth': 2}, 1e-2, **digits),
    'vgg-digits': Run('vgg', 'digits', {'plan': VGG_DIGITS, 'hidden': 64}, 2e-3, **digits),
    'mlp-digits': Run('mlp', 'digits', {'width': 128, 'depth': 4}, 2e-3, **digits),
    'vit-digits': Run('vit', 'digits', {'patch': 2, **small}, 3e-3, **digits),
  }


def ablation_runs() -> dict[str, Run]:
  """A transformer on bytes, with one thing changed each."""
  base = {'width': 64, 'depth': 2, 'heads': 4}

  def run(name: str, outputs: int = 256, **options: Any) -> Run:
    return Run(
      'gpt',
      'bytes',
      {**base, **options},
      1e-2 if options.get('skip', True) else 3e-3,
      batch_size=32,
      steps=400,
      points=(),
      samples=96,
      measured_at_once=48,
      outputs=outputs,
      ablation=name,
    )

  return {
    'gpt-baseline': run('baseline'),
    'gpt-no-norm': run('no LayerNorm', layer_norm=False),
    'gpt-no-skip': run('no skips', skip=False),
    'gpt-outputs-8': run('8 outputs', 8),
    'gpt-outputs-32': run('32 outputs', 32),
    'gpt-outputs-1024': run('1024 outputs', 1024),
  }


def quick_runs() -> dict[str, Run]:
  """One small network of each kind."""
  few = {'steps': 30, 'points': (0,), 'batch_size': 32, 'samples': 64, 'measured_at_once': 64}
  tiny = {'width': 16, 'depth': 1, 'heads': 2}
  gpt = {**few, 'samples': 16, 'measured_at_once': 16}
  return {
    'resnet-digits': Run('resnet', 'digits', {'width': 4, 'depth': 1}, 1e-2, **few),
    'vgg-digits': Run('vgg', 'digits', {'plan': (8, POOL, 8), 'hidden': 16}, 2e-3, **few),
    'mlp-digits': Run('mlp', 'digits', {'width': 16, 'depth': 2}, 2e-3, **few),
    'vit-digits': Run('vit', 'digits', {'patch': 4, **tiny}, 3e-3, **few),
    'gpt-bytes': Run('gpt', 'bytes', tiny, 1e-2, **gpt),
    'gpt-baseline': Run('gpt', 'bytes', tiny, 1e-2, ablation='baseline', **gpt),
    'gpt-no-norm': Run(
      'gpt', 'bytes', {**tiny, 'layer_norm': False}, 1e-2, ablation='no LayerNorm', **gpt
    ),
  }


def make_network(run: Run, size: int, channels: int, classes: int, seed: int) -> nnx.Module:
  """Of a run, for square images; size, channels and classes do not matter for bytes."""
  rngs, options = nnx.Rngs(seed), run.options
  if run.network == 'gpt':
    return _networks.GPT(CONTEXT, run.outputs, **options, rngs=rngs)
  if run.network == 'resnet':
    stride = 2 if size > 16 else 1
    return train_vision.ResNet(channels, classes, **options, stride=stride, rngs=rngs)
  if run.network == 'mlp':
    return _networks.MLP(size * size * channels, classes, **options, rngs=rngs)
  kind = {'vgg': _networks.VGG, 'vit': _networks.ViT}[run.network]
  return kind(size, channels, classes, **options, rngs=rngs)


class Task:
  """A run's network and its data.

  Attributes:
    model: Fresh.
    draw: A function that gives a batch to train on.
    measured: What to measure on.
  """

  def __init__(self, run: Run, seed: int, folder: str | None):
    rng = np.random.default_rng(seed)
    if run.data == 'bytes':
      data = stdlib_bytes.load(CONTEXT, run.outputs)
      self.draw = lambda: data.sample(run.batch_size, rng)
      self.measured = data.sample(run.samples, np.random.default_rng(seed + 1))
      self.model = make_network(run, 0, 0, 0, seed)
      return
    data = vision_data.load(run.data, folder if run.data == 'fashion-mnist' else None)
    x, y = data.train_images[:10_000], data.train_labels[:10_000]
    order = np.empty(0, np.int64)

    def draw():
      nonlocal order
      if len(order) < run.batch_size:
        order = rng.permutation(len(x))
      batch, order = order[: run.batch_size], order[run.batch_size :]
      return x[batch], y[batch]

    self.draw = draw
    self.measured = x[: run.samples], y[: run.samples]
    self.model = make_network(run, x.shape[1], x.shape[-1], data.num_classes, seed)


def losses_of(logits: jax.Array, y: jax.Array) -> jax.Array:
  """One for each sample: of a sequence, the mean over its positions."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  return losses.reshape(len(losses), -1).mean(1)


# ---------------------------------------------------------------------------------
# Training and measuring
# ---------------------------------------------------------------------------------


def fingerprint(run: Run, seed: int) -> dict[str, Any]:
  """What a measured point was made by; another one is measured again."""
  return json.loads(json.dumps({**dataclasses.asdict(run), 'seed': seed, 'top_k': TOP_K}))


def perform(name: str, run: Run, args: argparse.Namespace) -> dict[int, curvature.CurvatureReport]:
  """Reports by step: measured now, or read where they have been."""
  folder = args.work / name
  made_by, reports = fingerprint(run, args.seed), {}
  for step in run.all_points:
    path = folder / f'step_{step}.json'
    if path.is_file():
      report = curvature.CurvatureReport.from_json(path)
      if report.settings.get('run') == made_by:
        reports[step] = report
  if len(reports) < len(run.all_points):
    fresh = train_and_measure(name, run, args, skip=set(reports))
    for step, report in fresh:
      settings = {**report.settings, 'run': made_by}
      reports[step] = dataclasses.replace(report, settings=settings)
      # Written at one go, so that an interruption leaves no half of a file.
      path = folder / f'step_{step}.json'
      reports[step].to_json(path.with_suffix('.part'))
      path.with_suffix('.part').replace(path)
  return dict(sorted(reports.items()))


def train_and_measure(
  name: str, run: Run, args: argparse.Namespace, skip: set[int]
) -> Iterable[tuple[int, curvature.CurvatureReport]]:
  """One training, measured at its points."""
  task = Task(run, args.seed, args.data_dir)
  model = task.model
  shape = optax.warmup_cosine_decay_schedule(
    0, run.learning_rate, max(run.steps // 20, 1), run.steps
  )
  matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  optimizer = nnx.Optimizer(
    model, optax.adamw(shape, weight_decay=1e-4, mask=matrices), wrt=nnx.Param
  )

  @nnx.jit
  def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: losses_of(m(x, train=True), y).mean())(model)
    optimizer.update(model, grads)
    return loss

  measure = measurement(model, run, task.measured)
  points = [p for p in run.all_points if p not in skip]
  with tqdm(total=points[-1], desc=name, disable=args.quiet, mininterval=0.5) as bar:
    for step in range(points[-1] + 1):
      if step in points:
        bar.set_postfix_str(f'measuring at {step}')
        start = time.perf_counter()
        report = measure()
        seconds = time.perf_counter() - start
        yield (
          step,
          dataclasses.replace(report, settings={**report.settings, 'seconds': round(seconds, 1)}),
        )
      if step == points[-1]:
        break
      loss = train_step(model, optimizer, *map(jnp.asarray, task.draw()))
      if step % 10 == 0:
        bar.set_postfix_str(f'loss {float(loss):.3f}')
      bar.update()


def measurement(
  model: nnx.Module, run: Run, measured: tuple[np.ndarray, np.ndarray]
) -> Callable[[], curvature.CurvatureReport]:
  """A function that measures the model as it is. Its programs are compiled once."""
  graph = nnx.graphdef(model)
  batches = [
    tuple(jnp.asarray(a[i : i + run.measured_at_once]) for a in measured)
    for i in range(0, run.samples, run.measured_at_once)
  ]

  # As in training, normalisation takes the statistics of the batch.
  def logits_of(params, batch):
    rest, x, _ = batch
    return nnx.merge(graph, params, rest, copy=True)(x, train=True)

  def loss_of_logits(logits, batch):
    return losses_of(logits, batch[2]).mean()

  def loss_fn(params, batch):
    return loss_of_logits(logits_of(params, batch), batch)

  gradient = jax.jit(jax.grad(loss_fn))

  @jax.jit
  def capture(params, batch):
    losses = lambda params: losses_of(logits_of(params, batch), batch[2])
    return curvature.capture_layers(losses, params)

  def measure() -> curvature.CurvatureReport:
    _, params, rest = nnx.split(model, nnx.Param, ...)
    with_rest = [(rest, *batch) for batch in batches]
    report = curvature.measure(
      loss_fn,
      params,
      top_k=TOP_K,
      batches=with_rest,
      gauss_newton=(logits_of, loss_of_logits),
      bootstrap=0,
    )
    total = [gradient(params, batch) for batch in with_rest]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *total)
    # Directions of all samples, moments of the first batch of them.
    captured = jax.device_get(capture(params, with_rest[0]))
    return curvature.align_report(report, captured, gradients=mean)

  return measure


# ---------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------


def rows_of(
  name: str, run: Run, reports: Mapping[int, curvature.CurvatureReport]
) -> list[dict[str, Any]]:
  """A row for each layer and point: what the tables, the plots and the verdicts are made of."""
  rows = []
  points = run.all_points
  for step, report in reports.items():
    for depth, layer in enumerate(report.layers):
      aligned = (report.alignment or {})[layer.name]
      identity = np.abs(aligned.phi * aligned.eigenvalue_product / aligned.h_kronecker - 1)
      rows.append(
        {
          'run': name,
          'network': run.network,
          'data': run.data,
          'ablation': run.ablation,
          'step': step,
          'point': 'start' if step == 0 else 'end' if step == points[-1] else str(step),
          'loss': report.loss,
          'layer': layer.name,
          'type': layer.layer_type,
          'depth': depth,
          'shape': list(layer.shape),
          'alpha': layer.alpha.exponent,
          'alpha_error': layer.alpha.standard_error,
          'alpha_r_squared': layer.alpha.r_squared,
          'gamma': layer.gamma.exponent,
          'gamma_r_squared': layer.gamma.r_squared,
          's': layer.s.exponent,
          's_r_squared': layer.s.r_squared,
          'transfer_error': layer.transfer_error,
          'participation_h': layer.participation_h,
          'participation_gradient': layer.participation_gradient,
          'bound': layer.bound,
          'profile': layer.profile.best,
          'directions': layer.num_directions,
          'negative': layer.num_negative,
          'alpha_kronecker': aligned.alpha_kronecker,
          'beta': aligned.beta,
          'phi': aligned.phi_slope,
          'rho_delta': aligned.rho_delta_slope,
          'rho_activation': aligned.rho_activation_slope,
          'chi': aligned.chi_slope,
          'sum_error': abs(aligned.alpha - aligned.beta - aligned.phi_slope - aligned.chi_slope),
          'identity_error': float(np.nanmax(identity)) if np.isfinite(identity).any() else np.nan,
          'concentration': float(np.nanmedian(aligned.concentration_ratio))
          if np.isfinite(aligned.concentration_ratio).any()
          else np.nan,
          'r_squared': dict(aligned.r_squared),
          'r_squared_linear': dict(aligned.r_squared_linear),
          **({'sigma': layer.sigma.tolist(), 'h': layer.h.tolist()} if step == points[-1] else {}),
        }
      )
  return rows


# ---------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='The curvature exponent of every kind of layer.')
  add = parser.add_argument
  add('--quick', action='store_true', help='small networks, a few steps, no Fashion-MNIST')
  add('--runs', nargs='+', help='names of runs; default all')
  add('--list', action='store_true', help='print the names of the runs')
  add('--data-dir', help="folder of Fashion-MNIST, where Debian's package is not installed")
  add('--seed', type=int, default=0)
  add('--work', type=pathlib.Path, help='where measured points are kept; default runs/alpha_map')
  add(
    '--output', type=pathlib.Path, help=f'JSON; default {RESULTS.relative_to(RESULTS.parents[2])}'
  )
  add('--quiet', action='store_true', help='no progress bars')
  args = parser.parse_args(argv)
  known = quick_runs() if args.quick else {**main_runs(), **ablation_runs()}
  if unknown := set(args.runs or ()) - set(known):
    parser.error(f'{min(unknown)!r} is none of the runs: {", ".join(known)}')
  args.chosen = {name: known[name] for name in args.runs or known}
  place = pathlib.Path('runs', 'alpha_map_quick' if args.quick else 'alpha_map')
  args.work = args.work or place
  # What is not the whole of it does not replace the whole of it.
  args.output = args.output or (
    RESULTS if set(args.chosen) == set(known) and not args.quick else place / 'alpha_map.json'
  )
  if any(run.data == 'fashion-mnist' for run in args.chosen.values()):
    try:
      vision_data.load('fashion-mnist', args.data_dir)
    except (FileNotFoundError, ValueError) as error:
      parser.error(str(error))
  return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line; returns what the JSON holds."""
  args = parse(argv)
  if args.list:
    print('\n'.join(args.chosen))
    return {}
  start = time.perf_counter()
  rows, seconds, losses = [], {}, {}
  for name, run in args.chosen.items():
    reports = perform(name, run, args)
    rows += rows_of(name, run, reports)
    seconds[name] = sum(report.settings['seconds'] for report in reports.values())
    losses[name] = {step: report.loss for step, report in reports.items()}
  claims = _alpha_claims.claims(rows)
  content = {
    'runs': {name: fingerprint(run, args.seed) for name, run in args.chosen.items()},
    'loss': losses,
    'seconds_measuring': seconds,
    'claims': claims,
    'rows': rows,
    'environment': environment(),
  }
  write_json(args.output, content)
  text = _alpha_claims.markdown(rows, claims)
  args.output.with_suffix('.md').write_text(text, encoding='utf-8')
  figures = _alpha_claims.figures(rows)
  written = [args.output, args.output.with_suffix('.md')]
  for which, figure in figures.items():
    path = args.output.with_name(f'{args.output.stem}_{which}.png')
    figure.savefig(path)
    written.append(path)
  print(text)
  print(f'{", ".join(map(str, written))}, after {time.perf_counter() - start:.0f} s')
  return content


if __name__ == '__main__':
  main()
