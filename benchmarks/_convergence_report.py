"""Statistics, tables and plots of convergence.py."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

TARGET = 'muon'  # Whose final loss the others are timed to.
COMPARED_WITH = {'adamw': 'AdamW', 'muon': 'Muon', 'spectral_newton': 'our defaults'}

# ---------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean, and half of its 95 % interval by Student's t.

  The half is NaN for a single value, or where one is infinite.
  """
  x = np.asarray(values, np.float64)
  if len(x) < 2 or not np.isfinite(x).all():
    with np.errstate(invalid='ignore'):  # One diverged, the other too.
      return (float(x.mean()) if len(x) else math.nan), math.nan
  error = x.std(ddof=1) / math.sqrt(len(x))
  return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * error)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, int]:
  """`interval` of the differences, seed by seed, ours - theirs; how many seeds both have."""
  seeds = sorted(set(ours) & set(theirs))
  if any(math.isinf(of[s]) for of in (ours, theirs) for s in seeds):
    return math.nan, math.nan, len(seeds)
  return *interval([ours[s] - theirs[s] for s in seeds]), len(seeds)


def steps_to(losses: Sequence[float | None], every: int, target: float) -> float | None:
  """The first step at which a curve is at the target, or None.

  Linear between the points of the curve, the first of which is after `every` steps.
  """
  previous = None
  for i, loss in enumerate(losses):
    if loss is not None and loss <= target:
      if previous is None or previous <= target:
        return float(every * (i + 1))
      return every * (i + (previous - target) / (previous - loss))
    previous = loss
  return None


def by_seed(of: Mapping[str, Any], key: str, place: int | None = None) -> dict[int, float]:
  """A figure of every reported run, or a place of a curve; infinite where a training diverged."""
  found = {r['seed']: r.get(key) if place is None else r[key][place] for r in of['runs']}
  return {seed: math.inf if value is None else value for seed, value in found.items()}


