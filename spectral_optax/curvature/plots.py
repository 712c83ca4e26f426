"""The figures of a report. Needs matplotlib, but not pyplot: nothing is shown, all is returned."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spectral_optax.curvature.fits import PROFILES, PowerLawFit
from spectral_optax.curvature.report import CurvatureReport, LayerCurvature, short_name
from spectral_optax.transfer import transfer

# Okabe and Ito's, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED = '#0072B2', '#E69F00', '#009E73', '#D55E00'
PURPLE, SKY, GREY = '#CC79A7', '#56B4E9', '#777777'
COLOURS: Mapping[str | None, str] = {
  'conv': BLUE,
  'dense': ORANGE,
  'attention': GREEN,
  'mlp_up': PURPLE,
  'mlp_down': RED,
  'head': SKY,
}
STYLE: Any = {
  'font.size': 10,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': GREY,
  'axes.titlesize': 10,
  'xtick.color': '#444444',
  'ytick.color': '#444444',
  'axes.grid': True,
  'grid.color': '#E6E6E6',
  'grid.linewidth': 0.8,
  'axes.axisbelow': True,
  'legend.frameon': False,
}
PANELS = 12


def plot(report: CurvatureReport, kind: str, **options: Any) -> Any:
  """See `CurvatureReport.plot`."""
  if kind not in KINDS:
    raise ValueError(f'kind must be one of {", ".join(KINDS)}, got {kind!r}.')
  try:
    import matplotlib
  except ImportError as error:
    raise ImportError("Plots need matplotlib: pip install 'spectral-optax[plots]'.") from error
  with matplotlib.rc_context(STYLE):
    return KINDS[kind](report, **options)


# ---------------------------------------------------------------------------------
# A panel a layer
# ---------------------------------------------------------------------------------


def curvature(report: CurvatureReport, *, layers: Sequence[str] | None = None) -> Any:
  """h_k against σ_k by layer, the fit h ∝ σ^α, and the interval of its exponent.

  Negative h_k, which no fit takes, are hollow and red, at their absolute value.

  Args:
    report: What `measure` found.
    layers: `LayerCurvature.name`s; None for up to twelve, at even distances.
  """
  figure, panels = _panels(report, layers, 'σ$_k$', 'h$_k$')
  for axes, layer in panels:
    sigma, h = layer.sigma[: layer.num_directions], layer.h[: layer.num_directions]
    positive = h > 0
    axes.plot(sigma[positive], h[positive], 'o', ms=4, color=_colour(layer), mec='white', mew=0.4)
    axes.plot(sigma[h < 0], -h[h < 0], 'o', ms=4, mfc='none', mec=RED, mew=0.9)
    if math.isnan(layer.alpha.exponent):
      _title(axes, layer, f'no fit: {positive.sum()} of {len(h)} h$_k$ > 0')
      continue
    _title(axes, layer, f'α = {layer.alpha.exponent:.2f}, R² = {layer.alpha.r_squared:.2f}')
    x = np.log(sigma[positive])
    ends = np.array([x.min(), x.max()])
    line = layer.alpha.log_constant + layer.alpha.exponent * ends
    axes.plot(np.exp(ends), np.exp(line), color='black', linewidth=1.2)
    # All lines of the interval go through the centre of the points.
    centre = layer.alpha.log_constant + layer.alpha.exponent * x.mean()
    grid = np.linspace(ends[0], ends[1], 50)
    edges = [centre + slope * (grid - x.mean()) for slope in _interval(layer.alpha)]
    axes.fill_between(
      np.exp(grid), np.exp(np.min(edges, 0)), np.exp(np.max(edges, 0)), color=GREY, alpha=0.25, lw=0
    )
  handles = [
    _handle('o', 'h$_k$ > 0', color=BLUE),
    _handle('o', '|h$_k$|, h$_k$ < 0', mfc='none', mec=RED),
    _handle('-', 'h ∝ σ$^α$', color='black'),
    _patch('interval of α'),
  ]
  figure.legend(handles=handles, loc='outside upper center', ncols=4)
  return figure


def rank_profile(report: CurvatureReport, *, layers: Sequence[str] | None = None) -> Any:
  """σ_k against its rank, with the three models; the one of smallest BIC is drawn bold.

  Args:
    report: What `measure` found.
    layers: `LayerCurvature.name`s; None for up to twelve, at even distances.
  """
  styles = {'power_law': (BLUE, '-'), 'exponential': (ORANGE, '--'), 'lognormal': (GREEN, '-')}
  figure, panels = _panels(report, layers, 'rank k', 'σ$_k$')
  for axes, layer in panels:
    sigma = layer.sigma[: layer.num_directions]
    ranks = np.arange(1, len(sigma) + 1)
    axes.plot(ranks, sigma, 'o', ms=4, color=GREY, mec='white', mew=0.4)
    best = layer.profile.best
    _title(axes, layer, best.replace('_', ' ') or 'no fit')
    if not best:
      continue
    grid = np.geomspace(1, len(sigma), 100)
    for name, columns in PROFILES.items():
      a, *b = layer.profile.coefficients[name]
      y = a + sum(c * x for c, x in zip(b, columns(grid), strict=True))
      colour, style = styles[name]
      axes.plot(grid, np.exp(y), style, color=colour, linewidth=2.2 if name == best else 1)
    _around(axes, sigma)
  handles = [
    _handle('o', 'σ$_k$', color=GREY),
    *(_handle(s, name.replace('_', ' '), color=c) for name, (c, s) in styles.items()),
  ]
  figure.legend(handles=handles, loc='outside upper center', ncols=4)
  return figure


def transfer_map(
  report: CurvatureReport,
  *,
  damping: float = 0.1,
  layers: Sequence[str] | None = None,
  **alpha_options: Any,
) -> Any:
  """T(σ; α) = σ / (σ^α + d) over each layer's spectrum, σ over its root mean square.

  Args:
    report: What `measure` found.
    damping: d.
    layers: `LayerCurvature.name`s; None for up to twelve, at even distances.
    **alpha_options: Of `CurvatureReport.alpha_tree`, which says what α is.
  """
  alphas = report.alpha_tree(**alpha_options)
  figure, panels = _panels(
    report, layers, 'σ over its root mean square', 'T(σ; α)', share_x=True, share_y=True
  )
  for axes, layer in panels:
    alpha = float(np.asarray(alphas[layer.path])[layer.index])
    measured = layer.alpha.exponent
    note = '' if alpha == measured else f' (measured: {measured:.2f})'
    _title(axes, layer, f'α = {alpha:.2f}' + note.replace('nan', 'no fit'))
    sigma = layer.spectrum / max(np.sqrt(np.mean(layer.spectrum**2)), np.finfo(float).tiny)
    # Without directions that are there by rounding alone.
    sigma = sigma[sigma > 1e-4 * sigma.max(initial=0)]
    if not len(sigma):
      continue
    grid = np.geomspace(1e-2, 20, 200)
    axes.plot(grid, transfer(grid, alpha, damping), color=_colour(layer), linewidth=1)
    axes.plot(sigma, transfer(sigma, alpha, damping), 'o', ms=3, color=_colour(layer))
    if alpha > 0:
      axes.axvline(damping ** (1 / alpha), color=GREY, linewidth=0.8, linestyle=':')
    axes.set_xlim(grid[0], grid[-1])
    axes.set_ylim(0.05, 5)
  handles = [
    _handle('o', "the gradient's σ$_k$", color=BLUE),
    _handle(':', f'σ* = d$^{{1/α}}$, d = {damping:g}', color=GREY),
  ]
  figure.legend(handles=handles, loc='outside upper center', ncols=2)
  return figure


# ---------------------------------------------------------------------------------
# A point a layer
# ---------------------------------------------------------------------------------


def spectral_transfer(
  report: CurvatureReport, *, min_r_squared: float = 0.9, label_outliers: bool = True
) -> Any:
  """S against αγ, and the band of ±10 % around s = αγ.

  Args:
    report: What `measure` found.
    min_r_squared: Layers whose fit of α has less are hollow.
    label_outliers: Whether to name the layers that are outside of the band.
  """
  layers = [x for x in report.layers if x.predicted_s > 0 and x.s.exponent > 0]
  figure, axes = _figure(6, 5.2)
  axes.set_xlabel('α γ')
  axes.set_ylabel('s')
  ends = [v for x in layers for v in (x.predicted_s, x.s.exponent)]
  low, high = (0.8 * min(ends, default=0.5), 1.25 * max(ends, default=4))
  line = np.array([low, high])
  axes.fill_between(line, 0.9 * line, line / 0.9, color=GREY, alpha=0.2, lw=0)
  axes.plot(line, line, color=GREY, linewidth=1)
  for layer in layers:
    good, colour = layer.alpha.r_squared >= min_r_squared, _colour(layer)
    fill = colour if good else 'none'
    axes.plot(layer.predicted_s, layer.s.exponent, 'o', ms=7, mfc=fill, mec=colour)
    if label_outliers and layer.transfer_error > 0.1:
      above = layer.s.exponent > layer.predicted_s
      axes.annotate(
        short_name(layer.name),
        (layer.predicted_s, layer.s.exponent),
        xytext=(-6, 5) if above else (6, -11),
        ha='right' if above else 'left',
        textcoords='offset points',
        fontsize=8,
        color='#444444',
      )
  _log(axes, low, high)
  handles = [_handle('o', _type(kind), color=COLOURS.get(kind, GREY)) for kind in _types(layers)]
  handles.append(_patch('s = αγ ± 10 %'))
  if any(x.alpha.r_squared < min_r_squared for x in layers):
    handles.append(_handle('o', f'R² < {min_r_squared:g}', mfc='none', mec=GREY))
  axes.legend(handles=handles, loc='upper left')
  errors = [x.transfer_error for x in layers if x.alpha.r_squared >= min_r_squared]
  if errors:
    axes.set_title(
      f'median |s - αγ| / s = {100 * np.median(errors):.1f} % over {len(errors)} layers with'
      f' R² ≥ {min_r_squared:g}',
      loc='left',
    )
  return figure


def depth(report: CurvatureReport, *, min_r_squared: float = 0.9) -> Any:
  """α of each layer in order of depth, with its interval, coloured by layer type.

  Args:
    report: What `measure` found.
    min_r_squared: Layers whose fit of α has less are hollow.
  """
  figure, axes = _figure(_width(len(report.layers)), 4.2)
  for i, layer in enumerate(report.layers):
    if math.isnan(layer.alpha.exponent):
      continue
    colour = _colour(layer)
    low, high = _interval(layer.alpha)
    axes.plot([i, i], [low, high], color=colour, linewidth=1.6, alpha=0.6)
    fill = colour if layer.alpha.r_squared >= min_r_squared else 'white'
    axes.plot(i, layer.alpha.exponent, 'o', ms=7, mfc=fill, mec=colour)
  axes.axhline(2, color=GREY, linewidth=1, linestyle=':')
  axes.set_ylabel('curvature exponent α')
  _name_layers(axes, report.layers)
  handles = [
    _handle('o', _type(kind), color=COLOURS.get(kind, GREY)) for kind in _types(report.layers)
  ]
  if any(x.alpha.r_squared < min_r_squared for x in report.layers):
    handles.append(_handle('o', f'R² < {min_r_squared:g}', mfc='none', mec=GREY))
  figure.legend(handles=handles, loc='outside upper center', ncols=4)
  return figure


def alignment(report: CurvatureReport) -> Any:
  """The slopes β, φ and χ of the decomposition, stacked, layer by layer: their sum is α.

  Args:
    report: What `measure` found, with `alignment` attached.

  Raises:
    ValueError: no `alignment`, or none of its layers has slopes.
  """
  found = report.alignment or {}
  layers = [x for x in report.layers if x.name in found and not math.isnan(found[x.name].beta)]
  if not layers:
    raise ValueError(
      'There is no decomposition to plot: attach one with curvature.align_report, or with'
      ' dataclasses.replace(report, alignment={name: kronecker_alignment(...)}).'
    )
  figure, axes = _figure(_width(len(layers)), 4.2)
  parts = {
    'β, eigenvalues': ('beta', BLUE),
    'φ, alignment': ('phi_slope', ORANGE),
    'χ, exact / Kronecker': ('chi_slope', GREEN),
  }
  up, down, numbers = np.zeros(len(layers)), np.zeros(len(layers)), np.arange(len(layers))
  for label, (name, colour) in parts.items():
    values = np.nan_to_num([getattr(found[x.name], name) for x in layers])
    axes.bar(
      numbers, values, 0.62, bottom=np.where(values >= 0, up, down), color=colour, label=label
    )
    up, down = up + np.maximum(values, 0), down + np.minimum(values, 0)
  exact = [found[x.name].alpha for x in layers]
  axes.plot(numbers, exact, 'D', ms=6, color='black', mec='white', label='α, their sum')
  axes.axhline(0, color=GREY, linewidth=1)
  axes.set_ylabel('slope on log σ$_k$')
  _name_layers(axes, layers)
  handles = sorted(axes.get_legend_handles_labels()[0], key=lambda x: x.get_label()[0] == 'α')
  figure.legend(handles=handles, loc='outside upper center', ncols=4, fontsize=9)
  return figure


KINDS: Mapping[str, Callable[..., Any]] = {
  'curvature': curvature,
  'spectral_transfer': spectral_transfer,
  'depth': depth,
  'rank_profile': rank_profile,
  'transfer': transfer_map,
  'alignment': alignment,
}

# ---------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Any, Any]:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=150, layout='constrained')
  return figure, figure.subplots()


def _panels(
  report: CurvatureReport,
  names: Sequence[str] | None,
  x_label: str,
  y_label: str,
  share_x: bool = False,
  share_y: bool = False,
) -> tuple[Any, Iterator[tuple[Any, LayerCurvature]]]:
  from matplotlib.figure import Figure

  layers = _chosen(report, names)
  columns = min(4, len(layers))
  rows = math.ceil(len(layers) / columns)
  figure = Figure(figsize=(2.7 * columns + 0.6, 2.3 * rows + 0.6), dpi=150, layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
  figure.supxlabel(x_label, fontsize=10)
  figure.supylabel(y_label, fontsize=10)

  def pairs() -> Iterator[tuple[Any, LayerCurvature]]:
    for axes in grid.flat[len(layers) :]:
      axes.set_visible(False)
    for i, (axes, layer) in enumerate(zip(grid.flat, layers, strict=False)):
      if share_x and i + columns >= len(layers):  # Nothing below it.
        axes.xaxis.set_tick_params(labelbottom=True)
      axes.set_xscale('log')
      axes.set_yscale('log')
      yield axes, layer
      for axis, ends in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        _few_ticks(axis, *ends)

  return figure, pairs()


def _chosen(report: CurvatureReport, names: Sequence[str] | None) -> list[LayerCurvature]:
  if names is None:
    count = min(PANELS, len(report.layers))
    even = np.linspace(0, len(report.layers) - 1, count).round().astype(int)
    return [report.layers[i] for i in even]
  known = {layer.name: layer for layer in report.layers}
  for name in names:
    if name not in known:
      raise ValueError(f'There is no layer {name!r}; there are {", ".join(map(repr, known))}.')
  return [known[name] for name in names]


def _few_ticks(axis: Any, low: float, high: float) -> None:
  """Powers of ten, and what it takes between them for three or so."""
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  decades = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
  subs = next(
    subs
    for enough, subs in (
      (decades >= 2, (1,)),
      (high / low > 12, (1, 3)),
      (high / low > 3, (1, 2, 5)),
      (True, (1, 1.5, 2, 3, 4, 5, 6, 7, 8)),
    )
    if enough
  )
  axis.set_major_locator(LogLocator(subs=subs, numticks=6))
  plain = low >= 1e-3 and high <= 1e4
  axis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}' if plain else _power(x)))
  axis.set_minor_formatter(NullFormatter())


def _power(x: float) -> str:
  """10⁻⁵, 2 · 10⁻⁵."""
  mantissa, exponent = f'{x:.0e}'.split('e')
  return ('' if mantissa == '1' else f'{mantissa} · ') + f'10$^{{{int(exponent)}}}$'


def _log(axes: Any, low: float, high: float) -> None:
  for axis, scale, limit in (
    (axes.xaxis, axes.set_xscale, axes.set_xlim),
    (axes.yaxis, axes.set_yscale, axes.set_ylim),
  ):
    scale('log')
    limit(low, high)
    _few_ticks(axis, low, high)


def _around(axes: Any, values: np.ndarray) -> None:
  """What the models do far from the values does not matter."""
  axes.set_ylim(values.min() / 1.6, values.max() * 1.6)


def _title(axes: Any, layer: LayerCurvature, line: str) -> None:
  axes.set_title(f'{short_name(layer.name)}\n{line}', fontsize=9)


def _interval(fit: PowerLawFit) -> tuple[float, float]:
  """The bootstrap's, or two standard errors."""
  if not math.isnan(fit.interval[0]):
    return fit.interval
  error = 0.0 if math.isnan(fit.standard_error) else fit.standard_error
  return fit.exponent - 2 * error, fit.exponent + 2 * error


