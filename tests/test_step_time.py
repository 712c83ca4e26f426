"""The benchmark of one update: its figures agree with each other, and its command line works."""

import importlib
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def step_time(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  return importlib.import_module('step_time')


@pytest.fixture
def parameters(step_time):
  del step_time
  return importlib.import_module('_parameters')


def test_figures_of_every_contestant(step_time, tmp_path, capsys):
  output = tmp_path / 'new' / 'times.json'
  output.parent.mkdir()
  output.write_text('{"tpu/other": {"tiny": 1}}')
  wanted = ['adamw', 'aol', 'svd alpha=1.2', 'cholesky']
  flags = f'--sets tiny --rounds 2 --compile-rounds 0 --markdown --quiet --output {output}'
  returned = step_time.main([*flags.split(), '--contestants', *wanted])

  content = json.loads(output.read_text())
  assert content.pop('tpu/other') == {'tiny': 1}  # What was there stays.
  (key,) = content
  assert key == f'{jax.default_backend()}/{jax.devices()[0].device_kind}/jax-{jax.__version__}'
  assert content[key].keys() == returned.keys() == {'tiny'}
  report = content[key]['tiny']
  assert report['environment']['jax'] == jax.__version__
  assert report['settings']['rounds'] == 2
  assert report['matrices'] == {
    'Conv_0/kernel': [1, 27, 8],
    'Dense_0/kernel': [1, 16, 8],
    'Dense_1/kernel': [1, 8, 24],
  }
  assert report['parameter_bytes'] == 4 * (27 * 8 + 8 + 16 * 8 + 8 + 8 * 24 + 24)

  contestants = report['contestants']
  ran = {'floor', 'muon', 'muon_aol', 'adamw', 'svd alpha=1.2', 'cholesky alpha=2'}
  assert contestants.keys() == ran
  # A solver that cannot do an α says so.
  assert report['skipped'].keys() == {'cholesky alpha=1.2', 'cholesky alpha=0.85'}
  assert all('alpha = 2' in reason for reason in report['skipped'].values())

  muon, floor = contestants['muon'], contestants['floor']
  assert muon['ratio_to_muon'] == floor['ratio_to_floor'] == 1
  for name, figures in contestants.items():
    ms = np.array(figures['all_ms'])
    assert ms.shape == (2,)
    assert (ms > 0).all()
    assert figures['ms'] == pytest.approx(np.median(ms), rel=1e-4), name
    low, high = figures['ms_quartiles']
    assert low <= figures['ms'] <= high
    for reference in ('muon', 'floor'):
      ratios = ms / np.array(contestants[reference]['all_ms'])
      assert figures[f'ratio_to_{reference}'] == pytest.approx(np.median(ratios), rel=1e-4), name
    for stage in ('trace', 'compile'):
      (seconds,) = figures[f'all_{stage}_seconds']
      assert figures[f'{stage}_seconds'] == seconds > 0
    assert figures['flops'] > 0
    assert figures['temp_bytes'] >= 0
    ratio = figures['state_bytes'] / report['parameter_bytes']
    assert figures['state_to_parameter_bytes'] == pytest.approx(ratio, rel=1e-4)
    if figures['alpha'] is None:
      assert figures['error'] is None
    else:
      assert figures['errors'].keys() == report['matrices'].keys()
      assert figures['error'] == max(figures['errors'].values())
      assert figures['error'] < 1e-3, name
  assert contestants['adamw']['state_to_parameter_bytes'] == pytest.approx(2, abs=0.01)

  assert output.with_name('times_cpu.png').read_bytes().startswith(b'\x89PNG')
  printed = capsys.readouterr().out
  for words in ('x muon', 'x floor', 'flops (XLA)', '| svd alpha=1.2 |', 'Left out: cholesky'):
    assert words in printed


def test_an_error_is_seen(step_time, parameters):
  tiny = parameters.make_set('tiny', parameters.HIDDEN_SETS['tiny']())
  exact = parameters.references(tiny)
  honest = step_time.spectral_newton('svd', 2.0, None)
  assert max(step_time.errors(honest, tiny, exact).values()) < 1e-5
  # The reference is of the exponent that the contestant says it has.
  liar = step_time.dataclasses.replace(honest, alpha=1.9)
  assert min(step_time.errors(liar, tiny, exact).values()) > 1e-2


def test_a_slow_contestant_sits_rounds_out(step_time):
  measure = importlib.import_module('_measure')
  step = lambda grads, state, params: (grads, state + 1)
  slow, fast, muon = (
    measure.Racer(name, step, 0, every_round=name == 'muon') for name in ('slow', 'fast', 'muon')
  )
  took = {'slow': 1.0, 'fast': 0.001, 'muon': 1.0}

  class Clock:  # A clock that each step moves on by what it takes.
    now = 0.0

  for racer in (slow, fast, muon):

    def compiled(grads, state, params, name=racer.name):
      Clock.now += took[name]
      return step(grads, state, params)

    racer.compiled = compiled
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(measure.time, 'perf_counter', lambda: Clock.now)
    measure.race([slow, fast, muon], 0, 0, rounds=30, seconds=10, title='', quiet=True)
  assert sum(map(math.isfinite, slow.seconds)) == 10
  assert sum(map(math.isfinite, fast.seconds)) == sum(map(math.isfinite, muon.seconds)) == 30
  assert slow.state == 5 + 10  # Warm before the first round, and moving on.
  assert measure.ratio(slow, muon) == pytest.approx(1)
  assert measure.ratio(slow, fast) == pytest.approx(1000)


def test_sets_are_seen_as_meant(parameters):
  count, size = {}, {}
  for name, shapes in parameters.SETS.items():
    kernels = parameters.kernels_by_path(name, shapes())
    count[name] = sum(kernel.matrices[0] for kernel in kernels.values())
    size[name] = sum(math.prod(kernel.shape) for kernel in kernels.values())
  block = 4 * 384**2 + 2 * 384 * 1536
  assert count == {
    'resnet18': 21,
    'vit_s16': 12 * 6 + 2,
    'gpt2_slice': 16,
    'square_2048': 1,
    'hundred_64': 100,
    'scanned_12': 12 * 6,
  }
  assert size['scanned_12'] == 12 * block
  assert size['vit_s16'] == 12 * block + 768 * 384 + 384 * 1000
  assert size['gpt2_slice'] == 4 * 12 * 768**2
  # As meant is not as it comes: rows and columns the wrong way round are an error.
  wrong = {'Conv_0': {'kernel': parameters.Kernel((3, 3, 4, 8), 1)}}
  with pytest.raises(RuntimeError, match=r"'Conv_0/kernel' of wrong is seen as"):
    parameters.kernels_by_path('wrong', wrong)


def test_gradients_have_strong_directions(parameters):
  rng = np.random.default_rng(0)
  grads = parameters.gradient(parameters.Kernel((3, 96, 64, 2), 1, 1), rng)
  assert grads.shape == (3, 96, 64, 2)
  sigma = np.linalg.svd(np.asarray(grads).reshape(3, 96, 128), compute_uv=False)
  peak = sigma[:, 0] / np.sqrt(np.mean(sigma**2, axis=1))
  assert (peak > 5).all()
  assert (peak < 10).all()


def test_calibration_marks_disagreements(step_time, capsys, monkeypatch):
  ms = {'gram': 2.5, 'cholesky': 1.0}

  def run(parameters, racers, args, compilations):
    del parameters, args, compilations
    for racer in racers:
      racer.seconds = [1e-3 * ms[racer.name.split()[0]]] * 3

  flags = ['--calibrate', '--shapes', '2x8x16', '--quiet', '--contestants']
  flags += ['gram', 'cholesky']
  monkeypatch.setattr(step_time, 'run', run)
  monkeypatch.setattr(step_time, 'auto_choice', lambda *_: 'gram')
  found = step_time.main(flags)
  assert {case['alpha']: case['fastest'] for case in found} == {
    2.0: 'cholesky',
    1.2: 'gram',
    0.85: 'gram',
  }
  assert found[0]['ms'] == pytest.approx(ms)
  assert found[0]['shape'] == (2, 8, 16)
  printed = capsys.readouterr().out
  disagreements = len([case for case in found if case['alpha'] == 2])
  assert printed.count('<- 2.50 x') == printed.count('<-') == disagreements


def test_calibration_asks_the_library(step_time):
  for alpha in step_time.ALPHAS:
    for shape in ((1, 64, 64), (12, 384, 1536)):
      choice = step_time.auto_choice(alpha, 0.1, shape, None)
      assert choice in step_time.solvers.SOLVERS


def test_costs_are_in_products(step_time, capsys, monkeypatch):
  def race(racers, *_, **__):
    for racer in racers:
      assert np.isfinite(np.asarray(racer.compiled(*given, racer.state, ())[0])).all()
      racer.seconds = [{'product': 0.09, 'poles': 0.05, 'eigenvectors': 0.2}[racer.name]] * 3

  given = []

  def compile_all(racers, y, params, **_):
    given[:] = [y]
    for racer in racers:
      racer.compile(y, params)

  monkeypatch.setattr(step_time, 'COST_SIDES', (16, 80))
  monkeypatch.setattr(step_time._measure, 'compile_all', compile_all)
  monkeypatch.setattr(step_time._measure, 'race', race)
  found = step_time.main(['--calibrate', '--quick', '--quiet'])
  assert [case['side'] for case in found] == [16, 80]
  for case in found:  # Nine products in 90 ms; three poles, of which the first is half.
    assert case['pole'] == pytest.approx(2)
    assert case['eigenvectors'] == pytest.approx(20)
  assert capsys.readouterr().out.count('Cost(2, 20)') == 2
