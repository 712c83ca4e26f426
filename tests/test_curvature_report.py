"""Reports: tables, JSON, α for the optimizer, plots."""

import dataclasses
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from matplotlib.figure import Figure

import spectral_optax
from spectral_optax import curvature, exponents
from spectral_optax.curvature import plots
from spectral_optax.curvature.report import DEFAULT_ALPHA

RNG = np.random.default_rng(0)


def power_law(rows, columns, alpha, gamma=0.9, noise=0.05, seed=0):
  """A gradient G and the matrices A, B of a quadratic with h_k near σ_k^α."""
  rng = np.random.default_rng(seed)
  count = min(rows, columns)
  u, v = (np.linalg.qr(rng.normal(size=(n, count)))[0] for n in (rows, columns))
  sigma = np.arange(1, count + 1.0) ** -gamma
  h = sigma**alpha * np.exp(noise * rng.normal(size=count))
  # Σ_k h_k (u_kᵀ W v_k)² / 2: its curvature along u_k v_kᵀ is h_k.
  as_float = lambda x: np.asarray(x, np.float32)
  return as_float((u * sigma) @ v.T), (as_float(u), as_float(v), as_float(h))


LAYERS = {
  'conv_0/kernel': power_law(12, 8, 2.0),
  'conv_1/kernel': power_law(12, 10, 2.2, seed=1),
  'mlp/kernel': power_law(9, 11, 0.2, gamma=0.6, noise=0.01, seed=2),
  'noise/kernel': power_law(9, 9, 1.2, noise=2.0, seed=3),
  'head/kernel': power_law(9, 8, 4.5, seed=4),
}
STACK = [power_law(8, 8, alpha, seed=7) for alpha in (1.2, 1.6, 2.4)]


def loss_fn(params):
  def one(w, g, parts):
    u, v, h = parts
    return jnp.sum(g * w) + jnp.sum(h * jnp.einsum('ak,ab,bk->k', u, w, v) ** 2) / 2

  total = 0.0
  for path, (g, parts) in LAYERS.items():
    name, leaf = path.split('/')
    w = params[name][leaf]
    total += one(w.reshape(-1, w.shape[-1]), g, parts)
  for w, (g, parts) in zip(params['layers']['kernel'], STACK, strict=True):
    total += one(w, g, parts)
  saddle = params['saddle']['kernel']
  return total + jnp.sum(LAYERS['mlp/kernel'][0] * saddle) - jnp.sum(saddle**2)


@functools.cache
def parameters():
  params = {
    path.split('/')[0]: {'kernel': np.zeros(g.shape, np.float32)} for path, (g, _) in LAYERS.items()
  }
  params['conv_0']['kernel'] = np.zeros((2, 2, 3, 8), np.float32)
  params['conv_1']['kernel'] = np.zeros((2, 2, 3, 10), np.float32)
  params['layers'] = {'kernel': np.zeros((3, 8, 8), 'f'), 'bias': np.zeros((3, 8), 'f')}
  params['saddle'] = {'kernel': np.zeros((9, 11), np.float32)}
  return params


@functools.cache
def report():
  return curvature.measure(loss_fn, parameters(), bootstrap=100)


@functools.cache
def aligned():
  """With a decomposition of two layers: activations and errors that make up a gradient."""
  found = {}
  for name in ('mlp/kernel', 'layers/kernel[1]'):
    layer = next(x for x in report().layers if x.name == name)
    n, m = layer.shape
    a, d = RNG.normal(size=(64, n)), RNG.normal(size=(64, m))
    found[name] = curvature.kronecker_alignment(a.T @ d / 64, a, d, len(layer.h), curvature=layer.h)
  return dataclasses.replace(report(), alignment=found)


def row(name):
  return next(layer for layer in report().layers if layer.name == name)


# ---------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------


def same(a, b):
  np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))