def _colour(layer: LayerCurvature) -> str:
  return COLOURS.get(layer.layer_type, GREY)


def _types(layers: Iterable[LayerCurvature]) -> list[str | None]:
  return list(dict.fromkeys(layer.layer_type for layer in layers))


def _type(kind: str | None) -> str:
  return {'conv': 'convolution', 'mlp_up': 'MLP up', 'mlp_down': 'MLP down'}.get(
    kind or '', kind or 'other'
  )


def _width(layers: int) -> float:
  return min(max(6.0, 1.5 + 0.42 * layers), 16.0)


def _name_layers(axes: Any, layers: Sequence[LayerCurvature]) -> None:
  step = math.ceil(len(layers) / 40)
  numbers = range(0, len(layers), step)
  axes.set_xticks(numbers, [short_name(layers[i].name) for i in numbers])
  axes.tick_params(axis='x', labelrotation=40, labelsize=8)
  for label in axes.get_xticklabels():
    label.set_horizontalalignment('right')
    label.set_rotation_mode('anchor')
  axes.set_xlim(-0.6, len(layers) - 0.4)
  axes.grid(axis='x', visible=False)


def _handle(style: str, label: str, **options: Any) -> Any:
  from matplotlib.lines import Line2D

  marker = style if style == 'o' else ''
  line: Any = 'none' if marker else style
  return Line2D([], [], marker=marker, linestyle=line, label=label, **options)


def _patch(label: str) -> Any:
  from matplotlib.patches import Patch

  return Patch(facecolor=GREY, alpha=0.25, label=label)
