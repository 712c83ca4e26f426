"""Curvature of all layers at once, cheap enough to be measured while training.

One Hessian-vector product along D = Σ_l s_l u_l v_lᵀ, a direction of every layer l with a
random sign s_l = ±1, gives for each layer

    s_l ⟨u_l v_lᵀ, (H D)_l⟩ = h_l + Σ_m≠l s_l s_m ⟨u_l v_lᵀ, H_lm u_m v_mᵀ⟩.

The terms between layers vanish in expectation, so that k directions of each layer cost k
products however many layers there are. What is left of those terms is noise: averaged over
draws of the signs that are orthogonal to each other, exactly gone once there are as many
draws as matrices, and averaged over measurements by whoever keeps them.

The curvature itself is that of A. Calvo, "Spectral Asymptotics of Neural Network Loss
Landscapes", arXiv:2606.02596; `directional_curvature` computes it layer by layer, without
noise. Everything here can be jitted.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectral_optax import layout
from spectral_optax.curvature._convolutions import channels_last
from spectral_optax.curvature.directional import at_least_single


def orthogonal_signs(key: jax.Array, draws: int, count: int) -> jax.Array:
  """Random signs, uncorrelated between any two columns, for as few draws as possible.

  Columns are those of a Hadamard matrix in turn, each times a sign of its own: two that are
  different there are exactly orthogonal, and the others are in expectation.

  Args:
    key: A JAX random key.
    draws: Rows, a power of two.
    count: Columns.

  Returns:
    (draws, count), float32, of ±1.

  Raises:
    ValueError: `draws` is no power of two.
  """
  check_draws(draws)
  rows, columns = np.arange(draws)[:, None], np.arange(count)[None, :] % draws
  hadamard = 1 - 2 * (np.bitwise_count(rows & columns) % 2).astype(np.float32)
  return jnp.asarray(hadamard) * jax.random.rademacher(key, (1, count), jnp.float32)


def check_draws(draws: int) -> None:
  """Raises ValueError unless it is a power of two."""
  if draws < 1 or draws & (draws - 1):
    raise ValueError(f'draws must be a power of two, got {draws}.')


def joint_curvature(
  loss_fn: Callable[[Any], jax.Array],
  params: Any,
  directions: Mapping[str, tuple[ArrayLike, ArrayLike]],
  key: jax.Array,
  *,
  draws: int = 1,
  weight_dimension_numbers: Any | None = None,
) -> dict[str, jax.Array]:
  """Curvature along ``u_k v_kᵀ`` for every given matrix and k, one k of all at a time.

  Unbiased over `key`, with the noise that the module describes; `draws` times as many
  Hessian-vector products as a matrix has directions, one after the other.

  Args:
    loss_fn: ``loss_fn(params)`` gives a real scalar and is deterministic.
    params: The parameter tree. Leaves in half precision are measured in float32.
    directions: By path, (u, v): u (matrices, directions, rows), v (matrices, directions,
      columns), with one axis of matrices for the layers of a stack (a length of 1 for any
      other). Their k-th ones go together; paths may have different numbers of them.
    key: A JAX random key for the signs.
    draws: Of the signs, a power of two, to average over; with as many as there are
      matrices the curvature is exact.
    weight_dimension_numbers: Which axes are rows and columns; see
      `spectral_optax.weight_dimension_numbers`.

  Returns:
    By path, (matrices, directions).

  Raises:
    ValueError: `draws`, a path that is no matrix, or shapes that do not fit.
  """
  views = layout.matrix_views(params, weight_dimension_numbers)
  leaves = layout.leaves_by_path(params)
  structure = jax.tree.structure(params)
  wide = {path: at_least_single(leaves[path]) for path in directions if path in leaves}
  us, vs = {}, {}
  for path, pair in directions.items():
    if path not in views:
      raise ValueError(
        f'{path!r} is no matrix among the parameters; the matrices are {layout._listing(views)}.'
      )
    u, v = (jnp.asarray(x, wide[path].dtype) for x in pair)
    view, matrices = views[path], wide[path].size // (views[path].rows * views[path].columns)
    if u.shape != (matrices, u.shape[1], view.rows) or v.shape != (*u.shape[:2], view.columns):
      raise ValueError(
        f'Directions of {path!r} have shapes {u.shape} and {v.shape}; they must be'
        f' ({matrices}, directions, {view.rows}) and ({matrices}, directions, {view.columns}).'
      )
    us[path], vs[path] = u, v
  most = max(u.shape[1] for u in us.values())

  def padded(x):
    return jnp.pad(x, ((0, 0), (0, most - x.shape[1]), (0, 0)))

  counts = {path: len(u) for path, u in us.items()}
  starts = dict(zip(counts, np.cumsum([0, *counts.values()]), strict=False))
  all_signs = orthogonal_signs(key, draws, sum(counts.values()))

  def loss(matrices):
    replaced = {**leaves, **matrices}
    return loss_fn(jax.tree.unflatten(structure, list(replaced.values())))

  def one(hessian, us, vs, k, signs):
    at = lambda x: jax.lax.dynamic_index_in_dim(padded(x), k, axis=1, keepdims=False)
    u, v = ({path: at(x) for path, x in xs.items()} for xs in (us, vs))
    own = {
      path: jax.lax.dynamic_slice_in_dim(signs, starts[path], n).astype(u[path].dtype)
      for path, n in counts.items()
    }
    # Under explicit sharding a direction lies as its parameter does, and is seen whole.
    tangent = {
      path: layout.sharded_like(
        views[path].from_matrices((own[path][:, None] * u[path])[:, :, None] * v[path][:, None]),
        wide[path],
      )
      for path in us
    }
    along = hessian(tangent)
    whole = lambda path: views[path].to_matrices(layout.replicated(along[path]))
    return {
      path: own[path] * jnp.einsum('brc,br,bc->b', whole(path), u[path], v[path]) for path in us
    }

  @channels_last
  def all_of_them(wide, us, vs, ks, signs):
    # The network and its gradient once, for all products.
    hessian = jax.linearize(jax.grad(loss), wide)[1]
    return jax.lax.map(lambda item: one(hessian, us, vs, *item), (ks, signs))

  ks = jnp.repeat(jnp.arange(most), draws)
  h = all_of_them(wide, us, vs, ks, jnp.tile(all_signs, (most, 1)))
  return {
    path: values.reshape(most, draws, -1).mean(1).T[:, : us[path].shape[1]]
    for path, values in h.items()
  }
