"""Exact curvature along given directions of a layer.

    h_k = vec(u_k v_kᵀ)ᵀ H vec(u_k v_kᵀ)

(skeleton)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
# Two functions whose composition is the loss: outputs of the parameters, loss of the outputs.
Split = tuple[Callable[..., Any], Callable[..., jax.Array]]


def directional_curvature(
  loss_fn: Callable[..., jax.Array],
  params: Any,
  directions: Mapping[str, tuple[ArrayLike, ArrayLike]],
  **options: Any,
) -> dict[str, np.ndarray]:
  """h_k for each matrix and each direction (u, v), by path."""
  raise NotImplementedError