def summary(task: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Of each contestant of a task, what the table shows."""
  entries = {name: of for name, of in task['contestants'].items() if of['runs']}
  every, total = task['task']['every'], task['task']['steps']
  target = None
  if TARGET in entries:
    last = [run['validation'][-1] for run in entries[TARGET]['runs']]
    target = None if None in last else float(np.mean(last))
  rows = {}
  for name, of in entries.items():
    row: dict[str, Any] = {'what': of['what'], 'rate': of['tuned']['rate']}
    row |= {'knob': of['tuned']['knob'], 'knob_name': of['knob']}
    row |= {'at_the_edge': of['tuned']['at_the_edge'], 'seeds': len(of['runs'])}
    last = [run['train'][-1] for run in of['runs']]
    row['train_loss'] = interval([math.inf if x is None else x for x in last])
    for key in ('test_loss', 'test_accuracy', 'validation_loss'):
      row[key] = interval(list(by_seed(of, key).values()))
    for other in COMPARED_WITH:
      if other in entries and other != name:
        mine, theirs = (by_seed(x, 'test_loss') for x in (of, entries[other]))
        row[f'minus_{other}'] = paired(mine, theirs)[:2]
        mine, theirs = (by_seed(x, 'test_accuracy') for x in (of, entries[other]))
        row[f'accuracy_minus_{other}'] = paired(mine, theirs)[:2]
    if target is not None:
      reached = [steps_to(run['validation'], every, target) for run in of['runs']]
      row['reached'] = sum(r is not None for r in reached)
      # Those that never get there count with the whole of the run.
      row['steps'] = float(np.mean([total if r is None else r for r in reached]))
      if cost := of.get('cost'):
        row['milliseconds'], row['at_least'] = cost['milliseconds'], cost['at_least']
        row['seconds'] = row['steps'] * cost['milliseconds'] / 1e3
        if cost['flops'] is not None:
          row['flops'] = row['steps'] * cost['flops']
    rows[name] = row
  return dict(sorted(rows.items(), key=lambda item: _or_last(item[1]['test_loss'][0])))


def _or_last(x: float) -> float:
  return x if math.isfinite(x) else math.inf


# ---------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """In Markdown; numbers to the right."""
  lines = [columns, ['---'] + ['---:'] * (len(columns) - 1), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def plus_minus(pair: tuple[float, float] | None, digits: int, sign: str = '') -> str:
  """Mean ± half interval, as in "0.123 ± 0.004"; nothing where nothing was measured."""
  if pair is None or math.isnan(pair[0]):
    return ''
  if math.isinf(pair[0]):
    return 'diverged'
  half = '' if math.isnan(pair[1]) else f' ± {pair[1]:.{digits}f}'
  return f'{pair[0]:{sign}.{digits}f}{half}'


def contestants_table(task: Mapping[str, Any]) -> str:
  """Of one task, the best first."""
  minus = [f'- {name}' for name in COMPARED_WITH.values()]
  columns = ['', 'seeds', 'test loss', *minus, 'accuracy %', *minus]
  columns += ['training loss at the end', 'steps to Muon', 'ms a step', 's to Muon']
  columns += ['GFLOP to Muon', 'rate', 'knob']
  rows = []
  for row in summary(task).values():
    percent = lambda pair: None if pair is None else (100 * pair[0], 100 * pair[1])
    reached = seconds = flops = ''
    if 'steps' in row:
      some = '' if row['reached'] == row['seeds'] else f' ({row["reached"]} of {row["seeds"]})'
      reached = f'{row["steps"]:.0f}{some}' if row['reached'] else 'never'
      seconds, flops = (to_target(row, name) for name in ('seconds', 'flops'))
    knob = f'{row["knob_name"]} {row["knob"]:g}' if row['knob_name'] else ''
    rows.append(
      [
        row['what'],
        f'{row["seeds"]}',
        plus_minus(row['test_loss'], 4),
        *(plus_minus(row.get(f'minus_{other}'), 4, '+') for other in COMPARED_WITH),
        plus_minus(percent(row['test_accuracy']), 2),
        *(
          plus_minus(percent(row.get(f'accuracy_minus_{other}')), 2, '+') for other in COMPARED_WITH
        ),
        plus_minus(row['train_loss'], 4),
        reached,
        significant(row['milliseconds']) if 'milliseconds' in row else '',
        seconds,
        flops,
        f'{row["rate"]:.3g}{" (edge)" if row["at_the_edge"] else ""}',
        knob,
      ]
    )
  return table(columns, rows)


def along_table(task: Mapping[str, Any], parts: int = 4) -> str:
  """Losses of the defaults minus those of AdamW and of Muon, along the training; '' without them.

  On validation data a lead that goes while that on the training data stays is overfitting.
  """
  entries = {name: of for name, of in task['contestants'].items() if of['runs']}
  others = [name for name in COMPARED_WITH if name != 'spectral_newton' and name in entries]
  if 'spectral_newton' not in entries or not others:
    return ''
  every, points = task['task']['every'], task['task']['steps'] // task['task']['every']
  places = sorted({points * (i + 1) // parts - 1 for i in range(parts)} - {-1})
  at = lambda name, key, place: by_seed(entries[name], key, place)
  rows = [
    [
      f'{words} - {COMPARED_WITH[other]}',
      *(
        plus_minus(paired(at('spectral_newton', key, i), at(other, key, i))[:2], 4, '+')
        for i in places
      ),
    ]
    for other in others
    for key, words in (('validation', 'validation loss'), ('train', 'training loss'))
  ]
  steps = [f'after {every * (i + 1)} steps' for i in places]
  return table(['defaults', *steps], rows)


def to_target(row: Mapping[str, Any], name: str) -> str:
  """Seconds or 10^9 FLOPs until the target; "never", or nothing where no step was measured."""
  if name not in row:
    return ''
  if not row['reached']:
    return 'never'
  more = '> ' if name == 'flops' and row['at_least'] else ''
  return more + significant(row[name] / (1e9 if name == 'flops' else 1))


def significant(x: float) -> str:
  """Three digits, or all that are before the point."""
  return f'{x:.0f}' if x >= 100 else f'{x:#.3g}'


def trained_on(task: Mapping[str, Any]) -> str:
  """On what the runs were, where it is not the same for all."""
  found: dict[str, list[str]] = {}
  for of in task['contestants'].values():
    for backend in sorted({run.get('backend', '') for run in of['runs']}):
      found.setdefault(backend, []).append(of['what'])
  usual = max(found, key=lambda backend: len(found[backend]), default='')
  others = [f'on {b}: {"; ".join(names)}' for b, names in found.items() if b != usual]
  return f' Trained on {usual}; {"; ".join(others)}.' if others else ''


def maps_of(task: Mapping[str, Any]) -> dict[float, list[Mapping[str, Any]]]:
  """By momentum, the cells of constant exponents, where there are enough for a map."""
  found: dict[float, list[Mapping[str, Any]]] = {}
  for cell in task['cells']:
    if cell['alpha'] == cell['alpha_end']:
      found.setdefault(cell['momentum'], []).append(cell)
  enough = lambda cells: (
    len({c['alpha'] for c in cells}) > 1 and len({c['turn'] for c in cells}) > 1
  )
  return {momentum: cells for momentum, cells in sorted(found.items()) if enough(cells)}


def paths_of(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Exponents that move, and constant ones beside them."""
  moving = [cell for cell in task['cells'] if cell['alpha'] != cell['alpha_end']]
  beside = {(cell['turn'], cell['momentum']) for cell in moving}
  constant = [c for c in task['cells'] if c['alpha'] == c['alpha_end'] and c['alpha'] == 1.5]
  return moving + [c for c in constant if (c['turn'], c['momentum']) in beside]


def _losses(cell: Mapping[str, Any]) -> list[float]:
  return [math.inf if x is None else x for x in cell['losses'].values()]


def map_table(cells: Sequence[Mapping[str, Any]]) -> str:
  """Mean loss in each cell of the map."""
  alphas, turns, losses = grid(cells)
  best = np.nanmin(losses)
  rows = []
  for alpha, line in zip(alphas, losses, strict=True):
    shown = [
      '' if np.isnan(x) else f'**{x:.4f}**' if x == best else f'{x:.4f}' if x < 1e3 else 'diverged'
      for x in line
    ]
    rows.append([f'{alpha:g}', *shown])
  return table(['α \\ σ*', *(f'{t:g}' for t in turns)], rows)


def paths_table(task: Mapping[str, Any]) -> str:
  """Of exponents that move, the best first."""
  rows = [
    [
      f'{p["alpha"]:g} → {p["alpha_end"]:g}',
      f'{p["turn"]:g}',
      plus_minus(interval(_losses(p)), 4),
      f'{p["rate"]:.3g}{" (edge)" if p["at_the_edge"] else ""}',
    ]
    for p in sorted(paths_of(task), key=lambda p: _or_last(float(np.mean(_losses(p)))))
  ]
  return table(['α', 'σ*', 'validation loss', 'rate'], rows)


def references_line(task: Mapping[str, Any]) -> str:
  """What a map is to be compared with: same rates, same seeds."""
  said = [
    f'{name} {plus_minus(interval(_losses(of)), 4)} (rate {of["rate"]:.3g})'
    for name, of in task['references'].items()
  ]
  return f'For comparison: {", ".join(said)}.\n' if said else ''


def markdown(content: Mapping[str, Any]) -> str:
  """All tables."""
  parts = ['# Convergence\n']
  parts += [f'- {note}' for note in content.get('notes', ())]
  parts += ['- ' + cost_note(content) + '\n'] if cost_note(content) else ['']
  for name, task in content['tasks'].items():
    of = task['task']
    parts.append(f'## {name}\n')
    parts.append(
      f'{of["stage"]} task: {of["network"]} on {of["data"]}, {of["steps"]} steps of'
      f' {of["batch_size"]}.\n'
    )
    if any(c['runs'] for c in task['contestants'].values()):
      parts.append(contestants_table(task) + '\n')
      parts.append(
        'Mean ± half of the 95 % interval; differences seed by seed, of those that both have. Steps'
        ' to the mean validation loss that Muon ends with; runs that do not get there'
        f' count in full.{trained_on(task)}\n'
      )
      if along := along_table(task):
        parts.append('Along the training, seed by seed:\n')
        parts.append(along + '\n')
    maps, paths = maps_of(task), paths_of(task)
    for momentum, cells in maps.items():
      seeds = max(len(cell['losses']) for cell in cells)
      parts.append(
        f'Validation loss over α and σ*, momentum {momentum:g}, each cell at its best learning'
        f' rate, mean of {seeds} seeds:\n'
      )
      parts.append(map_table(cells) + '\n')
    if paths:
      parts.append('α over training, linear from the first to the last step:\n')
      parts.append(paths_table(task) + '\n')
    if maps or paths:
      parts.append(references_line(task))
    if task.get('momenta'):
      parts.append(
        '\nMomentum: validation loss at the best learning rate (and that rate), same seeds:\n'
      )
      parts.append(momenta_table(task['momenta']) + '\n')
  return '\n'.join(parts)


def cost_note(content: Mapping[str, Any]) -> str:
  """Where the seconds come from; empty where there are none."""
  costs = [
    of['cost']
    for task in content['tasks'].values()
    for of in task['contestants'].values()
    if of.get('cost')
  ]
  if not costs:
    return ''
  versions = ', '.join(sorted({cost['jax'] for cost in costs}))
  backends = ', '.join(sorted({cost['backend'] for cost in costs}))
  return (
    f'Milliseconds: median of a whole training step of one network ({backends}, two cores, JAX'
    f' {versions}), contestants in turns, what is done every few steps at its share. A package that'
    " needs another version of JAX was timed beside AdamW there: its time is AdamW's here and what"
    ' it takes beyond that. Where one was'
    ' not timed, that of one with the same program (or one that differs in `rms_of`, which takes up'
    ' to a hundredth longer), and an α that moves or does not like its own.'
    ' Seconds: these times the steps, whatever machine the curves come from. FLOPs: products and'
    ' convolutions as written, forward, backward and update; ">" where decompositions or a loop'
    " that the data end are not in them. XLA's own count is not used: it takes one round of a"
    ' loop for all of them. Those of Spectral Newton, and all that runs its transfer, were counted'
    ' with a branch in them that hardly ever runs: they are too high.'
  )


# ---------------------------------------------------------------------------------
# The README's part
# ---------------------------------------------------------------------------------

BEGIN = '<!-- convergence: from here on made by benchmarks/convergence.py --report -->'
END = '<!-- convergence: to here -->'
SHOWN = ('adamw', 'muon', 'spectral_newton', 'constant', 'shampoo', 'soap', 'kfac')
NETWORKS = {'resnet': 'ResNet', 'gpt': 'transformer', 'vgg': 'VGG without normalisation',
            'vit': 'ViT', 'mlp': 'MLP'}  # fmt: skip
DATA = {'fashion': 'on Fashion-MNIST', 'bytes': 'on bytes', 'digits': 'on the digits'}
# Programs that are ours.
SPECTRAL = ('spectral_newton', 'measured_online', 'noise', 'noise_wide', 'noise_wide_dense',
            'noise_by_output', 'noise_by_type')  # fmt: skip
ROLLFAST = ('contramuon', 'normuon', 'contranormuon', 'aurora', 'aurora_0.9', 'prism', 'psgd_kron')


def readme_part(content: Mapping[str, Any]) -> str:
  """Test loss and accuracy, and what it takes to get to Muon's final loss, of those shown."""
  tasks = {name: (task, summary(task)) for name, task in content['tasks'].items()}
  heads = {
    'adamw': 'AdamW', 'muon': 'Muon', 'spectral_newton': 'Spectral Newton, defaults',
    'constant': 'constant damping, `rms_of="matrix"`', 'shampoo': 'Shampoo', 'soap': 'SOAP',
    'kfac': 'K-FAC',
  }  # fmt: skip
  there = [n for n in SHOWN if any(n in rows for _, rows in tasks.values())]

  def label(name: str, task: Mapping[str, Any]) -> str:
    of, options = task['task'], name.partition(', ')[2]
    changed = f' ({options})' if options else ''
    return f'{NETWORKS[of["network"]]} {DATA[of["data"]]}{changed}, {of["steps"]}'

  losses, targets = [], []
  for title, (task, rows) in tasks.items():
    if 'muon' not in rows:
      continue
    alone = {n: r for n, r in rows.items() if n not in SHOWN}
    of = lambda programs, alone=alone, task=task: [
      both(n) + f' ({of_name(r["what"])})'
      for n, r in alone.items()
      if task['contestants'][n]['program'] in programs
    ]
    least = min(rows, key=lambda n: _or_last(rows[n]['test_loss'][0]))
    most = max(rows, key=lambda n: rows[n]['test_accuracy'][0])

    def both(name: str, rows=rows, least=least, most=most) -> str:
      loss = short(rows[name]['test_loss'], bold=name == least)
      right = f'{100 * rows[name]["test_accuracy"][0]:.1f}'
      return f'{loss}; {f"**{right}**" if name == most else right} %'

    cells = [both(n) if n in rows else '' for n in there]
    # The rows are in order, the best first.
    others = [next(iter(of(programs)), '') for programs in (ROLLFAST, SPECTRAL)]
    losses.append([label(title, task), *cells, *others])
    targets.append([label(title, task), *(three(rows[n]) if n in rows else '' for n in there)])
  titles = [heads[n] for n in there]
  return '\n\n'.join(
    [
      table(['task, steps', *titles, 'the best of rollfast', 'the best other of ours'], losses),
      "To Muon's final mean validation loss: steps; milliseconds of a step; seconds (one network on"
      ' two CPU cores, the curves as above); 10⁹ FLOPs. Where runs do not get there, they count'
      ' in full, and in brackets is how many do.',
      table(['task, steps', *titles], targets),
    ]
  )


def of_name(what: str) -> str:
  """Without whose it is."""
  return what.removeprefix('Spectral Newton, ').removeprefix('Spectral Newton ')


def short(pair: tuple[float, float], bold: bool) -> str:
  """As in ".320 ± .009"."""
  said = plus_minus(pair, 3).replace('0.', '.') if pair[0] < 1 else plus_minus(pair, 3)
  said = said.replace('± 0.', '± .')
  return f'**{said}**' if bold else said


def three(row: Mapping[str, Any]) -> str:
  """Steps; milliseconds of a step; seconds; FLOPs."""
  price = f'{significant(row["milliseconds"])} ms' if 'milliseconds' in row else ''
  if not row['reached']:
    return '; '.join(filter(None, ['never', price]))
  some = '' if row['reached'] == row['seeds'] else f' ({row["reached"]} of {row["seeds"]})'
  parts = [f'{row["steps"]:.0f}{some}', price]
  if 'seconds' in row:
    parts.append(f'{significant(row["seconds"])} s')
  if 'flops' in row:
    parts.append(to_target(row, 'flops'))
  return '; '.join(filter(None, parts))


def into_readme(content: Mapping[str, Any], path: pathlib.Path) -> pathlib.Path:
  """Puts `readme_part` between its marks.

  Raises:
    ValueError: the marks are not there, each once.
  """
  text = path.read_text('utf-8')
  if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
    raise ValueError(f'{path} must have {BEGIN!r} and then {END!r}, each once.')
  before, rest = text.split(BEGIN)
  after = rest.split(END)[1]
  path.write_text(f'{before}{BEGIN}\n\n{readme_part(content)}\n\n{END}{after}', 'utf-8')
  return path


def momenta_table(momenta: Mapping[str, Mapping[str, Any]]) -> str:
  """A row for each optimizer, a column for each momentum."""
  names = list(dict.fromkeys(name for of in momenta.values() for name in of))
  lines = ['| | ' + ' | '.join(momenta) + ' |', '| --- |' + ' ---: |' * len(momenta)]
  for name in names:
    cells = [
      f'{np.mean(_losses(of[name])):.4f} ({of[name]["rate"]:g})' if name in of else ''
      for of in momenta.values()
    ]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


# ---------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------


def grid(cells: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], np.ndarray]:
  """α, σ*, and the mean loss at each of both; NaN where nothing was run."""
  alphas = sorted({cell['alpha'] for cell in cells})
  turns = sorted({cell['turn'] for cell in cells})
  losses = np.full((len(alphas), len(turns)), np.nan)
  for cell in cells:
    losses[alphas.index(cell['alpha']), turns.index(cell['turn'])] = np.mean(_losses(cell))
  return alphas, turns, losses


