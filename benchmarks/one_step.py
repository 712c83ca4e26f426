"""Which (α, σ*) lowers the loss most in one step, on data that the step has not seen.

    python benchmarks/one_step.py                                     # Four networks
    python benchmarks/one_step.py --tasks gpt-bytes --batch-size 4 --rate 0.0283
    python benchmarks/one_step.py --report                            # Tables of what there is

A rule for the best exponent, from what can be measured: curvature and noise. It holds on bytes, and
not on images (docs/choosing.md). Along a training of `convergence.py` with the defaults (but
rms_of='matrix', as its maps are), at some of its steps t, the momentum is put through the map at
every (α, σ*), each time to the same size; of what comes out, u, an independent batch says

    d = ⟨∇L, u⟩,        q = uᵀ H u

by one exact Hessian-vector product: of all layers together, with all that is between them; the
noise of the batches that u is made of has no part in d, on average. A step of size r s(t), s the
schedule's share of the peak r, lowers the loss by r s d - r² s² q / 2. Summed over steps that is
largest at r = Σ s d / Σ s² q, where it is

    (Σ s d)² / (2 Σ s² q).

The tables have this, of the best, and r, which is to be compared with the rate that tuning found;
below them is what `convergence.py` found by training, cell by cell.
No step is taken with any (α, σ*) but the defaults', and none looks further ahead than itself.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# LAPACK's threads and XLA's would fight for the same cores. Read when JAX is imported.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'examples'))

import _contestants
import _problems
import jax
import jax.numpy as jnp
import numpy as np
from reporting import environment, write_json
from scipy.stats import rankdata
from tqdm import tqdm

import spectral_optax
from spectral_optax import transform

RESULTS = pathlib.Path(__file__).parent / 'results'
ALPHAS = (0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5)
TURNS = (0.01, 0.03, 0.1)
Tree = dict[str, jax.Array]


def along(
  problem: _problems.Problem, params: Tree, rest: Any, batch: tuple[jax.Array, ...], update: Tree
) -> tuple[jax.Array, jax.Array]:
  """Slope ⟨∇L, u⟩ and curvature uᵀ H u of the loss of a batch; `update` has the matrices alone."""
  loss = lambda matrices: problem.loss({**params, **matrices}, rest, *batch)[0]
  at = {path: params[path] for path in update}
  gradient, along_it = jax.jvp(jax.grad(loss), (at,), (update,))
  dot = lambda tree: jnp.sum(jnp.stack([jnp.vdot(tree[path], update[path]) for path in update]))
  return dot(gradient), dot(along_it)


def updates_of(problem: _problems.Problem, momentum: Tree, alpha: Any, turn: Any) -> Any:
  """U T(Σ) Vᵀ of every matrix, at the size that the comparison gives all of them."""
  views = problem.matrices
  transfer = spectral_optax.scale_by_spectral_transfer(
    dict.fromkeys(views, alpha),
    dict.fromkeys(views, turn**alpha),
    solver='gram',
    update_rms=_contestants.UPDATE_RMS,
  )
  return transfer.update(momentum, transfer.init(momentum))[0]


def held_out(problem: _problems.Problem, samples: int) -> tuple[jax.Array, ...]:
  """The first validation data: no training sees them."""
  x, y = problem.evaluation('validation')[0]
  return x[:samples], y[:samples]


def measure(
  problem: _problems.Problem,
  rate: float,
  momentum: float,
  *,
  points: int,
  samples: int,
  alphas: Sequence[float] = ALPHAS,
  turns: Sequence[float] = TURNS,
  seed: int = 0,
  quiet: bool = False,
) -> dict[str, Any]:
  """Slopes and curvatures, (points, alphas, turns), along one training with the defaults."""
  lane = _contestants.traced(problem, {'seed': seed, 'rate': rate, 'momentum': momentum})
  build = functools.partial(_contestants.noise, problem)
  average = transform.scale_by_momentum(momentum)
  batch, arrays = held_out(problem, samples), problem.arrays

  @jax.jit
  def ahead(carry, state, which):
    """The average's next value, of the matrices."""
    params, rest, _ = carry
    loss = lambda params: problem.loss(params, rest, *problem.batch(arrays, which))[0]
    gradient = jax.grad(loss)(params)
    return average.update({path: gradient[path] for path in problem.matrices}, state)

  @jax.jit
  def surface(carry, momentum):
    params, rest, _ = carry
    one = lambda at: along(problem, params, rest, batch, updates_of(problem, momentum, *at))
    grid = jnp.meshgrid(jnp.float32(alphas), jnp.float32(turns), indexing='ij')
    found = jax.lax.map(one, tuple(x.ravel() for x in grid))
    return [x.reshape(len(alphas), len(turns)) for x in found]

  carry = jax.jit(lambda: problem.start(build, lane))()
  step = jax.jit(lambda carry, which: problem.step(build(lane), carry, which, arrays))
  state = average.init({path: carry[0][path] for path in problem.matrices})
  steps = problem.task.steps
  # In the middle of as many equal parts.
  at = [int((i + 0.5) * steps / points) for i in range(points)]
  schedule = _contestants.schedule(problem, {'rate': 1.0})
  slopes, curvatures = [], []
  for t, which in enumerate(tqdm(problem.samples(seed)[: at[-1] + 1], disable=quiet)):
    momentum_now, state = ahead(carry, state, jnp.asarray(which))
    if t in at:
      d, q = surface(carry, momentum_now)
      slopes.append(np.asarray(d, np.float64).tolist())
      curvatures.append(np.asarray(q, np.float64).tolist())
    carry, _ = step(carry, jnp.asarray(which))
  return {
    'rate': rate,
    'momentum': momentum,
    'seed': seed,
    'samples': len(batch[0]),
    'alphas': list(alphas),
    'turns': list(turns),
    'points': at,
    'share': [float(np.asarray(schedule(t))) for t in at],
    'slopes': slopes,
    'curvatures': curvatures,
  }


