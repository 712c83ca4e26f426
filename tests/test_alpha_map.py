"""The replication: that it runs, goes on where it was, and judges as its rules say."""

import importlib
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from spectral_optax import layout

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


@pytest.fixture
def alpha_map(monkeypatch):
  for folder in (BENCHMARKS.parent / 'examples', BENCHMARKS):
    monkeypatch.syspath_prepend(folder)
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  with jax.default_prng_impl('rbg'):
    yield importlib.import_module('alpha_map')


def test_quick_run_leaves_all_and_goes_on_where_it_was(alpha_map, tmp_path, capsys, monkeypatch):
  work, output = tmp_path / 'work', tmp_path / 'results' / 'map.json'
  command = f'--quick --runs mlp-digits --work {work} --output {output} --quiet'.split()
  first = alpha_map.main(command)
  printed = capsys.readouterr().out
  assert 'Spectral transfer' in printed
  assert {p.name for p in output.parent.iterdir()} == {
    'map.json', 'map.md', 'map_overview.png', 'map_course.png'}  # fmt: skip
  content = json.loads(output.read_text())
  assert content.keys() == first.keys()
  rows = content['rows']
  layers = ['layers/0/kernel', 'layers/1/kernel', 'head/kernel']
  assert [(r['step'], r['layer']) for r in rows] == [(s, x) for s in (0, 30) for x in layers]
  assert {r['type'] for r in rows} == {'dense', 'head'}
  assert rows[-1]['loss'] < 0.9 * rows[0]['loss']
  for row in rows:
    total = row['beta'] + row['rho_delta'] + row['rho_activation'] + row['chi']
    assert row['alpha'] == pytest.approx(total, abs=1e-4)
    assert row['identity_error'] < 1e-9
    assert 0.5 < row['r_squared']['gauss_newton'] <= 1
  head = rows[-1]
  assert head['directions'] == 9  # The gradient of ten classes has nine directions.
  order = np.polyfit(np.log(head['sigma'][:9]), np.log(head['h'][:9]), 1)
  assert head['alpha'] == pytest.approx(order[0], rel=1e-3)
  verdicts = {x['claim']: x['verdict'] for x in content['claims']}
  assert verdicts['Identities h^Kron = ΦΛ and α = β + φ + χ'] == 'reproduced'
  assert set(verdicts.values()) <= {'reproduced', 'not reproduced', 'not testable here', '–'}

  # What has been measured is not measured again, and what is gone is, from the same training.
  measured = []
  original = alpha_map.train_and_measure

  def watched(name, run, args, skip):
    for step, report in original(name, run, args, skip):
      measured.append(step)
      yield step, report

  monkeypatch.setattr(alpha_map, 'train_and_measure', watched)
  assert alpha_map.main(command)['loss'] == first['loss']
  assert measured == []
  (work / 'mlp-digits' / 'step_30.json').unlink()
  again = alpha_map.main(command)
  assert measured == [30]
  assert again['loss']['mlp-digits'][30] == pytest.approx(first['loss']['mlp-digits'][30], rel=1e-3)
  # What was measured otherwise is not what was asked for.
  alpha_map.main([*command, '--seed', '1'])
  assert measured == [30, 0, 30]
  capsys.readouterr()


def test_what_is_measured(alpha_map):
  runs = alpha_map.main_runs()
  assert {r.network for r in runs.values()} == {'resnet', 'vgg', 'mlp', 'vit', 'gpt'}
  assert {r.data for r in runs.values()} == {'fashion-mnist', 'digits', 'bytes'}
  total = 0
  others = [*alpha_map.ablation_runs().values(), *alpha_map.quick_runs().values()]
  for number, run in enumerate([*runs.values(), *others]):
    size = {'fashion-mnist': 28, 'digits': 8, 'bytes': 0}[run.data]
    make = lambda run=run, size=size: alpha_map.make_network(run, size, 1, 10, 0)
    params = nnx.state(nnx.eval_shape(make), nnx.Param)
    types = layout.layer_types_by_path(params)
    views = layout.matrix_views(params)
    total += len(views) if number < len(runs) else 0
    assert all(types[path] in alpha_map._alpha_claims.plots.COLOURS for path in views), run
    assert run.samples % run.measured_at_once == 0
  assert total >= 93


def test_bytes_and_their_classes(alpha_map):
  data = alpha_map.stdlib_bytes.load(16, 256, limit=50_000)
  x, y = data.sample(20, np.random.default_rng(0))
  assert x.shape == y.shape == (20, 16)
  np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
  text = data.text.tobytes()
  assert bytes(x[0].astype(np.uint8)) in text
  _, few = alpha_map.stdlib_bytes.Bytes(data.text, 16, 8).sample(20, np.random.default_rng(0))
  np.testing.assert_array_equal(few, y >> 5)
  _, pairs = alpha_map.stdlib_bytes.Bytes(data.text, 16, 1024).sample(20, np.random.default_rng(0))
  assert pairs.max() <= 1023
  # The same pair is the same class, and the most common one is the first.
  after = np.concatenate([y[:, 1:], np.full((20, 1), -1)], axis=1)
  seen = {}
  for a, b, c in zip(y[:, :-1].flat, after[:, :-1].flat, pairs[:, :-1].flat, strict=True):
    assert seen.setdefault((a, b), c) == c
  assert seen[32, 32] == 0


