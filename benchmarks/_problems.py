"""What convergence.py trains: networks, data and a step, as pure functions of arrays.

A training is `start` from a seed, `advance` by some steps on given samples, `evaluate`. All of
them can be jitted, and mapped over seeds and over whatever an optimizer is made from. Parameters
are a flat dict by path, so that every package's optimizer can take them.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import _networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import stdlib_bytes
import train_vision
import vision_data
from flax import nnx

from spectral_optax import layout

CONTEXT = 64
HELD_OUT = 5_000  # Images, of the training images, for validation.
KEPT = 10_000  # Images to train on.
ON_THE_CURVE = 1_000  # Samples of an evaluation program, and of a point of a curve.
WINDOWS = 250  # Likewise, of text.


@dataclasses.dataclass(frozen=True)
class Task:
  """A network, its data, and how long it is trained.

  Attributes:
    name: Of the task.
    stage: "development", what defaults are chosen on, or "confirmation".
    network: "resnet", "vgg", "vit", "mlp" or "gpt".
    data: "fashion", "digits" or "bytes".
    options: Of the network.
    batch_size: Samples of a step.
    steps: Of a training.
    every: Steps between two evaluations; a divisor of `steps`.
    weight: Of how many small networks' memory one of these takes.
  """

  name: str
  stage: str
  network: str
  data: str
  options: Mapping[str, Any]
  batch_size: int
  steps: int
  every: int
  weight: int = 1

  def fingerprint(self) -> dict[str, Any]:
    """What a result belongs to."""
    return {k: v for k, v in dataclasses.asdict(self).items() if k not in ('stage', 'weight')}


POOL = _networks.POOL
_TRANSFORMER = {'width': 64, 'heads': 4}
TASKS = {
  task.name: task
  for task in (
    # Twenty layers, at half of the resolution.
    Task(
      'resnet-fashion',
      'development',
      'resnet',
      'fashion',
      {'width': 16, 'depth': 3, 'stride': 2},
      batch_size=64,
      steps=480,
      every=30,
      weight=4,
    ),
    Task(
      'gpt-bytes',
      'development',
      'gpt',
      'bytes',
      {**_TRANSFORMER, 'depth': 2},
      batch_size=16,
      steps=400,
      every=25,
    ),
    Task(
      'vgg-fashion',
      'confirmation',
      'vgg',
      'fashion',
      {'plan': (16, POOL, 32, POOL, 64, 64, POOL, 64, 64), 'hidden': 64},
      batch_size=64,
      steps=480,
      every=30,
      weight=3,
    ),
    Task(
      'vit-fashion',
      'confirmation',
      'vit',
      'fashion',
      {**_TRANSFORMER, 'patch': 4, 'depth': 3},
      batch_size=64,
      steps=480,
      every=30,
      weight=4,
    ),
    Task(
      'mlp-digits',
      'confirmation',
      'mlp',
      'digits',
      {'width': 128, 'depth': 4},
      batch_size=64,
      steps=400,
      every=25,
    ),
  )
}

# ---------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def load(
  name: str,
  folder: str | None = None,
  packed: pathlib.Path | None = None,
  images: int | None = None,
) -> Arrays:
  """Training, validation and test data as they are kept: pixels and text as bytes.

  Args:
    name: "fashion", "digits" or "bytes".
    folder: Of Fashion-MNIST, see `vision_data.load`.
    packed: A file that `pack` has written, in place of what this machine has.
    images: How many to train on, in place of `KEPT`: the first of them, and more.

  Raises:
    ValueError: there are not so many, or not the data.
  """
  if packed is not None and name != 'digits':
    with np.load(packed) as file:
      found = {k.removeprefix(f'{name}_'): file[k] for k in file.files if k.startswith(name)}
    if not found:
      raise ValueError(f'{packed} has no data for {name!r}: write it anew with --pack-data.')
    if name == 'bytes':
      return found
    cut = lambda k, v: _first(v, images, str(packed)) if k.startswith('train') else v
    return {k: cut(k, v) for k, v in found.items()}
  if name == 'bytes':
    text = stdlib_bytes.load(CONTEXT).text
    # Blocks of about 31 kB: what is held out is in the middle of everything else.
    blocks = np.array_split(text, 64)
    join = lambda of: np.concatenate([b for i, b in enumerate(blocks) if i % 16 in of])
    return {
      'train': join(set(range(16)) - {7, 15}),
      'validation': join({7}),
      'test': join({15}),
    }
  if name == 'digits':
    x, y, test_x, test_y = vision_data._digits()
  else:
    source = vision_data.DEBIAN_FASHION_MNIST if folder is None else pathlib.Path(folder)
    x, y, test_x, test_y = vision_data._fashion_mnist(source)
  order = np.random.default_rng(0).permutation(len(x))
  held = min(HELD_OUT, len(x) // 5)
  train, validation = _first(order[held:], images, name), order[:held]
  return {
    'train_x': x[train].astype(np.uint8),
    'train_y': y[train].astype(np.uint8),
    'validation_x': x[validation].astype(np.uint8),
    'validation_y': y[validation].astype(np.uint8),
    'test_x': test_x.astype(np.uint8),
    'test_y': test_y.astype(np.uint8),
  }


def _first(array: np.ndarray, images: int | None, source: str) -> np.ndarray:
  """As many as are asked for; at most `KEPT` where nothing is."""
  if images is not None and not 0 < images <= len(array):
    raise ValueError(f'{source} has {len(array)} images to train on, not {images}.')
  return array[: images or KEPT]


def pack(path: pathlib.Path, folder: str | None = None) -> int:
  """Writes what `load` gives of images and text into one file; its size in bytes."""
  arrays = {}
  for name in ('fashion', 'bytes'):
    arrays |= {f'{name}_{key}': value for key, value in load(name, folder).items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **arrays)
  return path.stat().st_size


# ---------------------------------------------------------------------------------
# Convolutions, many networks at once
# ---------------------------------------------------------------------------------


def convolution_by_product(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Any,
  padding: Any,
  lhs_dilation: Any = None,
  rhs_dilation: Any = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
  **others: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` of images as shifted slices and one matrix product.

  Under `vmap` over kernels, the product is a batch of products; a convolution would be one in
  groups, which GPUs are slow at.
  """
  del dimension_numbers
  one = lambda dilation: dilation is None or set(dilation) == {1}
  if not one(lhs_dilation) or not one(rhs_dilation) or feature_group_count != 1 or lhs.ndim != 4:
    raise ValueError('Only plain convolutions of images: no dilation, no groups.')
  if others.get('out_sharding') is not None or rhs.ndim != 4:
    raise ValueError('Only plain convolutions of images, on one device.')
  height, width, inputs, outputs = rhs.shape
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(lhs.shape[1:3], (height, width), window_strides, padding)
  x = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
  sizes = [
    (n - k) // s + 1 for n, k, s in zip(x.shape[1:3], rhs.shape, window_strides, strict=False)
  ]
  shifted = [
    x[
      :,
      i : i + (sizes[0] - 1) * window_strides[0] + 1 : window_strides[0],
      j : j + (sizes[1] - 1) * window_strides[1] + 1 : window_strides[1],
    ]
    for i in range(height)
    for j in range(width)
  ]
  patches = jnp.concatenate(shifted, axis=-1).reshape(-1, height * width * inputs)
  product = jnp.matmul(patches, rhs.reshape(-1, outputs), precision=precision)
  return product.reshape(len(lhs), *sizes, outputs)


