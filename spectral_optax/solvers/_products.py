"""The products with G: its Gram matrix, at any scale of G, and f of that applied to G."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectral_optax.solvers._spectrum import energy
from spectral_optax.solvers._split import WHOLE, Split


def is_wide(matrix: jax.Array, split: Split = WHOLE, noisy: bool = False) -> bool:
  """Whether the small Gram matrix is G Gᵀ; a square one's is quicker to compute so.

  With noise it matters which of a square one's is taken: GᵀG, everywhere.
  """
  rows, columns = matrix.shape[-2:]
  return not split.axes and (rows < columns or (rows == columns and not noisy))


def gram_matrix(matrix: jax.Array, wide: bool, half: bool = False) -> jax.Array:
  """GᵀG or G Gᵀ, of the smaller side; `half`: of G rounded to bfloat16, off a CPU."""
  equation = 'bij,bkj->bik' if wide else 'bji,bjk->bik'
  multiply = functools.partial(jnp.einsum, equation, preferred_element_type=matrix.dtype)
  exact = lambda x: multiply(x, x, precision='highest')
  if not half:
    return exact(matrix)

  def rounded(x):  # Products of bfloat16 are exact in float32: the Gram matrix of that G.
    x = x.astype(jnp.bfloat16)
    return multiply(x, x)

  return jax.lax.platform_dependent(matrix, cpu=exact, default=rounded)


def apply(matrix: jax.Array, f: jax.Array, wide: bool, half: bool = False) -> jax.Array:
  """G f(GᵀG), or f(G Gᵀ) G; `half`: of G rounded to bfloat16, off a CPU."""

  def multiply(matrix, f, **how):
    left, right = (f, matrix) if wide else (matrix, f)
    return jnp.matmul(left, right, **how)

  exact = functools.partial(multiply, precision='highest')
  if not half:
    return exact(matrix, f)

  def rounded(matrix, f):
    # f is large where σ is small and small where it is large: eight bits of the one would
    # drown the other, sixteen do not.
    high = f.astype(jnp.bfloat16)
    low = (f - high.astype(f.dtype)).astype(jnp.bfloat16)
    how = {'preferred_element_type': f.dtype}
    g = matrix.astype(jnp.bfloat16)
    return multiply(g, high, **how) + multiply(g, low, **how)

  return jax.lax.platform_dependent(matrix, f, cpu=exact, default=rounded)


def _ranges(dtype: Any) -> tuple[np.ndarray, float]:
  """Exponents of two, largest first, and a bound.

  For any G that is not zero, 2^exponent G of one of them has ‖·‖²_F between 1/bound and bound,
  whose square is a number of the dtype, with room to spare.
  """
  info = jnp.finfo(dtype)
  return round(info.maxexp / 3.2) * np.array([3, 2, 1, -1, -2, -3]), float(info.max) ** 0.37


# Numbers of G and N that are scaled at once, more or less: all of them would double them.
AT_ONCE = 2**22

# What the scope is called in which matrices are looked after that are out of range.
RARELY = 'out_of_range'


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
  return jnp.ldexp(jnp.ones([], dtype), exponent)  # exp2 is off by a digit.


class GramMatrices:
  """Gram matrices of all G, and of noise added to them, padded with zeros to one side.

  Pieces are two lists, of G (batch_i, m_i, n_i) and of noise, N of that shape or None.
  """

  def __init__(self, wide: Sequence[bool], side: int, half: bool, split: Split):
    self.wide, self.side, self.half, self.split = wide, side, half, split

  def of(
    self, pieces: Sequence[Sequence[jax.Array | None]], scale: jax.Array | None = None
  ) -> jax.Array:
    """As they are, or of all G and N times a number, (batch, side, side)."""
    grams, unit, waiting = [], None, 0
    for matrix, noise, wide in zip(*pieces, self.wide, strict=True):
      gram = None
      for x in (matrix, noise):
        if x is None:
          continue
        if scale is not None and len(x) > 1:
          x = scale * x
        elif scale is not None:  # By a product: a pass of its own would be more to compile.
          unit = scale * jnp.eye(self.side, dtype=scale.dtype)[None] if unit is None else unit
          short = x.shape[-2 if wide else -1]
          x = apply(x, unit[:, :short, :short], wide)
        one = gram_matrix(x, wide, self.half)
        waiting += x.size
        if scale is not None and waiting > AT_ONCE:
          # No diagonal is negative, but a compiler can't know that: what follows waits for this.
          scale, unit, waiting = jnp.where(one[0, 0, 0] < 0, 0, scale), None, 0
        gram = one if gram is None else gram + one
      assert gram is not None
      pad = (0, self.side - gram.shape[-1])
      grams.append(jnp.pad(gram, ((0, 0), pad, pad)) if pad[1] else gram)
    return self.split.total(jnp.concatenate(grams))

  def in_range(
    self, pieces: Sequence[Sequence[jax.Array | None]]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Those of all G / c; their traces; c.

    c is one, unless that would leave the dtype's range, and zero of a G that is not finite: what
    no factor brings there.
    """
    made = jax.custom_jvp(self._in_range)
    made.defjvp(self._in_range_jvp)
    return made(pieces)

  def _in_range(self, pieces):
    grams = self.of(pieces)
    sums, dtype = energy(grams), grams.dtype
    exponents, bound = _ranges(dtype)
    most = jnp.finfo(dtype).maxexp - 2  # An exponent, up or down, that is no trouble.
    fits = lambda sums: (sums > 1 / bound) & (sums < bound)  # False for a NaN.
    # The same on all devices: there are sums over them in what follows.
    on_all = lambda x: self.split.all(jnp.all(x))

    def another(carry):
      k, _, grams, sums, c = carry
      exponent = jnp.asarray(exponents)[k]
      tried = self.of(pieces, _power_of_two(exponent, dtype))
      found = energy(tried)
      take = (c == 0) & fits(found)
      # The rest of the way to a norm of about one. Powers of two change no digit.
      half_way = jnp.floor(jnp.log2(jnp.where(take, found, 1)) / 2).astype(jnp.int32)
      of_c = jnp.clip(half_way - exponent, -most, most)
      rest = _power_of_two(-2 * (of_c + exponent), dtype)
      # With the largest factor nothing but zeros has a trace of zero.
      none = (c == 0) & (k == 0) & (found == 0)
      c = jnp.where(take, _power_of_two(of_c, dtype), jnp.where(none, 1, c))
      grams = jnp.where(take[:, None, None], rest[:, None, None] * tried, grams)
      return k + 1, on_all(c > 0), grams, jnp.where(take, rest * found, sums), c

    def search(grams, sums, done):
      # Under `vmap` both branches run, and this one then has no round.
      with jax.named_scope(RARELY):
        more = lambda carry: (carry[0] < len(exponents)) & ~carry[1]
        # From nothing: what is there already would be copied, at every step.
        nothing, there = jnp.zeros_like(grams), fits(sums)
        start = jnp.zeros([], jnp.int32), done, nothing, sums, there.astype(dtype)
        found, sums, c = jax.lax.while_loop(more, another, start)[2:]
        return jnp.where(there[:, None, None], grams, found), sums, c

    done = on_all(fits(sums))
    as_they_are = lambda grams, sums, done: (grams, sums, jnp.ones_like(sums))
    return jax.lax.cond(done, as_they_are, search, grams, sums, done)

  def _in_range_jvp(self, primals, tangents):
    """With that c, which has no derivative; a loop has none backwards."""
    made = self.in_range(*primals)
    c = self.split.everyones(made[2])
    ends = np.cumsum([len(matrix) for matrix in primals[0][0]])
    parts = [part[:, None, None] for part in jnp.split(c, ends[:-1])]
    over_c = lambda pieces: [
      [x if x is None else x / part for x, part in zip(xs, parts, strict=True)] for xs in pieces
    ]
    _, d_grams = jax.jvp(self.of, [over_c(*primals)], [over_c(*tangents)])
    return made, (d_grams, energy(d_grams), jnp.zeros_like(made[2]))
