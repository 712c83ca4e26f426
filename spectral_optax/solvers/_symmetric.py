"""Symmetric matrices without their lower half: a block below the diagonal is another's transpose.

    Y = [a  b ]        Y² = [a² + b bᵀ    a b + b c ]
        [bᵀ c ]             [   .         bᵀb + c²  ]

a and c are symmetric again, and so are a², b bᵀ, bᵀb and c²: cut L times, a square takes
1/2 + 1/2^(L+1) of the multiplications of a product.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectral_optax.solvers._perturbation import transpose

# A matrix (batch, n, n), or its (a, b, c), of which a and c are again one or the other.
Symmetric = Any
Product = Callable[[jax.Array, jax.Array], jax.Array]

# Blocks are whole tiles of a TPU.
TILE = 128


def sizes(n: int, levels: int, cut_from: int) -> Any:
  """How a matrix of side n is cut: n, or (sizes of a, sizes of c); none below `cut_from` is."""
  if not levels or n < max(cut_from, 2):
    return n
  half = min(-(-n // (2 * TILE)) * TILE, n - 1)
  return tuple(sizes(part, levels - 1, cut_from) for part in (half, n - half))


def _side(cut: Any) -> int:
  return cut if isinstance(cut, int) else sum(map(_side, cut))


def split(y: jax.Array, cut: Any) -> Symmetric:
  """Cuts, (batch, n, n), as `sizes` has it."""
  if isinstance(cut, int):
    return y
  half = _side(cut[0])
  return split(y[:, :half, :half], cut[0]), y[:, :half, half:], split(y[:, half:, half:], cut[1])


def join(y: Symmetric) -> jax.Array:
  """The whole matrix, (batch, n, n)."""
  if not isinstance(y, tuple):
    return y
  a, b, c = join(y[0]), y[1], join(y[2])
  below = jnp.concatenate([transpose(b), c], axis=-1)
  return jnp.concatenate([jnp.concatenate([a, b], axis=-1), below], axis=-2)


def outer(x: jax.Array, cut: Any, product: Product) -> Symmetric:
  """X Xᵀ of (batch, n, k)."""
  if isinstance(cut, int):
    return product(x, transpose(x))
  upper, lower = x[:, : _side(cut[0])], x[:, _side(cut[0]) :]
  corner = product(upper, transpose(lower))
  return outer(upper, cut[0], product), corner, outer(lower, cut[1], product)


def inner(x: jax.Array, cut: Any, product: Product) -> Symmetric:
  """XᵀX of (batch, k, n)."""
  if isinstance(cut, int):
    return product(transpose(x), x)
  left, right = x[:, :, : _side(cut[0])], x[:, :, _side(cut[0]) :]
  corner = product(transpose(left), right)
  return inner(left, cut[0], product), corner, inner(right, cut[1], product)


def square(y: Symmetric, cut: Any, product: Product) -> Symmetric:
  """Y² of a Y that is cut."""
  if isinstance(cut, int):
    return product(y, y)
  a, b, c = y
  plus = lambda x, y: jax.tree.map(jnp.add, x, y)
  return (
    plus(square(a, cut[0], product), outer(b, cut[0], product)),
    product(join(a), b) + product(b, join(c)),
    plus(inner(b, cut[1], product), square(c, cut[1], product)),
  )
