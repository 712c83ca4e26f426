"""The example that users run first, from its command line, and its data sets."""

import dataclasses
import gzip
import importlib
import io
import json
import math
import os
import pickle
import struct
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / 'examples'
FASHION = {
  'train-images-idx3-ubyte': (6, 28, 28),
  'train-labels-idx1-ubyte': (6,),
  't10k-images-idx3-ubyte': (4, 28, 28),
  't10k-labels-idx1-ubyte': (4,),
}


@pytest.fixture
def vision_data(monkeypatch):
  monkeypatch.syspath_prepend(EXAMPLES)
  return importlib.import_module('vision_data')


@pytest.fixture
def train_vision(monkeypatch, vision_data):
  del vision_data
  monkeypatch.setenv('OPENBLAS_NUM_THREADS', os.environ.get('OPENBLAS_NUM_THREADS', '1'))
  # Random initialisation compiles several times faster with it.
  with jax.default_prng_impl('rbg'):
    yield importlib.import_module('train_vision')


# ---------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------

SMALL = ['--data', 'digits', '--width', '4', '--epochs', '6', '--train-images', '600', '--quiet']


def test_trains_and_leaves_a_table_a_picture_and_numbers(train_vision, tmp_path, capsys):
  output = tmp_path / 'new' / 'run.png'
  returned = train_vision.main(
    f'--optimizers spectral_newton adamw --seeds 3 4'
    f' --learning-rates adamw=0.02 spectral_newton=0.02'
    f' --timing-rounds 3 --output {output}'.split()
    + SMALL
  )
  printed = capsys.readouterr().out
  for words in ('Spectral', 'AdamW', 'accuracy', 'ms/update', '±', 'median of 3'):
    assert words in printed
  assert output.read_bytes().startswith(b'\x89PNG')
  report = json.loads(output.with_suffix('.json').read_text())
  assert report.keys() == returned.keys()
  assert report['task']['seeds'] == [3, 4]
  assert report['task']['steps'] == 6 * (600 // 64)
  assert set(report['optimizers']) == {'spectral_newton', 'adamw'}
  for name, result in report['optimizers'].items():
    assert result['test_accuracy']['mean'] > 0.5, name
    assert result['test_accuracy']['std'] >= 0
    assert math.isfinite(result['test_loss']['mean'])
    assert result['ms_per_step'] > result['ms_per_update'] > 0
    expected = report['task']['steps'] * result['ms_per_update'] / 1e3
    assert result['seconds_in_optimizer'] == pytest.approx(expected, abs=1e-3)
    assert [run['seed'] for run in result['runs']] == [3, 4]
    for run in result['runs']:
      losses = run['train_losses']
      assert len(losses) == len(run['train_accuracies']) == report['task']['steps']
      assert np.isfinite(losses).all()
      assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
  assert report['optimizers']['adamw']['learning_rate'] == 0.02
  # The same network and the same first batch, whatever the optimizer.
  first = [r['runs'][0]['train_losses'][0] for r in report['optimizers'].values()]
  assert first[0] == pytest.approx(first[1], rel=1e-5)
  spectra = report['spectra']
  assert {'stem/kernel', 'blocks/0/conv1/kernel', 'head/kernel'} <= set(spectra)
  for layer in spectra.values():
    sigma, alpha, d = np.array(layer['sigma']), layer['alpha'], layer['damping']
    assert np.mean(sigma**2) == pytest.approx(1, rel=1e-3)
    expected = sigma / (sigma**alpha + d)
    np.testing.assert_allclose(layer['transferred'], expected, rtol=1e-3, atol=1e-3)


def test_tuning_looks_at_validation_images_and_keeps_other_results(
  train_vision, vision_data, tmp_path, capsys, monkeypatch
):
  output = tmp_path / 'tuning.json'
  output.write_text('{"other": {"rows": []}}')
  load = vision_data.load

  def without_test(*args):
    data = load(*args)
    return vision_data.dataclasses.replace(data, test_images=None, test_labels=None)

  monkeypatch.setattr(vision_data, 'load', without_test)
  arguments = ['--tune', '--optimizers', 'adamw', '--grid', '0.0001', '0.02', '--seeds', '7', '8']
  train_vision.main([*SMALL, *arguments, '--output', str(output)])
  assert 'edge' in capsys.readouterr().out
  content = json.loads(output.read_text())
  assert set(content) == {'other', 'digits'}
  report = content['digits']
  assert report['task']['validation_images'] == 300
  (row,) = report['rows']
  assert row['best_learning_rate'] == 0.02
  assert row['best_is_at_the_edge']
  assert {key: len(losses) for key, losses in row['validation_loss'].items()} == {
    '0.0001': 2,
    '0.02': 2,
  }
  assert row['mean_validation_loss']['0.02'] == pytest.approx(
    np.mean(row['validation_loss']['0.02']), abs=2e-6
  )
  assert str(Path.home()) not in output.read_text()


def test_options_reach_the_optimizer(train_vision):
  """All outputs of one size, or, as it is without the option, not."""
  grads = {'kernel': np.float32(np.random.default_rng(0).standard_normal((40, 6)))}
  grads['kernel'][:, 0] *= 0.1
  found = []
  for words in ([], ['--rms-of', 'output']):
    args = train_vision.make_parser().parse_args(words)
    settings = train_vision.optimizer_settings('spectral_newton', 10, 0.2, args)
    tx = train_vision.make_optimizer(dataclasses.replace(settings, weight_decay=0.0), 1.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    found.append(np.asarray(updates['kernel']))
  matrix, output = found
  outputs = np.mean(np.square(matrix), axis=0)
  exact = 0.2 * np.sqrt(1.09 / (outputs + 0.09 * np.mean(outputs))) * matrix
  np.testing.assert_allclose(output, exact, rtol=1e-4, atol=1e-5)
  assert np.abs(output - matrix).max() > 0.02


def test_tuned_rates_are_those_of_the_committed_measurement(train_vision):
  path = EXAMPLES.parent / 'benchmarks' / 'results' / 'train_vision_tuning.json'
  measured = json.loads(path.read_text())
  for data, rates in train_vision.TUNED.items():
    report = measured[data]
    best = {
      row['optimizer']: row['best_learning_rate']
      for row in report['rows']
      if row.get('update_rms', 0.2) == 0.2
      and row.get('damping') is None
      # The same here, where no layer but convolutions has more outputs than inputs.
      and row.get('rms_of', 'matrix') in ('matrix', 'wide')
    }
    assert rates == best
    assert report['task']['seeds'] == list(train_vision.TASKS[data].tuning_seeds)
    assert set(report['task']['seeds']).isdisjoint(train_vision.TASKS[data].seeds)
    for row in report['rows']:
      assert not row['best_is_at_the_edge']
      assert list(row['validation_loss']) == [f'{rate:g}' for rate in report['grid']]
      assert {len(losses) for losses in row['validation_loss'].values()} == {
        len(report['task']['seeds'])
      }


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--learning-rates', 'sgd=0.1'], "'sgd' is none of"),
    (['--update-rms', '0.1', '0.2'], 'only with --tune'),
    (['--solver', 'cholesky'], 'add --alpha 2'),
    (['--data', 'cifar-10'], 'cifar-10-python.tar.gz'),
    (['--data-dir', 'nowhere'], 'nowhere is not a folder'),
    (['--alpha', 'newton'], 'invalid alpha_value'),
    (['--damping', 'nois'], 'invalid damping_value'),
  ],
)
def test_a_bad_command_line_says_what_is_wrong(
  train_vision, tmp_path, monkeypatch, capsys, arguments, message
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stopped:
    train_vision.main(arguments)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------


def write_idx(path, array):
  header = b'\0\0\x08' + bytes([array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape)
  raw = header + array.tobytes()
  path.write_bytes(gzip.compress(raw) if path.suffix == '.gz' else raw)


def write_fashion(folder, suffix=''):
  rng = np.random.default_rng(0)
  arrays = {}
  for name, shape in FASHION.items():
    arrays[name] = rng.integers(0, 256 if len(shape) > 1 else 10, shape, np.uint8)
    write_idx(folder / (name + suffix), arrays[name])
  return arrays


def test_digits(vision_data):
  data = vision_data.load('digits')
  assert data.name == 'digits'
  assert data.num_classes == 10
  assert data.train_images.shape == (1438, 8, 8, 1)
  assert data.test_images.shape == (359, 8, 8, 1)
  assert data.train_images.dtype == data.test_images.dtype == np.float32
  assert data.train_labels.dtype == data.test_labels.dtype == np.int32
  assert data.train_images.mean() == pytest.approx(0, abs=1e-5)
  assert data.train_images.std() == pytest.approx(1, abs=1e-5)
  assert set(data.train_labels) == set(data.test_labels) == set(range(10))


def test_hold_out_divides_the_training_images(vision_data):
  ids = np.arange(50)
  images = ids.astype(np.float32).reshape(-1, 1, 1, 1)
  data = vision_data.Dataset('ids', images, ids, images[:3] - 100, ids[:3], 50)
  rest, held_images, held_labels = vision_data.hold_out(data, 20)
  assert len(held_labels) == 20
  assert sorted([*rest.train_labels, *held_labels]) == list(ids)
  np.testing.assert_array_equal(rest.train_images.ravel(), rest.train_labels)
  np.testing.assert_array_equal(held_images.ravel(), held_labels)
  np.testing.assert_array_equal(rest.test_images, data.test_images)
  np.testing.assert_array_equal(vision_data.hold_out(data, 20)[2], held_labels)


@pytest.mark.parametrize('name', ['fashion-mnist', 'auto'])
@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_idx_folder(vision_data, tmp_path, suffix, name):
  arrays = write_fashion(tmp_path, suffix)
  data = vision_data.load(name, tmp_path)
  assert data.name == 'fashion-mnist'
  for images, name in ((data.train_images, 'train'), (data.test_images, 't10k')):
    raw = arrays[f'{name}-images-idx3-ubyte'].astype(np.float64)
    train = arrays['train-images-idx3-ubyte'].astype(np.float64)
    expected = (raw - train.mean()) / train.std()
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[..., 0], expected, atol=1e-5)
  np.testing.assert_array_equal(data.train_labels, arrays['train-labels-idx1-ubyte'])
  np.testing.assert_array_equal(data.test_labels, arrays['t10k-labels-idx1-ubyte'])


def test_auto_without_a_folder(vision_data, tmp_path, monkeypatch):
  monkeypatch.setattr(vision_data, 'DEBIAN_FASHION_MNIST', tmp_path)
  assert vision_data.load().name == 'digits'
  write_fashion(tmp_path, '.gz')
  assert vision_data.load().name == 'fashion-mnist'


def test_what_is_missing_says_how_to_get_it(vision_data, tmp_path, monkeypatch):
  monkeypatch.setattr(vision_data, 'DEBIAN_FASHION_MNIST', tmp_path / 'not-installed')
  with pytest.raises(FileNotFoundError, match=r'package dataset-fashion-mnist.*--data-dir'):
    vision_data.load('fashion-mnist')
  with pytest.raises(FileNotFoundError, match=r'cs\.toronto\.edu.*--data-dir'):
    vision_data.load('cifar-10', tmp_path)
  with pytest.raises(FileNotFoundError, match=r'No data set in .*dataset-fashion-mnist.*toronto'):
    vision_data.load('auto', tmp_path)
  with pytest.raises(FileNotFoundError, match='is not a folder'):
    vision_data.load('auto', tmp_path / 'nowhere')
  with pytest.raises(ValueError, match=r"fashion-mnist, cifar-10, digits, got 'imagenet'"):
    vision_data.load('imagenet')
  write_fashion(tmp_path)
  (tmp_path / 't10k-labels-idx1-ubyte').unlink()
  with pytest.raises(FileNotFoundError, match='no t10k-labels-idx1-ubyte'):
    vision_data.load('auto', tmp_path)


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_broken_idx_files(vision_data, tmp_path, suffix):
  write_fashion(tmp_path, suffix)
  path = tmp_path / f't10k-images-idx3-ubyte{suffix}'
  whole = path.read_bytes()
  for length in (0, 3, 9, len(whole) - 5):
    path.write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r't10k-images-idx3-ubyte.*(cut short|broken|not an IDX)'):
      vision_data.load('fashion-mnist', tmp_path)
  path.write_bytes(b'<html>not found</html>')
  with pytest.raises(ValueError, match=r't10k-images-idx3-ubyte.*(broken gzip|not an IDX)'):
    vision_data.load('fashion-mnist', tmp_path)
  write_idx(path, np.zeros((4, 28), np.uint8))
  with pytest.raises(ValueError, match='has 2 axes, not 3'):
    vision_data.load('fashion-mnist', tmp_path)
  write_idx(path, np.zeros((3, 28, 28), np.uint8))
  with pytest.raises(ValueError, match='3 images and labels of shape'):
    vision_data.load('fashion-mnist', tmp_path)


