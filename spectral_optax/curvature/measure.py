"""`measure`: what the paper defines, layer by layer, of any JAX loss. (skeleton)"""

from collections.abc import Callable
from typing import Any

import jax

from spectral_optax.curvature.report import CurvatureReport


def measure(
  loss_fn: Callable[..., jax.Array],
  params: Any,
  *,
  top_k: int = 20,
  weight_dimension_numbers: Any | None = None,
  **options: Any,
) -> CurvatureReport:
  """Measures every matrix among the parameters."""
  raise NotImplementedError