def test_json_round_trip(tmp_path):
  original = aligned()
  path = tmp_path / 'new' / 'report.json'
  text = original.to_json(path)
  assert path.read_text('utf-8') == text
  for source in (text, path):
    found = curvature.CurvatureReport.from_json(source)
    assert len(found.layers) == len(original.layers) == 9
    for a, b in zip(found.layers, original.layers, strict=True):
      assert type(a.alpha) is curvature.PowerLawFit
      assert type(a.profile) is curvature.RankProfile
      assert a.h.dtype == b.h.dtype == np.float64
      same(a, b)
    assert found.loss == original.loss
    assert dict(found.settings) == dict(original.settings)
    assert found.alignment.keys() == original.alignment.keys()
    for name, alignment in found.alignment.items():
      same(alignment, original.alignment[name])
    assert found.to_json() == text
  # Any reader of JSON can read it, and numbers that are not there are in it.
  content = json.loads(text, parse_constant=pytest.fail)
  saddle = next(x for x in content['layers'] if x['path'] == 'saddle/kernel')
  assert saddle['alpha']['exponent'] == 'NaN'
  assert any(x['bound'] == 'Infinity' for x in content['layers'])
  assert content['layers'][0]['h_gauss_newton'] is None
  with pytest.raises(ValueError, match='not a curvature report'):
    curvature.CurvatureReport.from_json('{"version": 0}')


# ---------------------------------------------------------------------------------
# α for the optimizer
# ---------------------------------------------------------------------------------


def test_alpha_tree_takes_what_is_measured_and_falls_back_where_it_is_no_good():
  found = report().alpha_tree(default=1.25, clip=(0.5, 2.5))
  measured = {name: row(name).alpha.exponent for name in ('conv_0/kernel', 'conv_1/kernel')}
  assert {name: found[name] for name in measured} == measured
  assert all(abs(alpha - 2.1) < 0.3 for alpha in measured.values())
  assert found['mlp/kernel'] == 0.5  # Measured 0.2.
  assert found['head/kernel'] == 2.5  # Measured 4.5.
  assert found['noise/kernel'] == found['saddle/kernel'] == 1.25
  assert row('noise/kernel').alpha.r_squared < 0.8
  assert row('saddle/kernel').num_negative == 9
  stack = found['layers/kernel']
  assert stack.shape == (3,)
  np.testing.assert_allclose(stack, [1.2, 1.6, 2.4], atol=0.1)
  assert list(found) == list(dict.fromkeys(x.path for x in report().layers))


def test_alpha_tree_options():
  tree = report().alpha_tree
  assert tree(min_r_squared=0.0)['noise/kernel'] == pytest.approx(
    float(np.clip(row('noise/kernel').alpha.exponent, 0.5, 2.5))
  )
  assert tree(min_r_squared=0.99999, default=7)['conv_0/kernel'] == 7
  assert tree(min_r_squared=0.99999)['conv_0/kernel'] == 2.0
  assert tree(min_r_squared=0.99999, default={'conv': 3, None: 4})['mlp/kernel'] == 4
  assert tree(clip=(0, 9))['head/kernel'] == row('head/kernel').alpha.exponent
  with pytest.raises(ValueError, match=r'0 <= low <= high, got \(2, 1\)'):
    tree(clip=(2, 1))
  with pytest.raises(ValueError, match="no α for the layer type 'dense'"):
    tree(default={'conv': 2})
  some_negative = dataclasses.replace(row('conv_0/kernel'), num_negative=3, num_directions=8)
  assert some_negative.objection(max_negative=0.25) == '3 of 8 h_k are negative'
  assert some_negative.objection(max_negative=0.375) == ''


def test_defaults_are_those_of_the_optimizer():
  for kind in ('conv', 'dense', 'attention', 'mlp_up', 'mlp_down', 'head', 'embedding', None):
    expected, _ = exponents.default_exponents(kind)
    assert DEFAULT_ALPHA.get(kind, DEFAULT_ALPHA[None]) == expected


