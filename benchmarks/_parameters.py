"""The sets of parameters that updates are timed on, and gradients for them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

import spectral_optax


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A parameter that must be seen as matrices: layers first, then rows, then columns."""

  shape: tuple[int, ...]
  row_axes: int = 1
  stack_axes: int = 0

  @property
  def numbers(self) -> MuonDimensionNumbers:
    axes, rows = tuple(range(len(self.shape))), self.stack_axes + self.row_axes
    return MuonDimensionNumbers(axes[self.stack_axes : rows], axes[rows:])

  @property
  def matrices(self) -> tuple[int, int, int]:
    """How many, rows, columns."""
    s, r = self.stack_axes, self.stack_axes + self.row_axes
    return math.prod(self.shape[:s]), math.prod(self.shape[s:r]), math.prod(self.shape[r:])


def dense(rows: Sequence[int], columns: Sequence[int], stack: Sequence[int] = ()) -> dict[str, Any]:
  kernel = Kernel((*stack, *rows, *columns), len(rows), len(stack))
  return {'kernel': kernel, 'bias': (*stack, *columns)}


def norm(width: int, stack: Sequence[int] = ()) -> dict[str, Any]:
  return {'scale': (*stack, width), 'bias': (*stack, width)}


def attention_block(width: int, mlp: int, heads: int, stack: Sequence[int] = ()) -> dict[str, Any]:
  split = (heads, width // heads)
  return {
    'LayerNorm_0': norm(width, stack),
    'MultiHeadDotProductAttention_0': {
      **{name: dense((width,), split, stack) for name in ('query', 'key', 'value')},
      'out': dense(split, (width,), stack),
    },
    'LayerNorm_1': norm(width, stack),
    'MlpBlock_0': {
      'Dense_0': dense((width,), (mlp,), stack),
      'Dense_1': dense((mlp,), (width,), stack),
    },
  }


def gpt2_block(width: int, mlp: int) -> dict[str, Any]:
  return {
    'ln_1': norm(width),
    'attn': {'c_attn': dense((width,), (3 * width,)), 'c_proj': dense((width,), (width,))},
    'ln_2': norm(width),
    'mlp': {'c_fc': dense((width,), (mlp,)), 'c_proj': dense((mlp,), (width,))},
  }


def resnet18() -> dict[str, Any]:
  conv = lambda window, *channels: {'kernel': Kernel((window, window, *channels), 3)}
  tree: dict[str, Any] = {'Conv_0': conv(3, 3, 64), 'BatchNorm_0': norm(64)}
  widths = [64 * 2 ** (i // 2) for i in range(8)]
  for i, (before, width) in enumerate(zip([64, *widths], widths, strict=False)):
    block = {
      'Conv_0': conv(3, before, width),
      'BatchNorm_0': norm(width),
      'Conv_1': conv(3, width, width),
      'BatchNorm_1': norm(width),
    }
    if before != width:
      block |= {'conv_proj': conv(1, before, width), 'norm_proj': norm(width)}
    tree[f'ResNetBlock_{i}'] = block
  return {**tree, 'Dense_0': dense((512,), (10,))}


def vit_s16() -> dict[str, Any]:
  return {
    'cls': (1, 1, 384),
    'embedding': {'kernel': Kernel((16, 16, 3, 384), 3), 'bias': (384,)},
    'posembed_input': {'pos_embedding': (1, 197, 384)},
    **{f'encoderblock_{i}': attention_block(384, 1536, 6) for i in range(12)},
    'encoder_norm': norm(384),
    'head': dense((384,), (1000,)),
  }


# A kernel's shape and a vector's (a tuple), by the names that Flax linen would give them.
SETS: dict[str, Callable[[], dict[str, Any]]] = {
  'resnet18': resnet18,
  'vit_s16': vit_s16,
  'gpt2_slice': lambda: {**{f'h_{i}': gpt2_block(768, 3072) for i in range(4)}, 'ln_f': norm(768)},
  'square_2048': lambda: {'Dense_0': {'kernel': Kernel((2048, 2048))}},
  'hundred_64': lambda: {f'Dense_{i}': {'kernel': Kernel((64, 64))} for i in range(100)},
  'scanned_12': lambda: {'ScanEncoderBlock_0': attention_block(384, 1536, 6, (12,))},
}
# Only when asked for by its whole name: for tests.
HIDDEN_SETS: dict[str, Callable[[], dict[str, Any]]] = {
  'tiny': lambda: {
    'Conv_0': {'kernel': Kernel((3, 3, 3, 8), 3), 'bias': (8,)},
    'Dense_0': dense((16,), (8,)),
    'Dense_1': dense((8,), (24,)),
  }
}


@dataclasses.dataclass(frozen=True)
class ParameterSet:
  name: str
  params: Any
  grads: Any
  kernels: dict[str, Kernel]  # By path.

  def matrices(self, tree: Any) -> dict[str, Any]:
    """By path, (batch, rows, columns)."""
    leaves = by_path(tree)
    return {p: leaves[p].reshape(kernel.matrices) for p, kernel in self.kernels.items()}


def _is_leaf(x: Any) -> bool:
  return isinstance(x, Kernel | tuple)


def by_path(tree: Any) -> dict[str, Any]:
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def gradient(leaf: Kernel | tuple[int, ...], rng: np.random.Generator) -> jax.Array:
  """Noise and, in a matrix, four strong directions: σ_max is 5 to 10 times σ's RMS.

  In matrices with a side of less than about 60 it is less: it cannot exceed the root of it.
  """
  if not isinstance(leaf, Kernel):
    return jnp.asarray(1e-3 * rng.standard_normal(leaf, np.float32))
  batch, m, n = leaf.matrices
  g = rng.standard_normal((batch, m, n), np.float32)
  strength = 8 / np.arange(1, 5, dtype=np.float32)
  u = rng.standard_normal((batch, m, 4), np.float32) / math.sqrt(m)
  v = rng.standard_normal((batch, 4, n), np.float32) / math.sqrt(n)
  g += math.sqrt(max(m, n)) * (u * strength) @ v
  return jnp.asarray(1e-3 * g.reshape(leaf.shape))


def kernels_by_path(name: str, shapes: dict[str, Any]) -> dict[str, Kernel]:
  """The matrices that are meant.

  Raises:
    RuntimeError: the library sees something else in a parameter.
  """
  flat = jax.tree.leaves(shapes, is_leaf=_is_leaf)
  tree = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(getattr(leaf, 'shape', leaf), jnp.float32),
    shapes,
    is_leaf=_is_leaf,
  )
  inferred = jax.tree.leaves(
    spectral_optax.weight_dimension_numbers(tree),
    is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
  )
  kernels = {}
  for path, leaf, seen in zip(by_path(tree), flat, inferred, strict=True):
    meant = leaf.numbers if isinstance(leaf, Kernel) else None
    if seen != meant:
      raise RuntimeError(f'{path!r} of {name} is seen as {seen}, and {meant} is meant.')
    if isinstance(leaf, Kernel):
      kernels[path] = leaf
  return kernels


def make_set(name: str, shapes: dict[str, Any], dtype: str = 'float32') -> ParameterSet:
  """Normal parameters, and gradients that are the same in every run."""
  kernels = kernels_by_path(name, shapes)
  rng = np.random.default_rng(0)
  grads = jax.tree.map(lambda leaf: gradient(leaf, rng), shapes, is_leaf=_is_leaf)
  params = jax.tree.map(
    lambda g: jnp.asarray(0.02 * rng.standard_normal(g.shape, np.float32), dtype), grads
  )
  grads = jax.tree.map(lambda g: g.astype(dtype), grads)
  return ParameterSet(name, params, grads, kernels)


@dataclasses.dataclass(frozen=True)
class Reference:
  """U Σ Vᵀ of one matrix, double precision."""

  u: np.ndarray
  sigma: np.ndarray
  vt: np.ndarray

  def transferred(self, alpha: float, damping: float) -> np.ndarray:
    sigma = self.sigma / np.sqrt(np.mean(self.sigma**2))
    return self.u * (sigma / (sigma**alpha + damping)) @ self.vt


def references(
  parameters: ParameterSet, most: int = 4, largest: int = 1024
) -> dict[str, Reference]:
  """The first matrix of each of the largest shapes, by path."""
  by_shape: dict[tuple[int, ...], str] = {}
  for path, kernel in parameters.kernels.items():
    if min(kernel.matrices[1:]) <= largest:
      by_shape.setdefault(tuple(sorted(kernel.matrices[1:])), path)
  paths = [by_shape[shape] for shape in sorted(by_shape, key=math.prod)[-most:]]
  matrices = parameters.matrices(parameters.grads)
  decompose = functools.partial(np.linalg.svd, full_matrices=False)
  return {path: Reference(*decompose(np.asarray(matrices[path][0], np.float64))) for path in paths}
