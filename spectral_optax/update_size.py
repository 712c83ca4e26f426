"""The size of an update: one root mean square for a matrix, or for each of its outputs."""

import math

import jax
import jax.numpy as jnp

OF = ('matrix', 'output')

# An output whose update is smaller than this, in root mean squares of the matrix's, is held
# back: a unit that is dead, whose momentum dies away, shall not go on at full speed.
HELD_BACK = 0.3


def check(of: str) -> None:
  """Raises ValueError for an unknown `rms_of`."""
  if of not in OF:
    raise ValueError(f'rms_of must be one of {", ".join(map(repr, OF))}, got {of!r}.')


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

  def mean_square(axes: tuple[int, ...], count: int, names: tuple[str, ...]) -> jax.Array:
    here = jnp.sum(jnp.square(x), axes, keepdims=True)
    return (jax.lax.psum(here, names) if names else here) / count

  if shape is None:
    shape = math.prod(x.shape[a] for a in rows), math.prod(x.shape[a] for a in columns)
  mean = matrix = mean_square(rows + columns, math.prod(shape), rows_over + columns_over)
  if of == 'output':
    outputs = mean_square(rows, shape[0], rows_over)
    mean = (outputs + HELD_BACK**2 * matrix) / (1 + HELD_BACK**2)
  return jnp.where(matrix == 0, 0, rms / jnp.sqrt(jnp.where(matrix == 0, 1, mean))) * x