def test_alpha_tree_reaches_the_optimizer():
  tree = report().alpha_tree()
  tx = spectral_optax.spectral_newton(0.1, alpha=tree, solver='svd')
  params = jax.tree.map(jnp.asarray, parameters())
  state = tx.init(params)
  _, state = jax.jit(tx.update)(jax.jit(jax.grad(loss_fn))(params), state, params)
  used = dict(optax.tree.get(state, 'alpha'))
  assert used.keys() == tree.keys()
  for path, alpha in tree.items():
    np.testing.assert_allclose(used[path], alpha, rtol=1e-6)


# ---------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------


def cells(markdown):
  split = lambda line: [cell.strip() for cell in line.strip('|').replace('\\|', '¦').split('|')]
  return [split(line) for line in markdown.splitlines()]


def test_table_by_layer():
  heading, rule, *lines = cells(report().table(format='markdown'))
  assert len(heading) == len(rule) == 14
  assert [line[0] for line in lines] == [plots.short_name(layer.name) for layer in report().layers]
  by_name = {line[0]: dict(zip(heading, line, strict=True)) for line in lines}
  layer, found = row('conv_0/kernel'), by_name['conv_0']
  assert found['type'] == 'conv'
  assert found['shape'] == '12 × 8'
  assert found['α'] == f'{layer.alpha.exponent:.2f} ± {layer.alpha.standard_error:.2f}'
  assert found['R²'] == f'{layer.alpha.r_squared:.2f}'
  assert found['αγ'] == f'{layer.predicted_s:.2f}'
  assert found['¦s - αγ¦ / s'] == f'{100 * layer.transfer_error:.1f} %'
  assert found['h < 0'] == '0 of 8'
  assert by_name['layers[2]']['shape'] == '8 × 8'
  assert by_name['mlp']['bound'] == '∞'
  saddle = by_name['saddle']
  assert '0 positive points of 9' in saddle['α']
  assert saddle['h < 0'] == '9 of 9'
  assert saddle['s'] == saddle['αγ'] == saddle['bound'] == '–'
  assert str(report()) == report().table(format='markdown')


def test_table_by_type():
  heading, _, *lines = cells(report().table('type', 'markdown'))
  by_type = {line[0]: dict(zip(heading, line, strict=True)) for line in lines}
  assert by_type.keys() == {'conv', 'dense', 'head'}
  convs = [row(f'conv_{i}/kernel') for i in range(2)]
  alphas = [layer.alpha.exponent for layer in convs]
  assert by_type['conv']['layers'] == '2'
  assert by_type['conv']['α: mean'] == f'{np.mean(alphas):.2f}'
  assert by_type['conv']['range'] == f'{min(alphas):.2f} to {max(alphas):.2f}'
  median = 100 * np.median([layer.transfer_error for layer in convs])
  assert by_type['conv']['¦s - αγ¦ / s: median'] == f'{median:.1f} %'
  assert by_type['dense']['layers'] == '6, 5 with a fit'
  assert by_type['dense']['h < 0'].startswith('9 of ')


def test_table_in_a_terminal(monkeypatch):
  console = rich.console.Console(width=200, record=True, file=io.StringIO())
  console.print(report().table())
  console.print(report().table('type'))
  printed = console.export_text()
  for words in ('layers[1]', 'conv_1', '|s - αγ| / s', '9 of 9', 'α: mean'):
    assert words in printed
  with pytest.raises(ValueError, match='by must be'):
    report().table('depth')  # pyright: ignore[reportArgumentType]
  with pytest.raises(ValueError, match='format must be'):
    report().table(format='latex')  # pyright: ignore[reportArgumentType]
  monkeypatch.setitem(sys.modules, 'rich.table', None)
  with pytest.raises(ImportError, match=r'spectral-optax\[examples\].*markdown'):
    report().table()


# ---------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------


def texts(figure):
  figure.canvas.draw()
  return ' '.join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, 'get_text')))


