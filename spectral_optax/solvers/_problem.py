"""What every solver takes and gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Relative error of T from which on products with G may be in bfloat16, off a CPU.
BFLOAT16_TOLERANCE = 3e-2


class Fits:
  """What was fitted to traced α and d at the last step, of use while they stay as they are.

  Solvers ask in the same order at every step. An object of one trace: made, asked, and `flat`
  taken from it.

  Attributes:
    kept: `flat` of the last step; None where there is none yet.
    unchanged: Whether every α and d is what it was then, () boolean.
  """

  def __init__(self, kept: jax.Array | None = None, unchanged: jax.Array | bool = False):
    self.kept, self.unchanged = kept, unchanged
    self._made: list[jax.Array] = []
    self._start = 0

  def of(self, make: Callable[[], Any]) -> Any:
    """What `make` gives, a tree of arrays: of this step, or the same kept from the last."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(make))
    flatten = lambda tree: jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])
    if self.kept is None:
      flat = flatten(make())
    else:
      end = self._start + sum(x.size for x in leaves)
      kept = self.kept[self._start : end].astype(jnp.result_type(*leaves))
      flat = jax.lax.cond(self.unchanged, lambda: kept, lambda: flatten(make()))
      self._start = end
    self._made.append(flat)
    parts = jnp.split(flat, np.cumsum([x.size for x in leaves])[:-1])
    shaped = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, shaped)

  def flat(self, dtype: Any) -> jax.Array:
    """Of this step, one axis."""
    return jnp.concatenate([jnp.zeros([0], dtype), *(x.astype(dtype) for x in self._made)])


class Problem(NamedTuple):
  """A batch of matrices of one shape, and the map that each wants.

  Attributes:
    matrix: (batch, m, n) with m ≥ n, float32 or float64, finite, already normalised;
      None for methods that look at GᵀG alone.
    gram: (batch, n, n), its Gram matrix GᵀG; for methods that say so. Of methods that
      look at nothing else it is not normalised: see `unit`.
    unit: (batch,), what the eigenvalues of `gram` are divided by to be the normalised σ².
    gain: (batch,), a factor that the answer is to have.
    half: Whether bfloat16 is good enough for G; then sixteen bits are for GᵀG.
    choose_rank: Whether fewer directions than `basis` has room for will do, if they meet
      `tolerance`.
    alpha: Curvature exponents, (batch,). A NumPy array if known while tracing.
    damping: d, likewise.
    largest: The largest σ² that the normalisation allows, (batch,).
    tolerance: Relative error of T that a method which approximates it may make.
    share: Which of `alpha`, `damping` and `largest` go with the matrices, (batch,) integers;
      None for all, in order.
    basis: (batch, n, r): where an iteration for the leading right singular vectors
      starts. Columns of zeros for none.
    fits: Of the last step; None where nothing is kept.
  """

  matrix: jax.Array | None
  gram: jax.Array | None
  alpha: np.ndarray | jax.Array
  damping: np.ndarray | jax.Array
  largest: np.ndarray
  tolerance: float
  basis: jax.Array
  unit: jax.Array | float = 1.0
  gain: jax.Array | float = 1.0
  half: bool = False
  choose_rank: bool = False
  share: jax.Array | None = None
  fits: Fits | None = None

  def take(self, x: Any) -> jax.Array:
    """From one for each α to one for each matrix."""
    x = jnp.asarray(x, self.basis.dtype)
    return x if self.share is None else x[self.share]


class Leading(NamedTuple):
  """Leading singular values, in the units of `Problem.matrix`, and how the rest is spread.

  Attributes:
    sigma: (batch, r), estimates from below, largest first.
    basis: (batch, n, r), unit columns.
  """

  sigma: jax.Array
  basis: jax.Array


class Solution(NamedTuple):
  """A solver's answer.

  Attributes:
    update: (batch, m, n), U T(Σ) Vᵀ; of methods that look at GᵀG alone, (batch, n, n),
      gain · f(GᵀG / unit) with G f(GᵀG) = U T(Σ) Vᵀ.
    error: (batch,) or (), how far T may be off, relative, rounding aside.
    leading: From methods that find leading singular vectors on their way.
  """

  update: jax.Array
  error: jax.Array | float = 0.0
  leading: Leading | None = None


def known(value: object) -> bool:
  """Whether numbers can be looked at while tracing: no JAX array."""
  return isinstance(value, int | float | np.ndarray | np.generic)
