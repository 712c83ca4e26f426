"""The language model and the ensembles, from their command lines, small."""

import importlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spectral_optax
from spectral_optax import layout

EXAMPLES = Path(__file__).parents[1] / 'examples'


@pytest.fixture
def load_example(monkeypatch):
  monkeypatch.syspath_prepend(EXAMPLES)
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  return importlib.import_module


@pytest.fixture
def language_model(load_example):
  # Random initialisation compiles several times faster with it; under `vmap` its numbers are
  # others than alone.
  with jax.default_prng_impl('rbg'):
    yield load_example('language_model')


def read(output):
  assert output.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
  return json.loads(output.with_suffix('.json').read_text())


# ---------------------------------------------------------------------------------
# The language model
# ---------------------------------------------------------------------------------

TINY = '--width 16 --depth 2 --heads 2 --context 16 --batch-size 8 --text-bytes 60000 --quiet'
STACKED = ['attention/key', 'attention/out', 'attention/query', 'attention/value', 'down', 'up']
MATRICES = {f'blocks/{name}/kernel' for name in STACKED} | {'head/kernel'}


def test_language_model_trains_with_all_three_and_leaves_what_it_says(
  language_model, tmp_path, capsys
):
  output = tmp_path / 'new' / 'lm.png'
  returned = language_model.main(
    f'{TINY} --steps 40 --optimizers spectral_newton adamw muon --seeds 3 4'
    f' --learning-rates spectral_newton=0.03 muon=0.04 --output {output}'.split()
  )
  printed = capsys.readouterr().out
  for words in ('Spectral', 'AdamW', 'Muon', 'nats/byte', 'bits/byte', '±', 'not tuned'):
    assert words in printed
  report = read(output)
  assert report.keys() == returned.keys()
  assert report['task']['seeds'] == [3, 4]
  assert report['task']['validation_bytes'] == pytest.approx(60000 / 16, abs=8)
  rates = {name: of['learning_rate'] for name, of in report['optimizers'].items()}
  assert rates == {'spectral_newton': 0.03, 'adamw': 0.01, 'muon': 0.04}
  firsts = []
  for result in report['optimizers'].values():
    assert [run['seed'] for run in result['runs']] == [3, 4]
    assert result['validation_loss']['std'] > 0
    assert result['ms_per_step'] > 0
    for run in result['runs']:
      losses = run['train_losses']
      assert len(losses) == 40
      assert np.mean(losses[-5:]) < 0.8 * losses[0]
      assert run['validation_loss'] < 0.85 * losses[0]
    firsts.append([run['train_losses'][0] for run in result['runs']])
  # The same network and the same first batch, whatever the optimizer.
  np.testing.assert_allclose(firsts, [firsts[0]] * 3, rtol=1e-5)
  assert set(report['spectra']) == MATRICES
  assert report['measured'] == {}
  for path, layers in report['spectra'].items():
    assert len(layers) == (2 if path.startswith('blocks') else 1)
    for layer in layers:
      sigma = np.array(layer['sigma'])
      assert np.mean(sigma**2) == pytest.approx(1, rel=1e-3)
      expected = sigma / (sigma ** layer['alpha'] + layer['damping'])
      np.testing.assert_allclose(layer['transferred'], expected, rtol=1e-3, atol=1e-3)


def test_language_model_measures_alpha_in_every_layer(language_model, tmp_path):
  output = tmp_path / 'measured'
  language_model.main(
    f'{TINY} --steps 40 --alpha measured --measure-every 10'
    f' --learning-rates spectral_newton=0.03 --output {output}'.split()
  )
  report = read(output)
  (run,) = report['optimizers']['spectral_newton']['runs']
  assert np.mean(run['train_losses'][-5:]) < 0.8 * run['train_losses'][0]
  assert set(report['measured']) == set(report['spectra']) == MATRICES
  taken, default = [], []
  for path, of in report['measured'].items():
    layers = report['spectra'][path]
    assert len(of['alpha']) == len(of['r_squared']) == len(layers)
    for alpha, fit, layer in zip(of['alpha'], of['r_squared'], layers, strict=True):
      # As measured, or, where the fit is poor, the default.
      good = alpha is not None and fit >= 0.7
      near = good and layer['alpha'] == pytest.approx(np.clip(alpha, 0.5, 3), rel=1e-3)
      (taken if near else default).append(layer['alpha'])
      # d follows, so that T turns where it did.
      assert layer['damping'] == pytest.approx(0.008 ** (layer['alpha'] / 1.5), rel=1e-3)
  assert len(taken) >= 3
  np.testing.assert_allclose(default, 1.5, rtol=1e-6)


