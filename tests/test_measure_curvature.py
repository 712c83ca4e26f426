"""The example that measures curvature along a training, and the benchmark of what it costs."""

import importlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from spectral_optax import curvature, layout

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'examples')
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  # Random initialisation compiles several times faster with it.
  with jax.default_prng_impl('rbg'):
    yield importlib.import_module('measure_curvature')


@pytest.fixture
def benchmark(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  return importlib.import_module('curvature_cost')


def test_measures_along_a_training(example, tmp_path, capsys):
  output = tmp_path / 'new'
  flags = '--data digits --width 4 --train-images 300 --epochs 8 --points 0 30 --images 128'
  reports = example.main(
    [*flags.split(), '--top-k', '4', '--learning-rate', '0.02', '--quiet', '--output', str(output)]
  )
  assert list(reports) == [0, 30]
  first, last = reports.values()
  assert last.loss < 0.7 * first.loss  # It has learned something in between.
  names = [layer.name for layer in last.layers]
  assert names[0] == 'stem/kernel'
  assert names[-1] == 'head/kernel'
  assert len(names) == 10

  printed = capsys.readouterr().out
  for words in ('step 30', 'blocks/1/shortcut', 'α: mean', f'loss {last.loss:.3f}'):
    assert words in printed
  written = curvature.CurvatureReport.from_json(output / 'step_30.json')
  assert written.to_json() == last.to_json()
  assert set(written.alignment or {}) == set(names)
  assert '| stem | conv | 9 × 4 |' in (output / 'tables.md').read_text('utf-8')
  plots = {path.stem for path in output.glob('*.png')}
  assert plots == {*example.PLOTS, 'alignment', 'course'}
  summary = json.loads((output / 'summary.json').read_text())
  assert summary['alpha_tree'] == pytest.approx(last.alpha_tree(), rel=1e-5)
  assert len(summary['train_losses']) == 8 * (300 // 64)
  assert summary['course'].keys() == {'0', '30'}
  assert summary['task']['train_images'] == 300
  assert all(isinstance(x, int | float | str) for x in summary['task'].values())
  assert str(tmp_path) not in (output / 'summary.json').read_text()
  # The slopes of the decomposition add up to the exponent that was measured.
  for layer in last.layers:
    parts = written.alignment[layer.name]
    if parts.num_points == layer.alpha.num_points >= 3:
      total = parts.beta + parts.phi_slope + parts.chi_slope
      assert total == pytest.approx(layer.alpha.exponent, rel=1e-3)


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--data-dir', 'nowhere'], 'nowhere is not a folder'),
    (['--data', 'digits', '--points', '100000'], 'none of --points lies in'),
  ],
)
def test_a_bad_command_line_says_what_is_wrong(example, capsys, flags, message):
  with pytest.raises(SystemExit) as stopped:
    example.main(flags)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_cost(benchmark, tmp_path, capsys):
  output = tmp_path / 'cost.json'
  output.write_text('{"tpu/other/width-64": 1}')
  flags = (
    '--width 2 --stages 1 --blocks 1 --batch 4 --size 8 --top-k 3 --budget 4 --rounds 1 --quiet'
  )
  report = benchmark.main([*flags.split(), '--output', str(output)])
  content = json.loads(output.read_text())
  assert content.pop('tpu/other/width-64') == 1  # What was there stays.
  (key,) = content
  assert key == f'{jax.default_backend()}/{jax.devices()[0].device_kind}/width-2/batch-4/size-8'
  assert len(report['layers']) == 4
  assert report['layers']['stem/kernel']['shape'] == [27, 2]
  assert report['layers']['stem/kernel']['directions'] == 2
  for path, layer in report['layers'].items():
    # Both compute the same.
    assert abs(layer['difference']) < 1e-4, path
  assert 0 < report['planned_bytes'] <= report['budget_bytes'] == 4 * 2**20
  sums = {
    name: sum(layer[f'{name}_seconds'] for layer in report['layers'].values())
    for name in ('alone', 'batched')
  }
  assert report['gain'] == pytest.approx(sums['alone'] / sums['batched'])
  expected = report['measure_seconds'] / (sums['alone'] / report['gain'])
  assert report['measure_over_alone_by_gain'] == pytest.approx(expected)
  assert 'budget 4 MiB' in capsys.readouterr().out

  # Everything once, and two layers of four by themselves, which stand for all.
  once = benchmark.main([*flags.split(), '--once', '--layers', '2', '--output', str(output)])
  assert list(once['layers']) == [list(report['layers'])[i] for i in (0, 3)]
  assert 0 < once['measure_seconds'] <= once['first_measure_seconds']
  counts = {path: layer['directions'] for path, layer in report['layers'].items()}
  each = [layer['alone_seconds'] for layer in once['layers'].values()]
  scale = sum(counts.values()) / sum(counts[path] for path in once['layers'])
  assert once['alone_seconds'] == pytest.approx(sum(each) * scale)


def test_network_of_the_benchmark_is_a_resnet_18(benchmark):
  params = jax.eval_shape(lambda: benchmark.make_parameters(64, 4, 2))
  views = layout.matrix_views(params)
  # Seventeen convolutions of 3x3, three shortcuts and the head.
  assert len(views) == 21
  kinds = layout.layer_types_by_path(params)
  assert [kinds[path] for path in views].count('conv') == 20
  batch = jax.ShapeDtypeStruct((3, 32, 32, 3), 'float32'), jax.ShapeDtypeStruct((3,), 'int32')
  assert jax.eval_shape(benchmark.loss_fn, params, batch).shape == ()
  assert np.sum([np.prod(view.shape) for view in views.values()]) == 11_164_352


def test_docs_show_the_committed_report():
  path = ROOT / 'benchmarks' / 'results' / 'measure_curvature.json'
  report = curvature.CurvatureReport.from_json(path)
  assert report.table(format='markdown') in (ROOT / 'docs' / 'curvature.md').read_text('utf-8')
