"""Matrices whose longer side is divided over mesh axes, inside `jax.shard_map`.

GᵀG is the sum of what every device has of it: n² numbers are moved, and none of G. What f
is made of them is dealt over the same devices, where there are enough, and comes back.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Split(NamedTuple):
  """Who has what; without axes, everything here, and nothing below does anything.

  Attributes:
    axes: Mesh axes that the longer side is divided over.
    count: How many matrices there are, the same ones on every device along `axes`.
    dealt: Whether their Gram matrices are dealt over `axes`; if not, every device has all.
  """

  axes: tuple[str, ...] = ()
  count: int = 0
  dealt: bool = False

  @classmethod
  def of(cls, axes: tuple[str, ...], count: int, may_deal: bool = True) -> 'Split':
    """Deals if that moves no more than leaving the sums everywhere does."""
    return cls(axes, count, bool(axes) and may_deal and 2 * count >= jax.lax.axis_size(axes))

  @property
  def devices(self) -> int:
    """Along `axes`."""
    return jax.lax.axis_size(self.axes) if self.axes else 1

  def _wrapped(self, x: jax.Array) -> jax.Array:
    """The first ones once more at the end, for as many on every device."""
    each = -(-self.count // self.devices)
    return jnp.take(x, np.arange(each * self.devices) % self.count, axis=0)

  def total(self, x: jax.Array) -> jax.Array:
    """The sum over devices of (count, ...): this device's part, or all."""
    if self.dealt:
      return jax.lax.psum_scatter(self._wrapped(x), self.axes, scatter_dimension=0, tiled=True)
    return jax.lax.psum(x, self.axes) if self.axes else x

  def mine(self, x: jax.Array) -> jax.Array:
    """This device's part of (count, ...)."""
    if not self.dealt:
      return x
    here = self._wrapped(x).reshape(self.devices, -1, *x.shape[1:])
    return jnp.take(here, jax.lax.axis_index(self.axes), axis=0)

  def everyones(self, x: jax.Array) -> jax.Array:
    """From every device's part back to (count, ...)."""
    return jax.lax.all_gather(x, self.axes, tiled=True)[: self.count] if self.dealt else x

  def all(self, x: jax.Array) -> jax.Array:
    """Whether it is true on every device."""
    return jax.lax.pmin(x.astype(jnp.int32), self.axes) > 0 if self.axes else x

  def most(self, x: jax.Array) -> jax.Array:
    """The largest of any device."""
    return jax.lax.pmax(x, self.axes) if self.axes else x


WHOLE = Split()