def a_row(**changes):
  row = {
    'run': 'resnet-digits', 'network': 'resnet', 'data': 'digits', 'ablation': '', 'step': 340,
    'point': 'end', 'loss': 0.1, 'layer': 'blocks/0/conv1/kernel', 'type': 'conv', 'depth': 0,
    'shape': [144, 16], 'alpha': 2.0, 'alpha_error': 0.1, 'alpha_r_squared': 0.95, 'gamma': 1.0,
    'gamma_r_squared': 0.95, 's': 2.0, 's_r_squared': 0.95, 'transfer_error': 0.01,
    'participation_h': 1.5, 'participation_gradient': 20.0, 'bound': 2.5, 'profile': 'lognormal',
    'directions': 16, 'negative': 0, 'alpha_kronecker': 1.9, 'beta': 2.0, 'phi': -0.1,
    'rho_delta': -0.05, 'rho_activation': -0.05, 'chi': 0.1, 'sum_error': 1e-15,
    'identity_error': 1e-15, 'concentration': 1.2,
    'r_squared': {'sigma_squared': 0.9, 'kronecker': 0.9, 'gauss_newton': 0.9},
    'r_squared_linear': {'sigma_squared': 0.9, 'kronecker': 0.9, 'gauss_newton': 0.9},
  }  # fmt: skip
  return {**row, **changes}


AGREES = {
  'Spectral transfer s = αγ: median |s - αγ| / s': {'transfer_error': 0.03},
  'Curvature concentrates: participation ratio of h': {'participation_h': 2.4},
  'Bound: PR_h ≤ ζ(αγ)² / ζ(2αγ)': {'participation_h': 2.6},
  'Rank profile of σ: log-normal wins by BIC': {'profile': 'power_law'},
  'α of convolutions': {'alpha': 1.6},
  'Identities h^Kron = ΦΛ and α = β + φ + χ': {'sum_error': 1e-6},
  'α = 2 + φ, the case β = 2': {'beta': 1.5},
}


@pytest.mark.parametrize('claim', AGREES)
def test_verdicts_follow_the_figures(alpha_map, claim):
  def verdict(**changes):
    lines = alpha_map._alpha_claims.claims([a_row(**changes) for _ in range(3)])
    (line,) = (x for x in lines if x['claim'] == claim)
    return line['verdict']

  assert verdict() == 'reproduced'
  assert verdict(**AGREES[claim]) == 'not reproduced'
  # Nothing measured, nothing judged.
  others = alpha_map._alpha_claims.claims([a_row(ablation='baseline')])
  assert claim not in {x['claim'] for x in others}


def test_ablations_are_compared_with_their_baseline(alpha_map):
  claims = alpha_map._alpha_claims
  gpt = {'network': 'gpt', 'layer': 'body/blocks/0/up/kernel', 'type': 'mlp_up'}
  rows = [
    a_row(**gpt, ablation='baseline', rho_activation=-0.1, alpha=1.5),
    a_row(**gpt, ablation='no LayerNorm', rho_activation=-0.4, alpha=2.0),
    a_row(**gpt, ablation='8 outputs', alpha=2.2),
    a_row(**gpt, ablation='32 outputs', alpha=2.0),
    a_row(**gpt, ablation='1024 outputs', alpha=1.7),
  ]
  lines = {x['claim']: x for x in claims.ablation_claims(rows)}
  norm = lines['LayerNorm flattens ρ^A']
  assert norm['verdict'] == 'reproduced'
  assert '-0.10 with, -0.40 without; α 1.50 and 2.00' in norm['ours']
  outputs = lines['α falls towards 1 and below with a large number of outputs']
  assert outputs['verdict'] == 'reproduced'
  rows[0]['rho_activation'], rows[-1]['alpha'] = -0.5, 2.2
  lines = {x['claim']: x['verdict'] for x in claims.ablation_claims(rows)}
  assert set(lines.values()) == {'not reproduced'}


def test_tables_and_plots_of_what_could_not_be_fitted(alpha_map):
  claims = alpha_map._alpha_claims
  numbers = [k for k, v in a_row().items() if isinstance(v, float) and k not in ('loss',)]
  empty = {**dict.fromkeys(numbers, math.nan), 'profile': '', 'r_squared': {}, 'negative': 16}
  rows = [a_row(**empty, point='start', step=0), a_row(**empty)]
  text = claims.markdown(rows, claims.claims(rows))
  assert 'nan' not in text
  assert '| 16 of 16 |' in text
  assert set(claims.figures(rows)) == {'overview', 'course'}


def test_command_line(alpha_map, capsys, monkeypatch, tmp_path):
  assert alpha_map.main(['--list']) == {}
  assert capsys.readouterr().out.split() == [*alpha_map.main_runs(), *alpha_map.ablation_runs()]
  # A part of it does not overwrite the results of all.
  assert alpha_map.parse(['--quick']).output != alpha_map.RESULTS
  assert alpha_map.parse(['--runs', 'mlp-digits']).output != alpha_map.RESULTS
  for arguments, message in (
    (['--runs', 'none'], "'none' is none of the runs"),
    (['--data-dir', str(tmp_path)], 'Fashion-MNIST'),
  ):
    with pytest.raises(SystemExit):
      alpha_map.main(arguments)
    assert message in capsys.readouterr().err