class Python2Pickler(pickle._Pickler):
  """Writes strings of bytes as Python 2 did, whose pickles the archive holds."""

  def save(self, obj, save_persistent_id=True):
    if type(obj) is bytes:
      self.write(pickle.BINSTRING + struct.pack('<i', len(obj)) + obj)
    else:
      super().save(obj, save_persistent_id)


def python2_pickle(content):
  stream = io.BytesIO()
  Python2Pickler(stream, protocol=2).dump(content)
  return stream.getvalue().replace(b'numpy._core.multiarray', b'numpy.core.multiarray')


def cifar_batches():
  rng = np.random.default_rng(0)
  batches = {}
  for i, name in enumerate([*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']):
    pixels = rng.integers(0, 256, (2, 3072), np.uint8)
    batches[name] = {b'batch_label': b'a', b'labels': [i, 9 - i], b'data': pixels}
  return batches


def write_cifar(folder, raw, packed):
  if packed:
    with tarfile.open(folder / 'cifar-10-python.tar.gz', 'w:gz') as archive:
      for name, content in raw.items():
        member = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
  else:
    (folder / 'cifar-10-batches-py').mkdir(exist_ok=True)
    for name, content in raw.items():
      (folder / 'cifar-10-batches-py' / name).write_bytes(content)


@pytest.mark.parametrize('dump', [python2_pickle, lambda x: pickle.dumps(x, 4)])
@pytest.mark.parametrize('where', ['archive', 'folder', 'batches'])
def test_cifar(vision_data, tmp_path, where, dump):
  batches = cifar_batches()
  write_cifar(tmp_path, {name: dump(b) for name, b in batches.items()}, where == 'archive')
  folder = tmp_path / 'cifar-10-batches-py' if where == 'batches' else tmp_path
  data = vision_data.load('auto', folder)
  assert data.name == 'cifar-10'
  assert data.train_images.shape == (10, 32, 32, 3)
  np.testing.assert_array_equal(data.train_labels, [0, 9, 1, 8, 2, 7, 3, 6, 4, 5])
  np.testing.assert_array_equal(data.test_labels, [5, 4])
  # The archive has colour, row, column; standardised colour by colour.
  train = np.concatenate([b[b'data'] for b in batches.values()][:5]).reshape(10, 3, 32, 32)
  test = batches['test_batch'][b'data'].reshape(2, 3, 32, 32)
  expected = (test[1, 2, 3, 4] - train[:, 2].mean()) / train[:, 2].std()
  assert data.test_images[1, 3, 4, 2] == pytest.approx(expected, abs=1e-5)
  np.testing.assert_allclose(data.train_images.mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(data.train_images.std((0, 1, 2)), 1, atol=1e-5)


class Malicious:
  def __init__(self, function, *arguments):
    self.reduced = function, arguments

  def __reduce__(self):
    return self.reduced


@pytest.mark.parametrize('packed', [True, False])
def test_a_malicious_pickle_is_refused_before_it_runs(vision_data, tmp_path, packed):
  marker = tmp_path / 'marker'
  attacks = [
    Malicious(os.mkdir, str(marker)),
    Malicious(eval, f'__import__("os").mkdir({str(marker)!r})'),
    Malicious(np.fromfile, str(marker)),
  ]
  good = {name: pickle.dumps(b, 4) for name, b in cifar_batches().items()}
  for attack in attacks:
    bad = {b'data': np.zeros((1, 3072), np.uint8), b'labels': [attack]}
    write_cifar(tmp_path, {**good, 'data_batch_3': pickle.dumps(bad)}, packed)
    with pytest.raises(ValueError, match=r'data_batch_3 is not a batch of CIFAR-10: it asks for'):
      vision_data.load('cifar-10', tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize('packed', [True, False])
def test_broken_cifar(vision_data, tmp_path, packed):
  raw = {name: pickle.dumps(b, 4) for name, b in cifar_batches().items()}
  write_cifar(tmp_path, {k: v for k, v in raw.items() if k != 'test_batch'}, packed)
  with pytest.raises(ValueError, match='incomplete or damaged'):
    vision_data.load('cifar-10', tmp_path)
  for bad in (
    raw['test_batch'][:-40],
    b'',
    pickle.dumps([1, 2], 4),
    pickle.dumps({b'data': np.zeros((2, 7), np.uint8), b'labels': [1, 2]}, 4),
  ):
    write_cifar(tmp_path, {**raw, 'test_batch': bad}, packed)
    with pytest.raises(ValueError, match='test_batch is not a batch of CIFAR-10'):
      vision_data.load('cifar-10', tmp_path)
  short = {b'data': np.zeros((2, 3072), np.uint8), b'labels': [1]}
  write_cifar(tmp_path, {**raw, 'test_batch': pickle.dumps(short, 4)}, packed)
  with pytest.raises(ValueError, match='2 images and labels of shape'):
    vision_data.load('cifar-10', tmp_path)
  if packed:
    archive = tmp_path / 'cifar-10-python.tar.gz'
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ValueError, match='incomplete or damaged'):
      vision_data.load('cifar-10', tmp_path)
