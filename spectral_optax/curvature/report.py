"""What was measured: a row a matrix, as a table, as JSON, as plots, as α for the optimizer."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from spectral_optax.curvature.fits import PowerLawFit, RankProfile

# What `spectral_newton` takes where it knows nothing: convolutions, and any other layer.
DEFAULT_ALPHA: Mapping[str | None, float] = {'conv': 2.0, None: 1.5}
# Ours: a fit that explains less, or of a layer with more h_k below zero, says nothing of α.
MIN_R_SQUARED = 0.8
MAX_NEGATIVE = 0.25


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCurvature:
  """One matrix.

  Attributes:
    path: Of the parameter.
    index: Which matrix of it, where the parameter is a stack; () where it is not.
    batch_shape: Of the stack; () where the parameter is one matrix.
    layer_type: See `spectral_optax.layer_types`.
    shape: (rows, columns).
    spectrum: All singular values of the gradient, decreasing, (min(rows, columns),).
    sigma: The leading ones, σ_k, (K,).
    h: Exact curvature h_k along the k-th singular direction, (K,), negative ones too.
    h_gauss_newton: Of the Gauss-Newton matrix, (K,), or None.
    alpha: Fit of h_k ∝ σ_k^α.
    gamma: Fit of σ_k ∝ k^-γ.
    s: Fit of h_(r) ∝ r^-s.
    profile: Which model σ_k follows.
    participation_h: Participation ratio of the positive h_k.
    participation_gradient: Of `spectrum`.
    bound: What `participation_bound` says for these α and γ.
    num_directions: How many of the K singular values are more than rounding.
    num_negative: How many of their h_k are negative.
    reason: Why there is nothing to fit at all (a gradient of zero, a NaN); empty otherwise.
  """

  path: str
  index: tuple[int, ...]
  batch_shape: tuple[int, ...]
  layer_type: str | None
  shape: tuple[int, int]
  spectrum: np.ndarray
  sigma: np.ndarray
  h: np.ndarray
  h_gauss_newton: np.ndarray | None
  alpha: PowerLawFit
  gamma: PowerLawFit
  s: PowerLawFit
  profile: RankProfile
  participation_h: float
  participation_gradient: float
  bound: float
  num_directions: int
  num_negative: int
  reason: str = ''

  @property
  def name(self) -> str:
    """``'head/kernel'``, or ``'layers/kernel[3]'`` for one of a stack."""
    return self.path + (f'[{",".join(map(str, self.index))}]' if self.index else '')

  @property
  def predicted_s(self) -> float:
    """What the spectral transfer law says s is: αγ."""
    return self.alpha.exponent * self.gamma.exponent

  @property
  def transfer_error(self) -> float:
    """``|s - αγ| / s``. A layer of few directions, or without power laws, is far off."""
    return abs(self.s.exponent - self.predicted_s) / abs(self.s.exponent or math.nan)

  def objection(
    self, min_r_squared: float = MIN_R_SQUARED, max_negative: float = MAX_NEGATIVE
  ) -> str:
    """Why α is not to be relied on; empty where it is.

    Args:
      min_r_squared: The smallest R² of its fit that will do.
      max_negative: The largest part of the h_k that may be negative.
    """
    if math.isnan(self.alpha.exponent):
      return self.reason or self.alpha.reason
    if not self.alpha.r_squared >= min_r_squared:
      return f'R² is {self.alpha.r_squared:.2f}, below {min_r_squared:g}'
    if self.num_negative > max_negative * self.num_directions:
      return f'{self.num_negative} of {self.num_directions} h_k are negative'
    return ''


@dataclasses.dataclass(frozen=True, eq=False)
class CurvatureReport:
  """What `measure` has found.

  Attributes:
    layers: A row a matrix, in the order in which the loss uses them: by depth.
    loss: Over all batches.
    settings: How it was measured, of plain numbers and strings.
    alignment: The decomposition of each matrix (`kronecker_alignment`), by
      `LayerCurvature.name` (which is the path, unless layers are stacked); None where
      it was not computed. Attach it with `dataclasses.replace(report, alignment=...)`.
  """

  layers: tuple[LayerCurvature, ...]
  loss: float
  settings: Mapping[str, Any]
  alignment: Mapping[str, Any] | None = None

  # -------------------------------------------------------------------------------
  # For a reader
  # -------------------------------------------------------------------------------

  def __str__(self) -> str:
    return self.table(format='markdown')

  def table(
    self, by: Literal['layer', 'type'] = 'layer', format: Literal['rich', 'markdown'] = 'rich'
  ) -> Any:
    """What was measured, a line a matrix or a line a layer type.

    Args:
      by: "layer": α with its standard error and R², γ, s beside αγ (they agree where the
        spectral transfer law s ≈ αγ holds) and how far they are apart, the participation
        ratio of the curvature, its bound and the gradient's, the rank profile, and how
        many h_k are negative. "type": means and ranges of these over the layers of a
        type that have a fit.
      format: "rich": a `rich.table.Table`, for ``rich.print`` (needs rich). "markdown":
        a string.

    Raises:
      ValueError: an unknown `by` or `format`.
      ImportError: "rich" without rich.
    """
    if by == 'layer':
      columns, rows = _LAYER_COLUMNS, [_layer_cells(layer) for layer in self.layers]
    elif by == 'type':
      columns, rows = _TYPE_COLUMNS, _type_cells(self.layers)
    else:
      raise ValueError(f'by must be "layer" or "type", got {by!r}.')
    if format == 'markdown':
      return _markdown(columns, rows)
    if format != 'rich':
      raise ValueError(f'format must be "rich" or "markdown", got {format!r}.')
    try:
      import rich.table
    except ImportError as error:
      raise ImportError(
        "format='rich' needs rich: pip install 'spectral-optax[examples]', or ask for"
        " format='markdown'."
      ) from error
    table = rich.table.Table(
      title=f'Curvature along the leading {self.settings.get("top_k", "")} singular directions;'
      f' loss {self.loss:.4g}'
    )
    for i, column in enumerate(columns):
      table.add_column(column, justify='left' if i < 2 else 'right', no_wrap=i == 0)
    for row in rows:
      table.add_row(*(cell.replace('[', r'\[') for cell in row))
    return table

  def plot(self, kind: str, **options: Any) -> Any:
    """A figure, as a paper would print it.

    Args:
      kind: "curvature": h_k against σ_k by layer, with the fit and its interval.
        "spectral_transfer": s against αγ, with the band of ±10 %. "depth": α by depth,
        coloured by layer type. "rank_profile": σ_k against its rank, with the three
        models. "transfer": T(σ; α) over each layer's spectrum. "alignment": the slopes β, φ
        and χ stacked, layer by layer, where `alignment` is attached.
      **options: See the functions of `spectral_optax.curvature.plots`.

    Returns:
      A `matplotlib.figure.Figure`; ``.savefig(path)`` writes it.

    Raises:
      ValueError: an unknown kind, a layer that is not there, no `alignment`.
      ImportError: no matplotlib; says which extra has it.
    """
    from spectral_optax.curvature import plots

    return plots.plot(self, kind, **options)

  # -------------------------------------------------------------------------------
  # For a file
  # -------------------------------------------------------------------------------

  def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
    """All of it as JSON; what JSON has no number for is "NaN", "Infinity", "-Infinity".

    Args:
      path: Of a file to write as well; folders are made.
    """
    content = {
      'version': 1,
      'loss': self.loss,
      'settings': dict(self.settings),
      'layers': [
        {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)} for layer in self.layers
      ],
      'alignment': None
      if self.alignment is None
      else {name: found.to_dict() for name, found in self.alignment.items()},
    }
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    # A list of numbers is one line.
    numbers = r'\[\s*(?:(?:-?[\d.][\deE+.-]*|"NaN"|"-?Infinity"|true|false),?\s*)*\]'
    text = re.sub(numbers, lambda flat: ' '.join(flat.group().split()), text) + '\n'
    if path is not None:
      file = pathlib.Path(path)
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(text, encoding='utf-8')
    return text

  @classmethod
  def from_json(cls, source: str | os.PathLike[str]) -> 'CurvatureReport':
    """The report that `to_json` wrote.

    Args:
      source: The JSON itself, or a `pathlib.Path` to it.

    Raises:
      ValueError: it is no such report.
    """
    text = source if isinstance(source, str) else pathlib.Path(source).read_text('utf-8')
    content = json.loads(text)
    if not isinstance(content, dict) or content.get('version') != 1:
      raise ValueError('This JSON is not a curvature report of version 1.')
    alignment = content['alignment']
    if alignment is not None:
      # Not above: it builds on this module.
      from spectral_optax.curvature.alignment import KroneckerAlignment

      alignment = {
        name: KroneckerAlignment.from_dict(_numbers(found)) for name, found in alignment.items()
      }
    return cls(
      tuple(map(_read_layer, content['layers'])),
      float(content['loss']),
      content['settings'],
      alignment,
    )

  # -------------------------------------------------------------------------------
  # For an optimizer
  # -------------------------------------------------------------------------------

  def alpha_tree(
    self,
    *,
    default: float | Mapping[str | None, float] = DEFAULT_ALPHA,
    min_r_squared: float = MIN_R_SQUARED,
    max_negative: float = MAX_NEGATIVE,
    clip: tuple[float, float] = (0.5, 2.5),
  ) -> dict[str, Any]:
    """α by path, as ``spectral_newton(alpha=...)`` takes it.

    Args:
      default: α of a layer whose fit is no good: a number, or one by layer type, with that
        of any other type under None. Unless given, what `spectral_newton` has.
      min_r_squared: A fit with a smaller R² is no good.
      max_negative: Nor is one where more than this part of the h_k is negative.
      clip: The range that a measured α is brought into.

    Returns:
      A dict: a float for each parameter that is a matrix, an array of its batch shape
      for a stack of layers.

    Raises:
      ValueError: a range the wrong way round or below zero.
    """
    low, high = clip
    if not 0 <= low <= high:
      raise ValueError(f'clip must be (low, high) with 0 <= low <= high, got {clip}.')
    found: dict[str, list[float]] = {}
    for layer in self.layers:
      alpha = float(np.clip(layer.alpha.exponent, low, high))
      if layer.objection(min_r_squared, max_negative):
        alpha = default
        if isinstance(default, Mapping):
          alpha = default.get(layer.layer_type, default.get(None))  # type: ignore
          if alpha is None:
            raise ValueError(
              f'default has no α for the layer type {layer.layer_type!r}, nor one for None.'
            )
      found.setdefault(layer.path, []).append(float(alpha))  # type: ignore
    shapes = {layer.path: layer.batch_shape for layer in self.layers}
    return {
      path: np.array(values).reshape(shapes[path]) if shapes[path] else values[0]
      for path, values in found.items()
    }


# ---------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------

_LAYER_COLUMNS = (
  'layer',
  'type',
  'shape',
  'α',
  'R²',
  'γ',
  's',
  'αγ',
  '|s - αγ| / s',
  'PR h',
  'bound',
  'PR σ',
  'profile',
  'h < 0',
)
_TYPE_COLUMNS = (
  'type',
  'layers',
  'α: mean',
  'range',
  'R²: median',
  'least',
  '|s - αγ| / s: median',
  'PR h: range',
  'PR σ: range',
  'h < 0',
)


def _figure(x: float, digits: int = 2) -> str:
  if math.isnan(x):
    return '–'
  return '∞' if math.isinf(x) else f'{x:.{digits}f}'


def _percent(x: float) -> str:
  return '–' if math.isnan(x) else f'{100 * x:.1f} %'


def _layer_cells(layer: LayerCurvature) -> list[str]:
  alpha, error = layer.alpha.exponent, layer.alpha.standard_error
  return [
    short_name(layer.name),
    layer.layer_type or '',
    '{} × {}'.format(*layer.shape),
    layer.reason or layer.alpha.reason
    if math.isnan(alpha)
    else _figure(alpha) + ('' if math.isnan(error) else f' ± {error:.2f}'),
    _figure(layer.alpha.r_squared),
    _figure(layer.gamma.exponent),
    _figure(layer.s.exponent),
    _figure(layer.predicted_s),
    _percent(layer.transfer_error),
    _figure(layer.participation_h, 1),
    _figure(layer.bound, 1),
    _figure(layer.participation_gradient, 1),
    layer.profile.best.replace('_', ' ') or '–',
    f'{layer.num_negative} of {layer.num_directions}',
  ]


def _type_cells(layers: Iterable[LayerCurvature]) -> list[list[str]]:
  by_type: dict[str | None, list[LayerCurvature]] = {}
  for layer in layers:
    by_type.setdefault(layer.layer_type, []).append(layer)
  rows = []
  for name, of in by_type.items():
    fitted = [layer for layer in of if not math.isnan(layer.alpha.exponent)]
    values = lambda get, fitted=fitted: np.array([get(layer) for layer in fitted])
    alpha, r_squared = values(lambda x: x.alpha.exponent), values(lambda x: x.alpha.r_squared)
    count = f'{len(of)}' if len(fitted) == len(of) else f'{len(of)}, {len(fitted)} with a fit'
    rows.append(
      [
        name or 'other',
        count,
        _over(np.mean, alpha),
        _range(alpha),
        _over(np.median, r_squared),
        _over(np.min, r_squared),
        _over(np.median, values(lambda x: x.transfer_error), _percent),
        _range(values(lambda x: x.participation_h), 1),
        _range(values(lambda x: x.participation_gradient), 1),
        f'{sum(x.num_negative for x in of)} of {sum(x.num_directions for x in of)}',
      ]
    )
  return rows


def _over(
  reduce: Callable[[np.ndarray], Any], x: np.ndarray, show: Callable[[float], str] = _figure
) -> str:
  x = x[~np.isnan(x)]
  return show(float(reduce(x))) if len(x) else '–'


def _range(x: np.ndarray, digits: int = 2) -> str:
  x = x[~np.isnan(x)]
  return f'{x.min():.{digits}f} to {x.max():.{digits}f}' if len(x) else '–'


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [columns, ['---', '---'] + ['---:'] * (len(columns) - 2), *rows]
  return '\n'.join(
    f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in line)} |' for line in lines
  )


def short_name(name: str) -> str:
  """``'blocks/0/conv1/kernel'`` -> ``'blocks/0/conv1'``: all weights are called something."""
  return re.sub(r'/(kernel|weight|w)(?=\[|$)', '', name)


# ---------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------


def _plain(x: Any) -> Any:
  if isinstance(x, PowerLawFit | RankProfile):
    x = x._asdict()
  if isinstance(x, Mapping):
    return {str(name): _plain(value) for name, value in x.items()}
  if isinstance(x, np.ndarray | np.generic):
    x = x.tolist()
  if isinstance(x, list | tuple):
    return [_plain(value) for value in x]
  if isinstance(x, float) and not math.isfinite(x):
    return 'NaN' if math.isnan(x) else 'Infinity' if x > 0 else '-Infinity'
  return x


def _numbers(x: Any) -> Any:
  """With the numbers that JSON does not have, in what holds no names."""
  if isinstance(x, dict):
    return {name: _numbers(value) for name, value in x.items()}
  if isinstance(x, list):
    return [_numbers(value) for value in x]
  return float(x) if x in ('NaN', 'Infinity', '-Infinity') else x


def _read_array(x: list[Any]) -> np.ndarray:
  return np.array([float(value) for value in x])


def _read_fit(content: Mapping[str, Any]) -> PowerLawFit:
  numbers = {name: float(content[name]) for name in PowerLawFit._fields[:3]}
  low, high = map(float, content['interval'])
  return PowerLawFit(
    **numbers,
    num_points=content['num_points'],
    standard_error=float(content['standard_error']),
    interval=(low, high),
    reason=content['reason'],
  )


def _read_profile(content: Mapping[str, Any]) -> RankProfile:
  return RankProfile(
    content['best'],
    {name: float(x) for name, x in content['bic'].items()},
    {name: tuple(map(float, x)) for name, x in content['coefficients'].items()},
    {name: float(x) for name, x in content['r_squared'].items()},
    content['num_points'],
    content['reason'],
  )


def _read_layer(content: Mapping[str, Any]) -> LayerCurvature:
  gauss_newton = content['h_gauss_newton']
  rows, columns = content['shape']
  return LayerCurvature(
    path=content['path'],
    index=tuple(content['index']),
    batch_shape=tuple(content['batch_shape']),
    layer_type=content['layer_type'],
    shape=(rows, columns),
    spectrum=_read_array(content['spectrum']),
    sigma=_read_array(content['sigma']),
    h=_read_array(content['h']),
    h_gauss_newton=None if gauss_newton is None else _read_array(gauss_newton),
    alpha=_read_fit(content['alpha']),
    gamma=_read_fit(content['gamma']),
    s=_read_fit(content['s']),
    profile=_read_profile(content['profile']),
    participation_h=float(content['participation_h']),
    participation_gradient=float(content['participation_gradient']),
    bound=float(content['bound']),
    num_directions=content['num_directions'],
    num_negative=content['num_negative'],
    reason=content['reason'],
  )
