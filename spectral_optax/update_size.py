"""The size of an update: one root mean square for a matrix, or for each of its outputs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax import layout

OF = ('matrix', 'output', 'wide', 'layer_type')

# An output whose update is smaller than this, in root mean squares of the matrix's, is held
# back: a unit that is dead, whose momentum dies away, shall not go on at full speed.
HELD_BACK = 0.3


def of_layer(word: str, layer_type: str | None, view: layout.MatrixView) -> str:
  """What has one size in a layer, "matrix" or "output".

  The outputs of a matrix with orthonormal columns are of one size; where there are more outputs
  than inputs only rows can be orthonormal, and some outputs get more of an update than others,
  whatever the spectrum. "wide" makes that even in the heads and blocks of a transformer, where it
  pays; of plain dense layers and convolutions it leaves the matrix whole (docs/choosing.md).
  """
  if word == 'layer_type':
    return 'matrix' if layer_type == 'conv' else 'output'
  if word == 'wide':
    plain = layer_type in ('conv', 'dense')
    return 'output' if view.columns > view.rows and not plain else 'matrix'
  return word


def check(of: Any) -> None:
  """Raises ValueError for an unknown word; a tree or a function waits for the parameters."""
  if isinstance(of, str):
    _check_word(of, 'rms_of')


def _check_word(of: Any, where: str) -> None:
  if of not in OF:
    raise ValueError(f'{where} must be one of {", ".join(map(repr, OF))}, got {of!r}.')


def resolve(of: Any, params: Any, views: Mapping[str, layout.MatrixView]) -> dict[str, str]:
  """For each matrix "matrix" or "output": what of it has one size.

  Args:
    of: See `scale_to_rms`.
    params: The parameter tree, as it was when `views` were made.
    views: The matrices, by path.

  Raises:
    ValueError: an unknown word, a tree that does not match, a matrix without a value.
  """
  tree = of(params) if layout.is_function(of) else of
  entries = layout.match_prefix(layout.leaves_by_path(tree), params, 'rms_of')
  for path, view in views.items():
    of_view = f'{path!r} with shape {view.shape}'
    if path not in entries:
      raise ValueError(f'rms_of has no value for the matrix {of_view}. Give one ("" is for all).')
    _check_word(entries[path], f'rms_of of {of_view}')
  if not {'wide', 'layer_type'} & set(entries.values()):
    return {path: entries[path] for path in views}
  types = layout.layer_types_by_path(params)
  return {path: of_layer(entries[path], types[path], view) for path, view in views.items()}


def to_rms(
  x: jax.Array,
  rms: float | jax.Array,
  of: str,
  rows: tuple[int, ...] = (-2,),
  columns: tuple[int, ...] = (-1,),
  *,
  shape: tuple[int, int] | None = None,
  rows_over: tuple[str, ...] = (),
  columns_over: tuple[str, ...] = (),
) -> jax.Array:
  """Matrices, scaled: see `scale_to_rms`.

  Args:
    x: Matrices, or a device's parts of them.
    rms: What each comes to.
    of: "matrix", or "output" for every one of the columns.
    rows: The axes that are summed over in the forward pass (inputs).
    columns: The others' (outputs); what is neither is a batch.
    shape: Numbers of rows and columns of a whole matrix; None where x has them.
    rows_over: Mesh axes that rows are divided over, inside `jax.shard_map`.
    columns_over: Mesh axes that columns are divided over.
  """

  def mean(
    squares: jax.Array, axes: tuple[int, ...], count: int, names: tuple[str, ...]
  ) -> jax.Array:
    here = jnp.sum(squares, axes, keepdims=True)
    return (jax.lax.psum(here, names) if names else here) / count

  m, n = shape or (math.prod(x.shape[a] for a in rows), math.prod(x.shape[a] for a in columns))
  squares = jnp.square(x)
  if of == 'matrix':
    matrix = mean(squares, rows + columns, m * n, rows_over + columns_over)
    return _factor(rms, matrix, matrix) * x
  outputs = mean(squares, rows, m, rows_over)
  matrix = mean(outputs, columns, n, columns_over)  # Of the outputs': x is read once.
  held_back = (outputs + HELD_BACK**2 * matrix) / (1 + HELD_BACK**2)
  return _factor(rms, held_back, matrix) * x


def _factor(rms: float | jax.Array, mean: jax.Array, matrix: jax.Array) -> jax.Array:
  """What brings a mean square to rms²; zero where that of the matrix is zero."""
  return jnp.where(matrix == 0, 0, rms / jnp.sqrt(jnp.where(matrix == 0, 1, mean)))


def each_to_rms(
  xs: Sequence[jax.Array], rms: float | jax.Array, of: Sequence[str]
) -> list[jax.Array]:
  """`to_rms` of stacks (batch_i, rows_i, columns_i): all roots in one vector, less to compile."""
  scaled = list(xs)
  whole = [i for i, word in enumerate(of) if word == 'matrix']
  for i in set(range(len(xs))) - set(whole):
    scaled[i] = to_rms(xs[i], rms, of[i])
  if whole:
    count = [xs[i].shape[-2] * xs[i].shape[-1] for i in whole for _ in range(len(xs[i]))]
    sums = [jnp.sum(jnp.square(xs[i]), axis=(-2, -1)) for i in whole]
    mean = jnp.concatenate(sums) / np.asarray(count, sums[0].dtype)
    # Without the barrier XLA takes the vector apart again.
    factor = jax.lax.optimization_barrier(_factor(rms, mean, mean))
    parts = jnp.split(factor, np.cumsum([len(x) for x in sums])[:-1])
    for i, part in zip(whole, parts, strict=True):
      scaled[i] = part[:, None, None] * xs[i]
  return scaled