def test_outputs_of_one_size_in_every_layer(language_model):
  """`rms_of` reaches the optimizer: of stacked kernels too."""
  grads = {'blocks': {'up': {'kernel': np.ones((2, 30, 5), np.float32)}}}
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((2, 30, 5)).astype(np.float32) * [0.3, 1, 1, 1, 1]
  grads['blocks']['up']['kernel'] = jnp.float32(kernel)
  found = {}
  for rms_of in ('matrix', 'output'):
    settings = language_model.OptimizerSettings('spectral_newton', 1.0, 10, 0.0, rms_of=rms_of)
    tx = language_model.make_optimizer(settings)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    found[rms_of] = np.asarray(updates['blocks']['up']['kernel'])
  mean = lambda axes: np.mean(np.square(found['matrix']), axis=axes, keepdims=True)
  exact = 0.2 * np.sqrt(1.09 / (mean(1) + 0.09 * mean((1, 2)))) * found['matrix']
  np.testing.assert_allclose(found['output'], exact, rtol=1e-3, atol=1e-4)
  assert np.abs(found['output'] - found['matrix']).max() > 0.02


def test_scanned_layers_are_layers_one_after_the_other(language_model):
  model = language_model.GPT(context=6, width=8, depth=3, heads=2, rngs=nnx.Rngs(0))
  x = jnp.asarray(np.random.default_rng(0).integers(256, size=(2, 6)))
  graph, params, rest = nnx.split(model.blocks, nnx.Param, ...)

  @jax.jit
  def one_by_one(params, x):
    y = model.embed(x) + model.pos_embedding[...][None]
    for i in range(3):
      y = nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], params), rest)(y)
    return model.head(model.norm(y))

  logits = nnx.jit(lambda model, x: model(x))(model, x)
  np.testing.assert_allclose(logits, one_by_one(params, x), rtol=1e-4, atol=1e-5)
  # Not one layer three times.
  kernel = params['up']['kernel'][...]
  assert not np.allclose(kernel[0], kernel[1])
  # A byte does not see those after it.
  other = nnx.jit(lambda model, x: model(x))(model, x.at[:, 4].add(1) % 256)
  np.testing.assert_allclose(other[:, :4], logits[:, :4], rtol=1e-4, atol=1e-5)
  assert not np.allclose(other[:, 4:], logits[:, 4:], atol=1e-3)
  # What decays: kernels, not the stacked biases, which have two axes too.
  decays = layout.leaves_by_path(language_model.is_matrix(nnx.state(model, nnx.Param)))
  assert {path for path, yes in decays.items() if yes} == MATRICES


def test_held_out_text_is_not_trained_on(load_example):
  stdlib_bytes = load_example('stdlib_bytes')
  text = np.arange(1024) // 16  # Every block has a number of its own.
  train, held = stdlib_bytes.hold_out(stdlib_bytes.Bytes(text.astype(np.uint8), 4, 256))
  assert set(held.text) == {8, 24, 40, 56}
  assert set(train.text) == set(range(64)) - {8, 24, 40, 56}
  assert len(train.text) + len(held.text) == 1024


# ---------------------------------------------------------------------------------
# Ensembles
# ---------------------------------------------------------------------------------


