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
    number: Which device along `axes` this is.
    count: How many matrices there are, the same ones on every device along `axes`.
    dealt: Whether their Gram matrices are dealt over `axes`; if not, every device has all.
    real: Without axes: which are no repetitions, (count,), of which there are at most `most`,
      and only those are worked on.
    most: See `real`.
  """

  axes: tuple[str, ...] = ()
  number: jax.Array | None = None
  count: int = 0  # pyright: ignore[reportIncompatibleMethodOverride]
  dealt: bool = False
  real: jax.Array | None = None
  most: int = 0

  @property
  def moved(self) -> bool:
    """Whether what is worked on is another list than what there is."""
    return self.dealt or self.real is not None

  def _chosen(self, x: jax.Array) -> jax.Array:
    assert self.real is not None
    order = jnp.argsort(~self.real, stable=True)[: self.most]
    return jnp.take(x, order, axis=0)

  @classmethod
  def of(
    cls, axes: tuple[str, ...], number: jax.Array | None, count: int, may_deal: bool = True
  ) -> 'Split':
    """Deals if that moves no more than leaving the sums everywhere does."""
    dealt = bool(axes) and may_deal and 2 * count >= jax.lax.axis_size(axes)
    return cls(axes, number, count, dealt)

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
    if self.real is not None:
      return self._chosen(x)
    if self.dealt:
      return jax.lax.psum_scatter(self._wrapped(x), self.axes, scatter_dimension=0, tiled=True)
    return jax.lax.psum(x, self.axes) if self.axes else x

  def mine(self, x: jax.Array) -> jax.Array:
    """This device's part of (count, ...)."""
    if self.real is not None:
      return self._chosen(x)
    if not self.dealt:
      return x
    here = self._wrapped(x).reshape(self.devices, -1, *x.shape[1:])
    assert self.number is not None
    return jnp.take(here, self.number, axis=0)

  def everyones(self, x: jax.Array) -> jax.Array:
    """From every device's part back to (count, ...)."""
    if self.real is not None:  # A repetition gets what nobody looks at.
      place = jnp.clip(jnp.cumsum(self.real) - 1, 0, self.most - 1)
      return jnp.take(x, place, axis=0)
    return jax.lax.all_gather(x, self.axes, tiled=True)[: self.count] if self.dealt else x

  def all(self, x: jax.Array) -> jax.Array:
    """Whether it is true on every device."""
    return jax.lax.pmin(x.astype(jnp.int32), self.axes) > 0 if self.axes else x

  def largest(self, x: jax.Array) -> jax.Array:
    """The largest of any device."""
    return jax.lax.pmax(x, self.axes) if self.axes else x


WHOLE = Split()
