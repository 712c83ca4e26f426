"""Images to train on, as arrays: nothing is downloaded, nothing unknown is unpickled.

    load('auto')                          what there is, see below
    load('fashion-mnist')                 from the Debian package dataset-fashion-mnist
    load('fashion-mnist', 'folder')       from a folder of IDX files, gzipped or not
    load('cifar-10', 'folder')            from the standard python archive, packed or not
    load('digits')                        8x8 digits that come with scikit-learn

"auto" takes what is in the folder if one is given; else Fashion-MNIST if Debian's
package is installed, and the digits if it is not.
"""

import dataclasses
import gzip
import io
import pathlib
import pickle
import tarfile
import zlib
from typing import Any

import numpy as np

NAMES = ('fashion-mnist', 'cifar-10', 'digits')

DEBIAN_FASHION_MNIST = pathlib.Path('/usr/share/datasets/fashion-mnist')
CIFAR_ARCHIVE = 'cifar-10-python.tar.gz'
CIFAR_FOLDER = 'cifar-10-batches-py'
CIFAR_TRAIN = tuple(f'data_batch_{i}' for i in range(1, 6))
CIFAR_TEST = ('test_batch',)

HOW_TO_GET = {
  'fashion-mnist': (
    'Install the Debian or Ubuntu package dataset-fashion-mnist, or put the four files'
    ' train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and'
    ' t10k-labels-idx1-ubyte.gz of https://github.com/zalandoresearch/fashion-mnist in a'
    ' folder (unpacked ones do as well) and name it with --data-dir.'
  ),
  'cifar-10': (
    f'Get {CIFAR_ARCHIVE}, "CIFAR-10 python version", from'
    ' https://www.cs.toronto.edu/~kriz/cifar.html and name its folder with --data-dir.'
  ),
}


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Images (N, height, width, channels), float32 and standardised; labels (N,), int32."""

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int


def load(name: str = 'auto', folder: str | pathlib.Path | None = None) -> Dataset:
  """Loads a data set and standardises it with the training images' mean and deviation.

  Args:
    name: One of `NAMES`, or "auto".
    folder: Where the files are. Digits need none, Fashion-MNIST none on Debian.

  Raises:
    FileNotFoundError: The data set is not there; says how to get it.
    ValueError: An unknown name, or a file that is broken or not what it should be.
  """
  folder = None if folder is None else pathlib.Path(folder).expanduser()
  if folder is not None and not folder.is_dir():
    raise FileNotFoundError(f'{folder} is not a folder.')
  if name == 'auto':
    name = _what_is_there(folder)
  if name == 'digits':
    arrays = _digits()
  elif name == 'fashion-mnist':
    arrays = _fashion_mnist(folder or DEBIAN_FASHION_MNIST)
  elif name == 'cifar-10':
    arrays = _cifar(folder or pathlib.Path())
  else:
    raise ValueError(f'The data sets are {", ".join(NAMES)}, got {name!r}.')
  return _standardised(name, *arrays)


def hold_out(data: Dataset, count: int, seed: int = 0) -> tuple[Dataset, np.ndarray, np.ndarray]:
  """Takes `count` random training images away for validation.

  Returns:
    The data set with the other training images, in random order; the validation
    images; their labels.
  """
  order = np.random.default_rng(seed).permutation(len(data.train_images))
  held, kept = order[:count], order[count:]
  rest = dataclasses.replace(
    data, train_images=data.train_images[kept], train_labels=data.train_labels[kept]
  )
  return rest, data.train_images[held], data.train_labels[held]


def _what_is_there(folder: pathlib.Path | None) -> str:
  if folder is None:
    return 'fashion-mnist' if _idx_file(DEBIAN_FASHION_MNIST, 'train-images-idx3') else 'digits'
  if _idx_file(folder, 'train-images-idx3'):
    return 'fashion-mnist'
  if _cifar_files(folder):
    return 'cifar-10'
  raise FileNotFoundError(
    f'No data set in {folder}. ' + ' '.join(f'{n}: {how}' for n, how in HOW_TO_GET.items())
  )


def _standardised(
  name: str, train: np.ndarray, train_labels: Any, test: np.ndarray, test_labels: Any
) -> Dataset:
  labels = [np.asarray(x, np.int32) for x in (train_labels, test_labels)]
  for images, own in zip((train, test), labels, strict=True):
    if own.ndim != 1 or len(images) != len(own) or len(own) == 0:
      raise ValueError(f'{name}: {len(images)} images and labels of shape {own.shape}.')
  axes = (0, 1, 2)
  train, test = (x.astype(np.float32) for x in (train, test))
  mean = train.mean(axes, dtype=np.float64).astype(np.float32)
  std = train.std(axes, dtype=np.float64).astype(np.float32)
  std = np.where(std > 0, std, np.float32(1))
  num_classes = int(max(x.max() for x in labels)) + 1
  return Dataset(name, (train - mean) / std, labels[0], (test - mean) / std, labels[1], num_classes)


# ---------------------------------------------------------------------------------
# Digits: a fifth of them, chosen once and for all, is the test set
# ---------------------------------------------------------------------------------


def _digits() -> tuple[np.ndarray, ...]:
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1)
  order = np.random.default_rng(0).permutation(len(images))
  test, train = order[: len(order) // 5], order[len(order) // 5 :]
  return images[train], labels[train], images[test], labels[test]


# ---------------------------------------------------------------------------------
# Fashion-MNIST (or MNIST): IDX files
# ---------------------------------------------------------------------------------


def _idx_file(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
  for name in (f'{stem}-ubyte', f'{stem}-ubyte.gz'):
    if (folder / name).is_file():
      return folder / name
  return None


def _fashion_mnist(folder: pathlib.Path) -> tuple[np.ndarray, ...]:
  arrays = []
  for stem in ('train-images-idx3', 'train-labels-idx1', 't10k-images-idx3', 't10k-labels-idx1'):
    path = _idx_file(folder, stem)
    if path is None:
      raise FileNotFoundError(
        f'Fashion-MNIST: no {stem}-ubyte(.gz) in {folder}. {HOW_TO_GET["fashion-mnist"]}'
      )
    array = read_idx(path)
    expected = 3 if 'images' in stem else 1
    if array.ndim != expected:
      raise ValueError(f'{path} has {array.ndim} axes, not {expected}.')
    arrays.append(array[..., None] if expected == 3 else array)
  return tuple(arrays)


def read_idx(path: pathlib.Path) -> np.ndarray:
  """An IDX file of bytes: 0, 0, type 8, number of axes; the axes, big-endian; the data.

  Raises:
    ValueError: Not such a file, or not all of it.
  """
  try:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f'{path} is a broken gzip file: {error}') from error
  if len(raw) < 4 or raw[:3] != b'\0\0\x08':
    raise ValueError(f'{path} is not an IDX file of bytes: it begins with {raw[:4]!r}.')
  start = 4 + 4 * raw[3]
  if len(raw) < start:
    raise ValueError(f'{path} is cut short: {len(raw)} bytes.')
  shape = tuple(int(n) for n in np.frombuffer(raw, '>u4', raw[3], offset=4))
  expected = start + int(np.prod(shape, dtype=object))
  if len(raw) != expected:
    raise ValueError(
      f'{path} should have {expected} bytes for its shape {shape}, not {len(raw)}: cut'
      ' short or damaged.'
    )
  return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------------------------
# CIFAR-10: pickled dicts of one array and one list
# ---------------------------------------------------------------------------------


_reconstruct: Any = np.empty(0).__reduce__()[0]

_BUILDS_ARRAYS = {
  ('numpy.core.multiarray', '_reconstruct'): _reconstruct,
  ('numpy._core.multiarray', '_reconstruct'): _reconstruct,
  ('numpy', 'ndarray'): np.ndarray,
  ('numpy', 'dtype'): np.dtype,
}


class ArraysOnly(pickle.Unpickler):
  """Unpickles numpy arrays and plain containers; any other name is an error.

  A pickle may call whatever it can name. This one can name what builds an array.
  """

  def find_class(self, module: str, name: str) -> Any:
    try:
      return _BUILDS_ARRAYS[module, name]
    except KeyError:
      raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is no array') from None


def _cifar_files(folder: pathlib.Path) -> pathlib.Path | None:
  """The archive, or the folder with the batches, which may be `folder` itself."""
  for path in (folder, folder / CIFAR_FOLDER):
    if (path / CIFAR_TRAIN[0]).is_file():
      return path
  return folder / CIFAR_ARCHIVE if (folder / CIFAR_ARCHIVE).is_file() else None


def _cifar(folder: pathlib.Path) -> tuple[np.ndarray, ...]:
  source = _cifar_files(folder)
  if source is None:
    raise FileNotFoundError(
      f'CIFAR-10: no {CIFAR_ARCHIVE} and no {CIFAR_FOLDER} in {folder.absolute()}.'
      f' {HOW_TO_GET["cifar-10"]}'
    )
  raw = {}
  try:
    if source.is_dir():
      raw = {name: (source / name).read_bytes() for name in CIFAR_TRAIN + CIFAR_TEST}
    else:
      with tarfile.open(source) as archive:
        for name in CIFAR_TRAIN + CIFAR_TEST:
          member = archive.extractfile(f'{CIFAR_FOLDER}/{name}')
          if member is None:
            raise KeyError(f'{name} is not a file')
          raw[name] = member.read()
  except (KeyError, FileNotFoundError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise ValueError(f'{source} is incomplete or damaged: {error}') from error
  batches = {name: _cifar_batch(f'{source}, {name}', data) for name, data in raw.items()}
  train = [batches[name] for name in CIFAR_TRAIN]
  return (
    np.concatenate([images for images, _ in train]),
    np.concatenate([labels for _, labels in train]),
    *batches[CIFAR_TEST[0]],
  )


def _cifar_batch(where: str, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
  try:
    batch = ArraysOnly(io.BytesIO(raw), encoding='bytes').load()
    pixels, labels = batch[b'data'], np.asarray(batch[b'labels'], np.int32)
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  except Exception as error:  # A damaged pickle fails in as many ways as there are bytes.
    raise ValueError(f'{where} is not a batch of CIFAR-10: {error}') from error
  return images, labels