def map_figure(maps: Mapping[str, tuple[Sequence[Any], Mapping[str, Any]]]) -> Figure:
  """A heat map for each (cells, references); red is where Muon's loss is, at its best rate."""
  columns = min(3, len(maps))
  rows = -(-len(maps) // columns)
  figure = Figure(figsize=(5.2 * columns, 4.6 * rows), dpi=120, layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes in panels[len(maps) :]:
    axes.set_axis_off()
  for axes, (name, (cells, references)) in zip(panels, maps.items(), strict=False):
    alphas, turns, losses = grid(cells)
    finite = losses[np.isfinite(losses)]
    low, high = finite.min(), np.quantile(finite, 0.8)
    image = axes.imshow(
      np.where(np.isfinite(losses), losses, high),
      origin='lower',
      aspect='auto',
      cmap='viridis_r',
      vmin=low,
      vmax=max(high, low + 1e-6),
    )
    for (i, j), loss in np.ndenumerate(losses):
      text = f'{loss:.3f}' if math.isfinite(loss) else ''
      bold = 'bold' if loss == low else 'normal'
      light = 'black' if loss < (low + high) / 2 else 'white'
      axes.text(j, i, text, ha='center', va='center', fontsize=7, color=light, weight=bold)
    muon = references.get('muon')
    if muon and low < (level := float(np.mean(_losses(muon)))) < finite.max():
      whole = np.where(np.isfinite(losses), losses, finite.max())
      if min(whole.shape) > 1:
        axes.contour(whole, levels=[level], colors='red', linewidths=1.5)
    axes.set_xticks(range(len(turns)), [f'{t:g}' for t in turns])
    axes.set_yticks(range(len(alphas)), [f'{a:g}' for a in alphas])
    axes.set_xlabel('σ*, of the RMS singular value')
    axes.set_ylabel('α')
    axes.set_title(f'{name}: validation loss (red: as Muon)')
    figure.colorbar(image, ax=axes)
  return figure


def curves_figure(tasks: Mapping[str, Any], most: int = 8) -> Figure:
  """Mean validation loss over training, of the best and of what they are compared with."""
  figure = Figure(figsize=(6.4, 3.8 * len(tasks)), dpi=120, layout='constrained')
  panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
  for axes, (name, task) in zip(panels, tasks.items(), strict=True):
    order = list(summary(task))
    shown = [
      n for i, n in enumerate(order) if i < most or n in ('adamw', 'muon', 'spectral_newton')
    ]
    every, ends = task['task']['every'], []
    for contestant in shown:
      runs = task['contestants'][contestant]['runs']
      losses = np.array([run['validation'] for run in runs], float)
      steps = every * (1 + np.arange(losses.shape[1]))
      mean, spread = losses.mean(0), losses.std(0)
      heavy = 2.2 if contestant in ('muon', 'spectral_newton') else 1.2
      (line,) = axes.plot(steps, mean, label=contestant, linewidth=heavy)
      axes.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
      ends += mean[len(mean) // 4 :].tolist()
    finite = [x for x in ends if math.isfinite(x)]
    if finite:
      axes.set_ylim(min(finite) - 0.05 * (max(finite) - min(finite)), max(finite))
    axes.set_title(name)
    axes.set_xlabel('step')
    axes.set_ylabel('validation loss')
    axes.legend(fontsize=7)
  return figure


def differences_figure(tasks: Mapping[str, Any]) -> Figure:
  """Each contestant's test loss minus Muon's, with its interval, in per cent of Muon's."""
  heights = [max(len(summary(task)), 2) + 2 for task in tasks.values()]
  figure = Figure(figsize=(7, 0.24 * sum(heights) + 0.5), dpi=120, layout='constrained')
  panels = figure.subplots(len(tasks), 1, squeeze=False, height_ratios=heights)[:, 0]
  for axes, (name, task) in zip(panels, tasks.items(), strict=True):
    rows = summary(task)
    muon = rows['muon']['test_loss'][0]
    found = {n: np.array(r['minus_muon']) / muon * 100 for n, r in rows.items() if n != 'muon'}
    names = [n for n, (mean, _) in found.items() if math.isfinite(mean)]
    means = [found[n][0] for n in names]
    halves = [np.nan_to_num(found[n][1]) for n in names]
    colours = ['#0072B2' if rows[n]['what'].startswith('Spectral') else '#999999' for n in names]
    axes.barh(names, means, xerr=halves, color=colours, error_kw={'linewidth': 1})
    axes.axvline(0, color='black', linewidth=1)
    axes.set_xlim(min([*means, 0]) * 1.3 - 1, min(max([*means, 0]) * 1.1 + 1, 40))
    axes.set_title(f'{name}: test loss, % above Muon', loc='left')
    axes.invert_yaxis()
    axes.tick_params(axis='y', labelsize=7)
  return figure


# Of the overview, all rivals but SGD and the control with scalar rates: names and colours.
OVERVIEW = {
  'spectral_newton': ('Spectral Newton', '#0072B2'),
  'by_matrix': ('the same, rms_of="matrix"', '#56B4E9'),
  'muon': ('Muon', '#D55E00'),
  'aurora_0.9': ('Aurora, momentum 0.9', '#CC79A7'),
  'aurora': ('Aurora, momentum 0.95', '#CC79A7'),
  'contranormuon': ('Contra-NorMuon', '#CC79A7'),
  'contramuon': ('Contra-Muon', '#CC79A7'),
  'normuon': ('NorMuon', '#CC79A7'),
  'prism': ('PRISM', '#CC79A7'),
  'muon_sqrt_alpha': ('Muon, rate × √α', '#CC79A7'),
  'dynmuon': ("DynMuon's path", '#CC79A7'),
  'psgd_kron': ('PSGD Kron', '#999999'),
  'soap': ('SOAP', '#999999'),
  'shampoo': ('Shampoo', '#999999'),
  'kfac': ('K-FAC', '#999999'),
  'adamw': ('AdamW', '#009E73'),
}
COURSES = ('adamw', 'muon', 'spectral_newton')


def overview_figure(tasks: Mapping[str, Any]) -> Figure:
  """A column a task: test losses minus Muon's, seed by seed; under it how they get there."""
  figure = Figure(figsize=(3.1 * len(tasks) + 1.2, 7.2), dpi=110, layout='constrained')
  panels = figure.subplots(2, len(tasks), squeeze=False, height_ratios=[1.5, 1])
  summaries = [summary(task) for task in tasks.values()]
  every_name = [n for n in OVERVIEW if any(n in rows for rows in summaries)]
  for (above, below), task, rows in zip(panels.T, tasks.values(), summaries, strict=True):
    of = task['task']
    # One line a contestant, the same in every column; empty where it has not been trained.
    for place, name in enumerate(every_name):
      pair = (0.0, 0.0) if name == 'muon' else rows.get(name, {}).get('minus_muon')
      if pair and math.isfinite(pair[0]):
        half = 0 if math.isnan(pair[1]) else pair[1]
        above.errorbar(pair[0], place, xerr=half, fmt='o', color=OVERVIEW[name][1], capsize=3)
    above.axvline(0, color=OVERVIEW['muon'][1], linewidth=1)
    above.set_ylim(len(every_name) - 0.5, -0.5)
    above.set_yticks(range(len(every_name)), [OVERVIEW[n][0] for n in every_name])
    above.tick_params(labelleft=above is panels[0, 0])
    above.grid(axis='y', alpha=0.3)
    above.set_title(f'{NETWORKS[of["network"]]}\n{DATA[of["data"]]}', fontsize=10)
    above.set_xlabel("test loss - Muon's")
    ends = []
    for name in (n for n in COURSES if n in rows):
      losses = np.array([run['validation'] for run in task['contestants'][name]['runs']], float)
      steps, mean = of['every'] * (1 + np.arange(losses.shape[1])), losses.mean(0)
      below.plot(steps, mean, label=OVERVIEW[name][0], color=OVERVIEW[name][1])
      ends += mean[len(mean) // 4 :].tolist()
    finite = [x for x in ends if math.isfinite(x)]
    if finite:
      margin = 0.05 * (max(finite) - min(finite))
      below.set_ylim(min(finite) - margin, max(finite) + margin)
    below.set_xlabel('step')
  panels[1, 0].set_ylabel('validation loss')
  panels[1, 0].legend(fontsize=8)
  return figure


def write(content: Mapping[str, Any], output: pathlib.Path) -> list[pathlib.Path]:
  """Markdown and plots beside the JSON; their paths."""
  written = [output.with_suffix('.md')]
  written[0].write_text(markdown(content), encoding='utf-8')
  tasks = content['tasks']
  compared = {n: t for n, t in tasks.items() if any(c['runs'] for c in t['contestants'].values())}
  beside_muon = {n: t for n, t in compared.items() if 'muon' in summary(t)}
  unchanged = {n: t for n, t in beside_muon.items() if ', ' not in n}  # No options of their own.
  mapped = {
    name if len(maps_of(task)) == 1 else f'{name}, momentum {momentum:g}': (
      cells,
      task['references'],
    )
    for name, task in tasks.items()
    for momentum, cells in maps_of(task).items()
  }
  for name, of, draw in (
    ('curves', compared, curves_figure),
    ('differences', beside_muon, differences_figure),
    ('overview', unchanged, overview_figure),
    ('map', mapped, map_figure),
  ):
    if of:
      path = output.with_name(f'{output.stem}_{name}.png')
      draw(of).savefig(path)
      written.append(path)
  return written