# ---------------------------------------------------------------------------------
# A task as functions
# ---------------------------------------------------------------------------------

Params = dict[str, jax.Array]
Build = Callable[[Any], optax.GradientTransformation]  # From what is traced of an optimizer.


class Problem:
  """A task's network and data, as pure functions.

  Attributes:
    task: The task.
    shapes: Of the parameters, by path.
    matrices: The paths of those that are matrices.
    types: Their layer types, by path.
    arrays: What evaluations and steps take their samples from, on the device once asked for.
  """

  def __init__(self, task: Task, arrays: Arrays, *, together: bool, half: bool = False):
    """`together`: for many networks at once, or steps in a loop. `half`: in bfloat16."""
    self.task, self._half = task, half
    self._raw = arrays

    def make(key):
      model = self._network(nnx.Rngs(key))
      if together:
        for _, module in nnx.iter_modules(model):
          if isinstance(module, nnx.Conv):
            module.conv_general_dilated = convolution_by_product
      return nnx.split(model, nnx.Param, ...)

    self._make = make
    self._graph, params, _ = nnx.eval_shape(make, jax.random.key(0))
    self._params = jax.tree.structure(params)
    self.shapes = layout.leaves_by_path(params)
    self.matrices = list(layout.matrix_views(self.shapes))
    types = layout.layer_types_by_path(self.shapes)
    self.types = {path: types[path] for path in self.matrices}

  def fingerprint(self) -> dict[str, Any]:
    """What its trainings are known by; data too: the bytes are another text with every Python."""
    half = {'half': True} if self._half else {}
    return {**self.task.fingerprint(), 'data_sha1': self.data_sha1, **half}

  @functools.cached_property
  def data_sha1(self) -> str:
    """Of all arrays, the first twelve digits."""
    digest = hashlib.sha1()
    for name, array in sorted(self._raw.items()):
      digest.update(f'{name} {array.shape} {array.dtype}'.encode())
      digest.update(array.tobytes())
    return digest.hexdigest()[:12]

  def _network(self, rngs: nnx.Rngs) -> nnx.Module:
    task, options = self.task, self.task.options
    if task.network == 'gpt':
      return _networks.GPT(CONTEXT, 256, **options, rngs=rngs)
    size, channels = self._raw['train_x'].shape[2:]
    classes = int(self._raw['train_y'].max()) + 1
    if task.network == 'resnet':
      return train_vision.ResNet(channels, classes, **options, rngs=rngs)
    if task.network == 'mlp':
      return _networks.MLP(size * size * channels, classes, **options, rngs=rngs)
    kind = {'vgg': _networks.VGG, 'vit': _networks.ViT}[task.network]
    return kind(size, channels, classes, **options, rngs=rngs)

  # Data.

  @functools.cached_property
  def arrays(self) -> dict[str, jax.Array]:
    raw = self._raw
    if self.task.data == 'bytes':
      return {'train': jnp.asarray(raw['train'])}
    x = raw['train_x'].astype(np.float64)
    mean, std = x.mean(), x.std()
    self._standardise = lambda x: ((x - mean) / std).astype(np.float32)
    return {
      'x': jnp.asarray(self._standardise(raw['train_x'])),
      'y': jnp.asarray(raw['train_y'], jnp.int32),
    }

  @functools.cache  # noqa: B019 - there are five of these.
  def evaluation(self, part: str) -> list[tuple[jax.Array, jax.Array]]:
    """Of "validation" or "test", pieces of one size for one program; the first is the curve's."""
    if self.task.data == 'bytes':
      text = self._raw[part]
      starts = np.arange(0, len(text) - CONTEXT - 1, CONTEXT)[: 6 * WINDOWS]
      # From all over the text, not from its first module on.
      starts = np.random.default_rng(0).permutation(starts)
      windows = text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)
      x, y, size = windows[:, :-1], windows[:, 1:], WINDOWS
    else:
      _ = self.arrays
      x = self._standardise(self._raw[f'{part}_x'])
      y, size = self._raw[f'{part}_y'].astype(np.int32), ON_THE_CURVE
      size = min(size, *(len(self._raw[f'{of}_x']) for of in ('validation', 'test')))
    count = len(x) // size
    return [
      (jnp.asarray(x[i * size : (i + 1) * size]), jnp.asarray(y[i * size : (i + 1) * size]))
      for i in range(count)
    ]

  @functools.cache  # noqa: B019
  def samples(self, seed: int) -> np.ndarray:
    """What each step is trained on, (steps, batch size), int32: images, or places in the text."""
    task, rng = self.task, np.random.default_rng(seed)
    if task.data == 'bytes':
      last = len(self._raw['train']) - CONTEXT - 1
      return rng.integers(last, size=(task.steps, task.batch_size)).astype(np.int32)
    count = len(self._raw['train_x'])
    per_epoch = count // task.batch_size
    epochs = [
      rng.permutation(count)[: per_epoch * task.batch_size].reshape(per_epoch, -1)
      for _ in range(-(-task.steps // per_epoch))
    ]
    return np.concatenate(epochs)[: task.steps].astype(np.int32)

  def batch(self, arrays: Mapping[str, jax.Array], which: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs and classes of some samples."""
    if self.task.data == 'bytes':
      windows = arrays['train'][which[:, None] + jnp.arange(CONTEXT + 1)[None]].astype(jnp.int32)
      return windows[:, :-1], windows[:, 1:]
    return arrays['x'][which], arrays['y'][which]

  # The network.

  def init(self, seed: jax.Array) -> tuple[Params, Any]:
    """Fresh parameters, and the rest of the network's state."""
    _, params, rest = self._make(jax.random.key(seed))
    return layout.leaves_by_path(params), rest

  def apply(self, params: Params, rest: Any, x: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
    """Logits, and the rest of the state after."""
    if self._half:
      to_half = lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a
      params, x = jax.tree.map(to_half, params), to_half(x)
    tree = jax.tree.unflatten(self._params, [params[path] for path in self.shapes])
    model = nnx.merge(self._graph, tree, rest, copy=True)
    logits = model(x, train=train)  # type: ignore
    after = nnx.split(model, nnx.Param, ...)[2]
    return logits.astype(jnp.float32), jax.tree.map(lambda a, b: a.astype(b.dtype), after, rest)

  def loss(
    self, params: Params, rest: Any, x: jax.Array, y: jax.Array, *, train: bool = True
  ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Mean cross entropy; the mean number of right answers and the rest of the state."""
    logits, rest = self.apply(params, rest, x, train=train)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), (jnp.mean(logits.argmax(-1) == y), rest)

  # Trainings.

  def start(self, build: Build, lane: Any) -> tuple[Any, ...]:
    """Parameters, rest and optimizer state before the first step."""
    params, rest = self.init(lane['seed'])
    return params, rest, build(lane).init(params)

  def advance(
    self,
    build: Build,
    carry: tuple[Any, ...],
    lane: Any,
    which: jax.Array,
    arrays: Mapping[str, jax.Array],
  ) -> tuple[tuple[Any, ...], jax.Array]:
    """As many steps as `which` (steps, batch size) has samples for; the mean of their losses."""
    optimizer = build(lane)
    step = lambda carry, which: self.step(optimizer, carry, which, arrays)
    carry, losses = jax.lax.scan(step, carry, which)
    return carry, losses.mean()

  def step(
    self,
    optimizer: optax.GradientTransformation,
    carry: tuple[Any, ...],
    which: jax.Array,
    arrays: Mapping[str, jax.Array],
  ) -> tuple[tuple[Any, ...], jax.Array]:
    """One, on the samples `which`; its loss."""
    params, rest, state = carry
    x, y = self.batch(arrays, which)
    value_fn = lambda params: self.loss(params, rest, x, y)[0]
    grad = jax.value_and_grad(self.loss, has_aux=True)
    (loss, (_, new_rest)), grads = grad(params, rest, x, y)
    # What measures curvature as it trains asks for the loss as a function.
    optimizer = optax.with_extra_args_support(optimizer)
    updates, state = optimizer.update(grads, state, params, value_fn=value_fn)
    return (optax.apply_updates(params, updates), new_rest, state), loss

  def evaluate(
    self, params: Params, rest: Any, x: jax.Array, y: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean loss and share of right answers, in pieces, to save memory."""
    pieces = max(d for d in range(1, 11) if len(x) % d == 0)
    split = lambda a: a.reshape(pieces, -1, *a.shape[1:])

    def piece(some):
      loss, (right, _) = self.loss(params, rest, *some, train=False)
      return loss, right

    losses, right = jax.lax.map(piece, (split(x), split(y)))
    return losses.mean(), right.mean()
