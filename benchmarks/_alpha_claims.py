"""What alpha_map.py makes of its rows: verdicts, tables, plots.

The published figures are from A. Calvo, "Spectral Asymptotics of Neural Network Loss
Landscapes", arXiv:2606.02596 (v1), and its package of raw data. A verdict is computed from our
figures, by the rule that stands beside it; the rules are ours.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from spectral_optax.curvature import plots

Row = dict[str, Any]

# A fit to go by.
GOOD = 0.9
# How far a mean α may be from a published one.
NEAR = 0.3


# ---------------------------------------------------------------------------------
# Choosing rows
# ---------------------------------------------------------------------------------


def main_rows(rows: Iterable[Row], point: str | None = 'end') -> list[Row]:
  """Of the main runs, at one point or at all."""
  return [r for r in rows if not r['ablation'] and point in (None, r['point'])]


def value(rows: Iterable[Row], name: str) -> np.ndarray:
  """One column; without what is not there."""
  x = np.array([r[name] for r in rows], float)
  return x[np.isfinite(x)]


def named(*parts: str) -> Callable[[Row], bool]:
  """Whether one of these is among the names that lead to a layer."""
  return lambda row: not set(parts).isdisjoint(row['layer'].split('/'))


def is_interior_conv(row: Row) -> bool:
  """3x3, and not the first of its network."""
  if row['network'] == 'resnet':
    return named('conv1', 'conv2')(row)
  return row['network'] == 'vgg' and row['type'] == 'conv' and row['layer'] != 'convs/0/kernel'


def is_first_conv(row: Row) -> bool:
  return row['network'] == 'resnet' and row['layer'] == 'stem/kernel'


def kind(row: Row) -> str:
  """Layer types, as the tables have them: attention by its parts, convolutions by their place."""
  if named('query', 'key', 'value')(row):
    return 'attention q, k, v'
  if row['type'] == 'attention':
    return 'attention out'
  if row['type'] == 'conv':
    if is_interior_conv(row):
      return 'conv, interior 3x3'
    return 'conv, 1x1 shortcut' if named('shortcut')(row) else 'conv, first'
  names = {'mlp_up': 'MLP up', 'mlp_down': 'MLP down'}
  return names.get(row['type'], str(row['type']))


KINDS = (
  'conv, first',
  'conv, interior 3x3',
  'conv, 1x1 shortcut',
  'dense',
  'attention q, k, v',
  'attention out',
  'MLP up',
  'MLP down',
  'head',
)


# ---------------------------------------------------------------------------------
# Verdicts
# ---------------------------------------------------------------------------------


def spread(x: np.ndarray, digits: int = 2) -> str:
  if not len(x):
    return '–'
  return f'{x.mean():.{digits}f} ({x.min():.{digits}f} to {x.max():.{digits}f}, {len(x)} layers)'


def figure_of(x: float, digits: int = 2) -> str:
  return f'{x:.{digits}f}' if math.isfinite(x) else '–'


def percent(x: float) -> str:
  return f'{100 * x:.1f} %' if math.isfinite(x) else '–'


def mean_of(rows: Iterable[Row], name: str) -> float:
  x = value(rows, name)
  return float(x.mean()) if len(x) else math.nan


def median_of(rows: Iterable[Row], name: str) -> float:
  x = value(rows, name)
  return float(np.median(x)) if len(x) else math.nan


def claims(rows: list[Row]) -> list[dict[str, str]]:
  """A line for each published claim: what is claimed, ours, by which rule, and the verdict."""
  lines: list[dict[str, str]] = []

  def line(claim: str, published: str, ours: str, rule: str, agrees: bool | None) -> None:
    verdict = {True: 'reproduced', False: 'not reproduced', None: 'not testable here'}[agrees]
    lines.append(
      {'claim': claim, 'published': published, 'ours': ours, 'rule': rule, 'verdict': verdict}
    )

  def beside(claim: str, ours: str) -> None:
    """What nobody has published, and one wants to know."""
    columns = ('claim', 'published', 'ours', 'rule', 'verdict')
    lines.append(dict(zip(columns, (claim, '–', ours, '', '–'), strict=True)))

  def mean_alpha(
    claim: str, published: str, which: Iterable[Row], low: float, high: float | None = None
  ) -> None:
    """Agrees if our mean is within `NEAR` of what was published: `low`, or `low` to `high`."""
    x = value(which, 'alpha')
    if len(x):
      low, high = low - NEAR, (low if high is None else high) + NEAR
      rule = f'mean within {low:.2f} to {high:.2f}'
      line(claim, published, spread(x), rule, bool(low <= x.mean() <= high))

  def elsewhere(claim: str, published: str, why: str) -> None:
    line(claim, published, why, '', None)

  end, start = main_rows(rows), main_rows(rows, 'start')
  good = [r for r in end if r['alpha_r_squared'] >= GOOD]

  # The spectral transfer law.
  errors = value(good, 'transfer_error')
  if len(errors):
    line(
      'Spectral transfer s = αγ: median |s - αγ| / s',
      '1.9 %, 1.0 %, 1.6 % (CIFAR-10, Tiny-ImageNet, ImageNet-1K)',
      f'{percent(np.median(errors))} ({len(errors)} layers with R² ≥ {GOOD});'
      f' {percent(median_of(end, "transfer_error"))} of all'
      f' {len(value(end, "transfer_error"))} with a fit',
      f'at most 2 % over layers with R² ≥ {GOOD}',
      bool(np.median(errors) <= 0.02),
    )
    early = [r for r in start if r['alpha_r_squared'] >= GOOD]
    beside(
      'The same before training',
      f'{percent(median_of(early, "transfer_error"))} ({len(early)} layers with R² ≥ {GOOD});'
      f' {percent(median_of(start, "transfer_error"))} of all'
      f' {len(value(start, "transfer_error"))}',
    )
  heads = value([r for r in end if r['type'] == 'head' and r['shape'][1] == 10], 'transfer_error')
  others = value([r for r in end if r['type'] != 'head'], 'transfer_error')
  if len(heads) and len(others):
    line(
      'It breaks on 10-way heads',
      '74 % and 157 % off',
      f'{", ".join(percent(e) for e in sorted(heads))} off; median of other layers'
      f' {percent(np.median(others))}',
      'median of the heads above 20 %',
      bool(np.median(heads) > 0.2),
    )

  # Participation.
  h, g = value(end, 'participation_h'), value(end, 'participation_gradient')
  if len(h):
    line(
      'Curvature concentrates: participation ratio of h',
      '1.0 to 1.8',
      f'{h.min():.1f} to {h.max():.1f}, median {np.median(h):.2f};'
      f' {percent(float(np.mean(h <= 1.8)))} of layers at most 1.8',
      'nine of ten layers at most 1.8',
      bool(np.mean(h <= 1.8) >= 0.9),
    )
    line(
      "... and that of the gradient's spectrum",
      '1.8 to 58',
      f'{g.min():.1f} to {g.max():.1f}, median {np.median(g):.2f}',
      'median above that of h, and a maximum above 10',
      bool(np.median(g) > np.median(h) and g.max() > 10),
    )
  premise = [
    r for r in end if r['s_r_squared'] >= GOOD and r['alpha_r_squared'] >= GOOD
    and not r['negative'] and math.isfinite(r['bound'])
  ]  # fmt: skip
  if premise:
    holds = lambda which: [r['participation_h'] <= r['bound'] for r in which]
    inside, law = holds(premise), holds([r for r in premise if r['profile'] == 'power_law'])
    over = max(r['participation_h'] / r['bound'] for r in premise)
    line(
      'Bound: PR_h ≤ ζ(αγ)² / ζ(2αγ)',
      'holds',
      f'holds in {sum(inside)} of the {len(inside)} layers with αγ > 1, no negative h and'
      f' R² ≥ {GOOD} of α and s; at most {over:.2f} times the bound. Of those whose σ is best'
      f' described by a power law, in {sum(law)} of {len(law)}',
      'holds in all of the former',
      all(inside),
    )

  # Profiles.
  winners = [r['profile'] for r in end if r['profile']]
  if winners:
    count = lambda which, name: sum(p == name for p in which)
    line(
      'Rank profile of σ: log-normal wins by BIC',
      '21 of 24 layers (exponential 2, power law 1)',
      f'{count(winners, "lognormal")} of {len(winners)} (exponential'
      f' {count(winners, "exponential")}, power law {count(winners, "power_law")})',
      'three of four layers',
      count(winners, 'lognormal') >= 0.75 * len(winners),
    )

  # α by layer type.
  interior = [r for r in end if is_interior_conv(r)]
  mean_alpha('α of convolutions', '1.97 to 2.17 (ResNet-18, VGG-11, CIFAR-10)', interior, 2.0)
  resnet = lambda r: r['network'] == 'resnet'
  mean_alpha('... in the ResNet alone', '1.97 to 2.17', filter(resnet, interior), 2.0)
  elsewhere(
    'α of convolutions of ResNet-50',
    '1.94 (Tiny-ImageNet), 2.10 (ImageNet-1K)',
    'no such data and no such size',
  )
  dense = [r for r in end if r['network'] == 'mlp' and r['type'] == 'dense']
  mean_alpha('α of dense layers of an MLP', '2.18', dense, 2.18)
  classifiers = [r for r in end if r['type'] == 'head' and r['network'] in ('resnet', 'vgg')]
  mean_alpha('α of a 10-way classifier', '1.23 to 1.65', classifiers, 1.23, 1.65)
  elsewhere('α of a 200-way and of a 1000-way classifier', '0.90; 2.83', 'no such data')
  vit = [r for r in end if r['network'] == 'vit']
  mean_alpha('α of a small ViT, ten classes', '2.1 to 2.25 (CIFAR-10)', vit, 2.1, 2.25)
  elsewhere('α of a small ViT, a hundred classes', '1.6 to 1.75 (CIFAR-100)', 'no such data')
  gpt = [r for r in end if r['network'] == 'gpt']
  pick = lambda name: [r for r in gpt if kind(r) == name]
  for name, published, interval in (
    ('attention q, k, v', 1.43, '[1.21, 1.63] (GPT-2, 6 layers)'),
    ('attention out', 1.17, '[1.07, 1.34]'),
    ('MLP up', 0.84, '[0.69, 1.04]'),
    ('MLP down', 1.15, '[1.13, 1.19]'),
  ):
    mean_alpha(f'GPT: α of {name}', f'{published} {interval}', pick(name), published)
  head = value(pick('head'), 'alpha')
  if len(head):
    line('A softmax head over a vocabulary: α > 2', '4.53 (GPT-2)', spread(head), 'above 2',
         bool(head.mean() > 2))  # fmt: skip
  order = [
    value([r for r in end if kind(r) in names], 'alpha')
    for names in (('conv, interior 3x3',), ('attention q, k, v', 'attention out'), ('MLP up',))
  ]
  if all(map(len, order)):
    conv, attention, up = (float(x.mean()) for x in order)
    line(
      'Order: convolutions 2, attention 1, MLP up below 1',
      '2; 1; < 1',
      f'{conv:.2f}; {attention:.2f}; {up:.2f}',
      'in that order, more than 0.3 apart',
      conv > attention + 0.3 and attention > up + 0.3,
    )

  # In training.
  for name, chosen, published, low, high in (
    ('first convolution', is_first_conv, ('1.45', '1.8'), (1.45,), (1.8,)),
    ('interior convolutions', lambda r: resnet(r) and is_interior_conv(r), ('1.85 to 1.9', '2'),
     (1.85, 1.9), (2.0,)),
  ):  # fmt: skip
    of = f'ResNet, {name}: α'
    mean_alpha(f'{of} at initialisation', published[0], filter(chosen, start), *low)
    mean_alpha(f'{of} in training', published[1], filter(chosen, end), *high)
  head_of = lambda point: [
    r for r in main_rows(rows, None) if resnet(r) and r['type'] == 'head' and point(r)
  ]
  before = value(head_of(lambda r: r['point'] == 'start'), 'alpha')
  epoch = value(head_of(lambda r: r['point'] not in ('start', 'end', '20')), 'alpha')
  if len(before) and len(epoch):
    line(
      'ResNet, head: α falls in the first epoch',
      '1.99 to 1.05',
      f'{before.mean():.2f} to {epoch.mean():.2f}',
      'falls by more than 0.3',
      bool(before.mean() - epoch.mean() > 0.3),
    )
  if start and end:
    negative = lambda which: sum(r['negative'] for r in which) / sum(r['directions'] for r in which)
    fit = lambda which: figure_of(median_of(which, 'alpha_r_squared'))
    beside(
      'At initialisation fits are poor and many h are negative',
      f'median R² {fit(start)}, {percent(negative(start))} of h negative; at the end'
      f' {fit(end)}, {percent(negative(end))}',
    )

  # The decomposition.
  everywhere = main_rows(rows, None)
  identity, total = value(everywhere, 'identity_error'), value(everywhere, 'sum_error')
  if len(identity) and len(total):
    line(
      'Identities h^Kron = ΦΛ and α = β + φ + χ',
      'exact',
      f'to {identity.max():.0e} and {total.max():.0e}, all layers and points',
      'to 1e-9',
      bool(max(identity.max(), total.max()) < 1e-9),
    )
    beta = value(good, 'beta')
    if len(beta):
      line(
        'α = 2 + φ, the case β = 2',
        '2',
        f'β {spread(beta)}; χ {spread(value(good, "chi"))}',
        'nine of ten β within 0.3 of 2',
        bool(np.mean(np.abs(beta - 2) <= 0.3) >= 0.9),
      )
  lines += ablation_claims(rows)
  elsewhere('h by finite differences is wrong', 'R² 0.17, half of the signs', 'not measured here')
  elsewhere(
    'Spectral Newton beats AdamW',
    '93.8 / 92.7 (ResNet-18, CIFAR-10); 75.0 / 71.5 (CIFAR-100); 75.0 / 72.6 (ResNet-50)',
    'no such data; the optimizer has benchmarks of its own',
  )
  elsewhere('Rates scaled by s gain nothing', '±0.2 %', 'nothing is optimised here')
  return lines


def ablation_claims(rows: list[Row]) -> list[dict[str, str]]:
  """LayerNorm, skips and the number of outputs, in the transformer on bytes."""
  lines = []
  of = lambda name, *kinds: [
    r for r in rows if r['ablation'] == name and r['point'] == 'end' and kind(r) in kinds
  ]
  behind_norm = ('attention q, k, v', 'MLP up')
  behind_skip = ('attention out', 'MLP down')
  for claim, changed, kinds, slope, symbol in (
    ('LayerNorm flattens ρ^A', 'no LayerNorm', behind_norm, 'rho_activation', 'ρ^A'),
    ('Skips flatten ρ^δ', 'no skips', behind_skip, 'rho_delta', 'ρ^δ'),
  ):
    whole, without = of('baseline', *kinds), of(changed, *kinds)
    a, b = value(whole, slope), value(without, slope)
    if len(a) and len(b):
      alphas = [figure_of(mean_of(x, 'alpha')) for x in (whole, without)]
      lines.append(
        {
          'claim': claim,
          'published': 'its slope comes nearer to 0',
          'ours': f'slope of log {symbol} ({", ".join(kinds)}): {a.mean():.2f} with,'
          f' {b.mean():.2f} without; α {alphas[0]} and {alphas[1]}',
          'rule': 'mean slope nearer to 0 with it',
          'verdict': 'reproduced' if abs(a.mean()) < abs(b.mean()) else 'not reproduced',
        }
      )
  inner = (*behind_norm, *behind_skip)
  sizes = {8: '8 outputs', 32: '32 outputs', 256: 'baseline', 1024: '1024 outputs'}
  alphas = {n: value(of(name, *inner), 'alpha') for n, name in sizes.items()}
  if all(map(len, alphas.values())):
    means = [float(a.mean()) for a in alphas.values()]
    lines.append(
      {
        'claim': 'α falls towards 1 and below with a large number of outputs',
        'published': 'falls',
        'ours': 'attention and MLP: ' + ', '.join(
          f'{m:.2f} ({n} outputs)' for n, m in zip(alphas, means, strict=True)
        ),
        'rule': 'lower by 0.3 at 1024 than at 8',
        'verdict': 'reproduced' if means[0] - means[-1] > 0.3 else 'not reproduced',
      }
    )  # fmt: skip
  return lines


# ---------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], text_columns: int = 1) -> str:
  rule = ['---'] * text_columns + ['---:'] * (len(columns) - text_columns)
  escaped = lambda cell: str(cell).replace('|', '\\|')
  lines = [columns, rule, *rows]
  return '\n'.join(f'| {" | ".join(map(escaped, line))} |' for line in lines)


def points_of(rows: Iterable[Row]) -> list[str]:
  """Start, the steps between, end."""
  between = {r['point'] for r in rows} - {'start', 'end'}
  return ['start', *sorted(between, key=int), 'end']


def markdown(rows: list[Row], verdicts: list[dict[str, str]]) -> str:
  """All tables."""
  end, ablations = main_rows(rows), [r for r in rows if r['ablation']]
  layers = len(end)
  parts = [
    '# The curvature exponent of every kind of layer\n',
    f'{layers} layers of {len({r["run"] for r in end})} networks after training,'
    f' {len({r["network"] for r in end})} architectures, {len({r["data"] for r in end})} data sets;'
    ' written by `python benchmarks/alpha_map.py`. α: mean over the layers with a fit.\n',
    '## Published claims\n',
    table(
      ('claim', 'published', 'ours', 'rule', 'verdict'),
      [[x[k] for k in ('claim', 'published', 'ours', 'rule', 'verdict')] for x in verdicts],
      5,
    ),
    '\n## α after training, by network and kind of layer\n',
    _by_kind(end),
    '\n## In training\n',
    _by_point(rows),
    '\n## Decomposition after training, by kind of layer\n',
    _decomposition(end),
  ]
  if ablations:
    parts += ['\n## Ablations, a transformer on bytes after training\n', _ablations(ablations)]
  return '\n'.join(parts) + '\n'


def _cell(x: np.ndarray, digits: int = 2) -> str:
  return f'{x.mean():.{digits}f}' if len(x) else ''


def _by_kind(end: list[Row]) -> str:
  runs = list(dict.fromkeys(r['run'] for r in end))
  lines = []
  for name in KINDS:
    of = [r for r in end if kind(r) == name]
    if not of:
      continue
    a = value(of, 'alpha')
    lines.append(
      [
        name,
        *(_cell(value([r for r in of if r['run'] == run], 'alpha')) for run in runs),
        f'{a.mean():.2f} ± {a.std():.2f}' if len(a) else '–',
        figure_of(median_of(of, 'alpha_r_squared')),
        percent(median_of(of, 'transfer_error')),
        len(of),
      ]
    )
  columns = ('', *runs, 'all: mean ± deviation', 'median R²', 'median of s off αγ', 'layers')
  return table(columns, lines)


def _by_point(rows: list[Row]) -> str:
  lines = []
  every = main_rows(rows, None)
  for run in dict.fromkeys(r['run'] for r in every):
    for point in points_of([r for r in every if r['run'] == run]):
      of = [r for r in every if r['run'] == run and r['point'] == point]
      if not of:
        continue
      profile = lambda name, of=of: sum(r['profile'] == name for r in of)
      a = value(of, 'alpha')
      lines.append(
        [
          run,
          of[0]['step'],
          f'{of[0]["loss"]:.3f}',
          spread(a).split(' layers')[0].rsplit(',', 1)[0] + ')' if len(a) else '–',
          figure_of(median_of(of, 'alpha_r_squared')),
          f'{sum(r["negative"] for r in of)} of {sum(r["directions"] for r in of)}',
          percent(median_of(of, 'transfer_error')),
          figure_of(median_of(of, 'participation_h')),
          figure_of(median_of(of, 'participation_gradient')),
          f'{profile("lognormal")} / {profile("exponential")} / {profile("power_law")}',
        ]
      )
  columns = (
    'run', 'step', 'loss', 'α: mean (range)', 'median R²', 'h < 0', 'median of s off αγ',
    'PR of h', 'PR of σ', 'BIC: log-normal / exponential / power law',
  )  # fmt: skip
  return table(columns, lines)


_PARTS = ('beta', 'rho_delta', 'rho_activation', 'phi', 'chi', 'alpha')
_SYMBOLS = ('β', 'ρ^δ', 'ρ^A', 'φ = ρ^δ + ρ^A', 'χ', 'α = β + φ + χ')


def _decomposition(end: list[Row]) -> str:
  lines = []
  for name in KINDS:
    of = [r for r in end if kind(r) == name and np.isfinite(r['beta'])]
    if not of:
      continue
    inside = lambda key, which, of=of: [{'x': r[key].get(which, np.nan)} for r in of]
    lines.append(
      [
        name,
        *(_cell(value(of, part)) for part in _PARTS),
        _cell(value(of, 'concentration'), 1),
        *(
          figure_of(median_of(inside(key, which), 'x'))
          for key in ('r_squared', 'r_squared_linear')
          for which in ('sigma_squared', 'kronecker', 'gauss_newton')
        ),
      ]
    )
  columns = (
    'slopes on log σ', *_SYMBOLS, 'concentration', 'R² of log h on log σ²', '... on h^Kron',
    '... on h_GN', 'R² of h on σ²', '... on h^Kron', '... on h_GN',
  )  # fmt: skip
  return table(columns, lines)


def _ablations(ablations: list[Row]) -> str:
  lines = []
  for name in dict.fromkeys(r['ablation'] for r in ablations):
    for which in KINDS:
      of = [
        r for r in ablations if r['ablation'] == name and r['point'] == 'end' and kind(r) == which
      ]
      if of:
        lines.append(
          [
            name,
            which,
            f'{of[0]["loss"]:.3f}',
            *(_cell(value(of, part)) for part in _PARTS),
            figure_of(median_of(of, 'alpha_r_squared')),
            f'{sum(r["negative"] for r in of)} of {sum(r["directions"] for r in of)}',
          ]
        )
  return table(('network', 'layers', 'loss', *_SYMBOLS, 'median R² of α', 'h < 0'), lines, 2)


# ---------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------


def figures(rows: list[Row]) -> dict[str, Figure]:
  """By name: what the layers are after training, and how they got there."""
  with matplotlib.rc_context(plots.STYLE):
    return {'overview': _overview(rows), 'course': _course(rows)}


def _colour(row: Row) -> str:
  return plots.COLOURS.get(row['type'], plots.GREY)


def _type_handles(rows: Iterable[Row]) -> list[Any]:
  from matplotlib.lines import Line2D

  present = {r['type'] for r in rows}
  label = lambda t: str(t).replace('_', ' ')
  return [
    Line2D([], [], marker='o', linestyle='none', color=colour, label=label(name))
    for name, colour in plots.COLOURS.items()
    if name in present
  ]


def _overview(rows: list[Row]) -> Figure:
  end = main_rows(rows)
  figure = Figure(figsize=(11, 8.5), dpi=150, layout='constrained')
  transfer, spread_of, profile, parts = figure.subplots(2, 2).flat

  fitted = [r for r in end if np.isfinite(r['s']) and np.isfinite(r['alpha'] * r['gamma'])]
  for row in fitted:
    full = row['alpha_r_squared'] >= GOOD
    transfer.plot(
      row['alpha'] * row['gamma'], row['s'], 'o', ms=5, mec=_colour(row),
      mfc=_colour(row) if full else 'none',
    )  # fmt: skip
  ends = np.array([0.0, max([1.0, *(r['s'] for r in fitted)]) * 1.05])
  transfer.plot(ends, ends, color='black', linewidth=1)
  transfer.fill_between(ends, 0.9 * ends, 1.1 * ends, color=plots.GREY, alpha=0.2, lw=0)
  transfer.set_xlabel('αγ')
  transfer.set_ylabel('s')
  transfer.set_title(f's = αγ, ±10 %; hollow: R² of α below {GOOD}', loc='left')

  for row in end:
    if np.isfinite(row['participation_h']) and np.isfinite(row['alpha'] * row['gamma']):
      spread_of.plot(
        row['alpha'] * row['gamma'], row['participation_h'], 'o', ms=5, mec=_colour(row),
        mfc='none' if row['negative'] else _colour(row),
      )  # fmt: skip
  from spectral_optax.curvature import participation_bound

  grid = np.linspace(1.15, max(3.0, ends[1]), 200)
  spread_of.plot(grid, np.asarray(participation_bound(grid, 1.0)), color='black', linewidth=1)
  spread_of.set_ylim(0.9, 1.1 * max([6.0, *(row['participation_h'] for row in fitted)]))
  spread_of.set_xlabel('αγ')
  spread_of.set_ylabel('participation ratio of h')
  spread_of.set_title('Below ζ(αγ)² / ζ(2αγ); hollow: some h negative', loc='left')

  every = main_rows(rows, None)
  order = ('start', 'early', 'middle', 'end')
  stage = lambda r: (
    r['point'] if r['point'] in ('start', 'end') else 'early' if r['point'] == '20' else 'middle'
  )
  order = [which for which in order if any(stage(r) == which for r in every)]
  bottom = np.zeros(len(order))
  for name, colour in (
    ('lognormal', plots.GREEN), ('exponential', plots.ORANGE), ('power_law', plots.BLUE),
  ):  # fmt: skip
    part = []
    for which in order:
      won = [r['profile'] for r in every if stage(r) == which and r['profile']]
      part.append(sum(p == name for p in won) / max(len(won), 1))
    profile.bar(order, part, 0.6, bottom=bottom, color=colour, label=name.replace('_', '-'))
    bottom += part
  profile.set_ylabel('part of the layers')
  profile.set_title('Which profile of σ wins by BIC', loc='left')
  profile.set_ylim(0, 1.15)
  profile.legend(loc='upper center', ncols=3)

  present = [k for k in KINDS if any(kind(r) == k and np.isfinite(r['beta']) for r in end)]
  up, down = np.zeros(len(present)), np.zeros(len(present))
  mean = lambda name, part: value([r for r in end if kind(r) == name], part)
  for part, label, colour in (
    ('beta', 'β', plots.BLUE), ('rho_delta', 'ρ^δ', plots.ORANGE),
    ('rho_activation', 'ρ^A', plots.PURPLE), ('chi', 'χ', plots.GREEN),
  ):  # fmt: skip
    height = np.array([mean(k, part).mean() if len(mean(k, part)) else 0 for k in present])
    parts.bar(
      present, height, 0.6, bottom=np.where(height >= 0, up, down), color=colour, label=label
    )
    up, down = up + np.maximum(height, 0), down + np.minimum(height, 0)
  parts.axhline(0, color=plots.GREY, linewidth=1)
  parts.set_title('α = β + ρ^δ + ρ^A + χ: slopes on log σ, means', loc='left')
  parts.tick_params(axis='x', labelrotation=35)
  for text in parts.get_xticklabels():
    text.set_horizontalalignment('right')
  parts.set_ylim(top=1.2 * max([*up, 1.0]))
  parts.legend(ncols=4, loc='upper center')
  figure.legend(handles=_type_handles(end), loc='outside upper center', ncols=6)
  return figure


def _course(rows: list[Row]) -> Figure:
  every = main_rows(rows, None)
  runs = list(dict.fromkeys(r['run'] for r in every))
  columns = min(3, len(runs))
  figure = Figure(
    figsize=(3.6 * columns + 0.5, 2.7 * math.ceil(len(runs) / columns) + 0.6),
    dpi=150,
    layout='constrained',
  )
  grid = figure.subplots(math.ceil(len(runs) / columns), columns, squeeze=False, sharey=True)
  for axes in grid.flat[len(runs) :]:
    axes.set_visible(False)
  for axes, run in zip(grid.flat, runs, strict=False):
    of = [r for r in every if r['run'] == run]
    points = [p for p in points_of(of) if any(r['point'] == p for r in of)]
    for layer in dict.fromkeys(r['layer'] for r in of):
      own = sorted((r for r in of if r['layer'] == layer), key=lambda r: r['step'])
      places = [points.index(r['point']) for r in own]
      axes.plot(places, [r['alpha'] for r in own], color=_colour(own[0]), linewidth=0.8, alpha=0.7)
      for place, row in zip(places, own, strict=True):
        poor = not row['alpha_r_squared'] >= GOOD
        axes.plot(
          place, row['alpha'], 'o', ms=4, mec=_colour(row), mfc='white' if poor else _colour(row)
        )
    axes.axhline(2, color=plots.GREY, linewidth=0.8, linestyle=':')
    steps = {r['point']: r['step'] for r in of}
    axes.set_xticks(range(len(points)), [str(steps[p]) for p in points])
    axes.set_title(run, loc='left')
    axes.set_ylim(-0.5, 4)
  figure.supxlabel('step')
  figure.supylabel(f'α (hollow: R² below {GOOD})')
  figure.legend(handles=_type_handles(every), loc='outside upper center', ncols=6)
  return figure