def test_ensemble_is_its_members_trained_alone(load_example, tmp_path, capsys):
  ensembles = load_example('ensembles')
  output = tmp_path / 'new' / 'ensembles'
  returned = ensembles.main(
    '--alphas 1 2 --dampings 0.03 0.3 --learning-rates 0.005 0.02 --seeds 5 7 --steps 30'
    f' --every 10 --width 8 --depth 1 --batch-size 32 --quiet --output {output}'.split()
  )
  printed = capsys.readouterr().out
  for words in ('16 networks', 'damping', 'σ*', '±'):
    assert words in printed
  report = read(output)
  assert report.keys() == returned.keys()
  assert report['axes'] == ['learning_rate', 'alpha', 'damping', 'seed']
  loss, train = np.array(report['test_loss']), np.array(report['train_losses'])
  assert loss.shape == np.shape(report['test_accuracy']) == (2, 2, 2, 2)
  assert train.shape == (3, 2, 2, 2, 2)
  assert (train[-1, 1] < 0.8 * train[0, 1]).all()
  assert np.max(report['transfer_error']) == 0  # "gram" is exact.
  # No number was lost: no two are the same training.
  assert len(np.unique(loss)) == 16

  for row in report['best']:
    i, j = (report['grid'][k].index(row[k]) for k in ('alpha', 'damping'))
    means = loss[:, i, j].mean(-1)
    best = int(np.argmin(means))
    assert row['learning_rate'] == report['grid']['learning_rate'][best]
    np.testing.assert_allclose(row['test_loss'], loss[best, i, j])
    assert row['turn'] == pytest.approx(row['damping'] ** (1 / row['alpha']), rel=1e-4)

  # One member, alone, its numbers no tracers.
  data = load_example('vision_data').load('digits')
  x, y = jnp.asarray(data.train_images.reshape(-1, 64)), jnp.asarray(data.train_labels)
  optimizer = spectral_optax.spectral_newton(
    optax.cosine_decay_schedule(0.02, 30), alpha=1, damping=0.3, solver='gram'
  )
  params = ensembles.init_params(jax.random.key(jnp.uint32(7)), [64, 8, 10])

  @jax.jit
  def step(carry, count):
    params, state = carry
    key = jax.random.fold_in(jax.random.key(jnp.uint32(7)), count)
    which = jax.random.randint(key, [32], 0, len(x))
    loss_of = lambda params: ensembles.loss_and_accuracy(params, x[which], y[which])[0]
    loss, grads = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  _, losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(30))
  np.testing.assert_allclose(train[:, 1, 0, 1, 1], np.reshape(losses, (3, 10)).mean(-1), rtol=2e-3)


def test_what_diverges_and_what_is_approximate_shows(load_example, tmp_path):
  ensembles = load_example('ensembles')
  nan = float('nan')
  # Learning rates x α x dampings x seeds.
  loss = np.array([[[[1.0, 2.0], [3.0, 3.0]]], [[[nan, 0.1], [2.0, 2.0]]]])
  error = np.broadcast_to([[[[0.0, 0.1], [0.2, 0.0]]]], loss.shape)
  grid = {'learning_rate': [0.1, 1.0], 'alpha': [2.0], 'damping': [0.01, 0.25], 'seed': [0, 1]}
  rows = ensembles.summarise(
    grid, {'test_loss': loss, 'test_accuracy': loss / 4, 'transfer_error': error}
  )
  assert [row['learning_rate'] for row in rows] == [0.1, 1.0]
  assert [row['turn'] for row in rows] == pytest.approx([0.1, 0.5])
  assert [row['transfer_error'] for row in rows] == [0.1, 0.2]
  report = {'grid': grid, 'networks': 8, 'seconds': 1.0, 'task': {'steps': 1}}
  headings = lambda rows: [c.header for c in ensembles.results_table(rows, report).columns]
  assert headings(rows)[-1] == 'T off by, %'
  assert headings([{**row, 'transfer_error': 0.0} for row in rows])[-1] == 'accuracy %'
  rows[0]['test_loss'] = [nan, nan]
  ensembles.plot(rows, report, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  ('example', 'arguments', 'message'),
  [
    ('language_model', '--width 30 --heads 4', 'no multiple of --heads'),
    ('language_model', '--text-bytes 1000', 'must be at least'),
    ('language_model', '--steps 0', '--steps must be at least 1'),
    ('ensembles', '--dampings -1', 'not negative'),
    ('ensembles', '--alphas nan', 'must be finite'),
    ('ensembles', '--seeds 1 1', 'a value twice'),
    ('ensembles', '--steps 25 --every 10', 'no multiple of --every'),
  ],
)
def test_a_bad_command_line_says_what_is_wrong(load_example, capsys, example, arguments, message):
  with pytest.raises(SystemExit) as stopped:
    load_example(example).main(arguments.split())
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err