def gains(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """(Σ s d)² / (2 Σ s² q), and the r that it takes, (alphas, turns); NaN where there is none."""
  d, q = np.asarray(found['slopes']), np.asarray(found['curvatures'])
  share = np.asarray(found['share'])[:, None, None]
  slope, curvature = (share * d).sum(0), (share**2 * q).sum(0)
  there = (slope > 0) & (curvature > 0)
  rate = np.where(there, slope, np.nan) / np.where(there, curvature, np.nan)
  return rate * slope / 2, rate


def table(name: str, found: dict[str, Any]) -> str:
  """Markdown: the gain of each cell as a part of the best, and in brackets the rate."""
  gain, rate = gains(found)
  part = gain / np.nanmax(gain)
  head = ' | '.join(f'{turn:g}' for turn in found['turns'])
  lines = [f'**{name}**, trained at a rate of {found["rate"]:.3g}', '', f'| α \\ σ* | {head} |']
  lines.append('| --- |' + ' ---: |' * len(found['turns']))
  for alpha, parts, rates in zip(found['alphas'], part, rate, strict=True):
    shown = lambda p: '**1**' if p == 1 else f'{p:.2f}'
    cells = ' | '.join(
      f'{shown(p)} ({r:.2g})' if np.isfinite(p) else '' for p, r in zip(parts, rates, strict=True)
    )
    lines.append(f'| {alpha:g} | {cells} |')
  return '\n'.join(lines)


def trained_cells(title: str) -> list[dict[str, Any]]:
  """What the comparison has of this task, batch size and momentum: α, σ*, loss and best rate."""
  known = json.loads((RESULTS / 'convergence.json').read_text('utf-8'))['tasks']
  task, _, momentum = title.partition(', momentum ')
  momentum = momentum or f'{_contestants.DEFAULT_MOMENTUM:g}'
  of = known.get(task, {})
  cells = [c for c in of.get('cells') or [] if c['momentum'] == float(momentum)]
  cells += (of.get('momenta') or {}).get(momentum, {}).values()
  constant = [c for c in cells if 'turn' in c and c['alpha'] == c['alpha_end']]
  return list({(c['alpha'], c['turn']): c for c in constant}.values())  # Some are in both.


def compare(found: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
  """Whether one step says what trainings at those (α, σ*) say; '' of fewer than three cells."""
  gain, rate = gains(found)
  rows = []
  for cell in cells:
    if cell['alpha'] in found['alphas'] and cell['turn'] in found['turns']:
      at = found['alphas'].index(cell['alpha']), found['turns'].index(cell['turn'])
      loss = float(np.mean(list(cell['losses'].values())))
      rows.append((loss, -gain[at], cell['rate'], rate[at], cell['alpha'], cell['turn']))
  if len(rows) < 3:
    return ''
  loss, lost, tuned, wanted, alpha, turn = np.array(rows).T
  lost = np.nan_to_num(lost)  # Where no step lowers the loss, nothing is gained.
  first, best = np.argmin(lost), np.argmin(loss)
  cell = lambda i: f'({alpha[i]:g}, {turn[i]:g}), loss {loss[i]:.4f}'
  off = np.log(wanted / tuned)
  # Of what is all the same there is none.
  rank_correlation = lambda x, y: (
    np.corrcoef(rankdata(x), rankdata(y))[0, 1] if np.ptp(x) and np.ptp(y) else np.nan
  )
  return (
    f'Of {len(rows)} cells that were trained: best by one step {cell(first)}; by training'
    f' {cell(best)}. Rank correlation of gains and losses {rank_correlation(lost, loss):.2f}, of'
    f' rates {rank_correlation(wanted, tuned):.2f}; rates wanted are {np.exp(np.nanmean(off)):.2f}'
    f' of those tuned, times or by {np.exp(np.nanstd(off)):.2f}.'
  )


def tuned_rate(task: str) -> Any:
  """Of the defaults, in the comparison; None where they have not been tuned."""
  known = json.loads((RESULTS / 'convergence.json').read_text('utf-8'))['tasks']
  return (
    known.get(task, {})
    .get('contestants', {})
    .get('spectral_newton', {})
    .get('tuned', {})
    .get('rate')
  )


def parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description='The exponent that lowers the loss most in one step.'
  )
  add = parser.add_argument
  add('--tasks', nargs='+', default=['gpt-bytes', 'vit-fashion', 'resnet-fashion', 'vgg-fashion'])
  add('--rate', type=float, help='of the training; default what tuning found')
  add('--momentum', type=float, default=_contestants.DEFAULT_MOMENTUM)
  add('--batch-size', type=int, help="in place of the tasks' own")
  add('--points', type=int, default=8, help='steps at which it is measured')
  add('--samples', type=int, default=256, help='of validation data')
  add('--alphas', type=float, nargs='+', default=list(ALPHAS))
  add('--turns', type=float, nargs='+', default=list(TURNS))
  add('--seed', type=int, default=0)
  add('--data-dir', help="folder of Fashion-MNIST, where Debian's package is not installed")
  add('--data-file', type=pathlib.Path, help='what convergence.py --pack-data has written')
  add('--output', type=pathlib.Path, default=RESULTS / 'one_step.json')
  add('--report', action='store_true', help='measure nothing')
  add('--quiet', action='store_true', help='no progress bars')
  args = parser.parse_args(argv)
  if unknown := set(args.tasks) - set(_problems.TASKS):
    parser.error(f'{min(unknown)!r} is none of the tasks: {", ".join(_problems.TASKS)}')
  if not args.report:
    for task in args.tasks:
      if args.rate is None and tuned_rate(task) is None:
        parser.error(f'{task} has no tuned rate in the comparison: say --rate.')
  return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Runs the command line; returns what the JSON holds."""
  args = parse(argv)
  content: dict[str, Any] = {}
  if args.output.is_file():
    content = json.loads(args.output.read_text('utf-8'))
  for name in () if args.report else args.tasks:
    task, title = _problems.TASKS[name], name
    if args.batch_size is not None:
      task = dataclasses.replace(task, batch_size=args.batch_size)
      title += f', batch_size {args.batch_size}'
    if args.momentum != _contestants.DEFAULT_MOMENTUM:
      title += f', momentum {args.momentum:g}'
    data = _problems.load(task.data, args.data_dir, args.data_file)
    # Convolutions as products, as where lanes are trained together.
    problem = _problems.Problem(task, data, together=task.data != 'bytes')
    found = measure(
      problem,
      args.rate or tuned_rate(name),
      args.momentum,
      points=args.points,
      samples=args.samples,
      alphas=args.alphas,
      turns=args.turns,
      seed=args.seed,
      quiet=args.quiet,
    )
    content[title] = {'environment': environment(), **found}
    write_json(args.output, content)
  for title, found in content.items():
    print(f'\n{table(title, found)}\n')
    print(compare(found, trained_cells(title)))
  return content


if __name__ == '__main__':
  main()