@pytest.mark.parametrize('kind', plots.KINDS)
def test_every_plot_is_drawn(kind, tmp_path):
  figure = aligned().plot(kind)
  assert isinstance(figure, Figure)
  path = tmp_path / 'plot.png'
  figure.savefig(path)
  assert path.read_bytes().startswith(b'\x89PNG')
  drawn = texts(figure)
  for name in ('mlp', 'layers[1]') if kind != 'spectral_transfer' else ('R² ≥ 0.9', 'noise'):
    assert name in drawn


def points(axes):
  lines = [line for line in axes.lines if line.get_marker() == 'o' and len(line.get_xdata())]
  x, y = (
    np.concatenate([np.asarray(get(line)) for line in lines])
    for get in (lambda line: line.get_xdata(), lambda line: line.get_ydata())
  )
  return x, y


def test_what_is_plotted():
  layers = report().layers
  curvature_panels = report().plot('curvature', layers=['mlp/kernel', 'saddle/kernel']).axes
  for axes, name in zip(curvature_panels, ('mlp/kernel', 'saddle/kernel'), strict=True):
    x, y = points(axes)
    n = row(name).num_directions
    np.testing.assert_allclose(sorted(y), sorted(np.abs(row(name).h[:n])))
    np.testing.assert_allclose(sorted(x), sorted(row(name).sigma[:n]))
  assert 'no fit: 0 of 9' in curvature_panels[1].get_title()

  (axes,) = report().plot('depth').axes
  x, y = points(axes)
  fitted = [i for i, layer in enumerate(layers) if not np.isnan(layer.alpha.exponent)]
  np.testing.assert_array_equal(x, fitted)
  np.testing.assert_allclose(y, [layers[i].alpha.exponent for i in fitted])
  assert [t.get_text() for t in axes.get_xticklabels()] == [
    plots.short_name(layer.name) for layer in layers
  ]

  (axes,) = report().plot('spectral_transfer').axes
  x, y = points(axes)
  np.testing.assert_allclose(x, [layers[i].predicted_s for i in fitted])
  np.testing.assert_allclose(y, [layers[i].s.exponent for i in fitted])

  (axes,) = report().plot('transfer', damping=0.3, layers=['head/kernel'], clip=(0, 1)).axes
  x, y = points(axes)
  assert 'α = 1.00 (measured: 4.' in axes.get_title()
  np.testing.assert_allclose(y, x / (x + 0.3), rtol=1e-5)
  assert np.mean(x**2) == pytest.approx(1, rel=1e-4)

  (axes,) = report().plot('rank_profile', layers=['conv_0/kernel']).axes
  assert row('conv_0/kernel').profile.best.replace('_', ' ') in axes.get_title()
  np.testing.assert_allclose(points(axes)[1], row('conv_0/kernel').sigma)

  (axes,) = aligned().plot('alignment').axes
  marks = next(line for line in axes.lines if line.get_marker() == 'D')
  order = [x.name for x in layers if x.name in aligned().alignment]
  tops = [sum(bar[i].get_height() for bar in axes.containers) for i in range(len(order))]
  np.testing.assert_allclose(tops, marks.get_ydata(), rtol=1e-6)
  np.testing.assert_allclose(tops, [aligned().alignment[name].alpha for name in order])


def test_plots_of_nothing_and_of_what_is_not_there(monkeypatch):
  with pytest.raises(ValueError, match='kind must be one of curvature, spectral_transfer'):
    report().plot('histogram')
  with pytest.raises(ValueError, match=r"no layer 'tail'; there are 'conv_0/kernel'"):
    report().plot('curvature', layers=['tail'])
  with pytest.raises(ValueError, match='no decomposition to plot'):
    report().plot('alignment')
  only = [layer for layer in report().layers if layer.path == 'saddle/kernel']
  bare = dataclasses.replace(report(), layers=tuple(only))
  for kind in plots.KINDS:
    if kind != 'alignment':
      bare.plot(kind).canvas.draw()
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(ImportError, match=r'spectral-optax\[plots\]'):
    report().plot('depth')
