"""What was measured: a row a matrix, as a table, as JSON, as plots, as α for the optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from spectral_optax.curvature.fits import PowerLawFit, RankProfile


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCurvature:
  """One matrix.

  Attributes:
    path: Of the parameter.
    index: Which matrix of it, where the parameter is a stack; () where it is not.
    batch_shape: Of the stack; () where the parameter is one matrix.
    layer_type: See `spectral_optax.layer_types`.
    shape: (rows, columns).
    spectrum: All singular values of the gradient, decreasing, (min(rows, columns),).
    sigma: The leading ones, σ_k, (K,).
    h: Exact curvature h_k along the k-th singular direction, (K,), negative ones too.
    h_gauss_newton: Of the Gauss-Newton matrix, (K,), or None.
    alpha: Fit of h_k ∝ σ_k^α.
    gamma: Fit of σ_k ∝ k^-γ.
    s: Fit of h_(r) ∝ r^-s.
    profile: Which model σ_k follows.
    participation_h: Participation ratio of the positive h_k.
    participation_gradient: Of `spectrum`.
    bound: What `participation_bound` says for these α and γ.
    num_directions: How many of the K singular values are more than rounding.
    num_negative: How many of their h_k are negative.
    reason: Why there is nothing to fit at all (a gradient of zero, a NaN); empty otherwise.
  """

  path: str
  index: tuple[int, ...]
  batch_shape: tuple[int, ...]
  layer_type: str | None
  shape: tuple[int, int]
  spectrum: np.ndarray
  sigma: np.ndarray
  h: np.ndarray
  h_gauss_newton: np.ndarray | None
  alpha: PowerLawFit
  gamma: PowerLawFit
  s: PowerLawFit
  profile: RankProfile
  participation_h: float
  participation_gradient: float
  bound: float
  num_directions: int
  num_negative: int
  reason: str = ''

  @property
  def name(self) -> str:
    """``'head/kernel'``, or ``'layers/kernel[3]'`` for one of a stack."""
    return self.path + (f'[{",".join(map(str, self.index))}]' if self.index else '')


@dataclasses.dataclass(frozen=True, eq=False)
class CurvatureReport:
  """What `measure` has found.

  Attributes:
    layers: A row a matrix, in the order of the parameters.
    loss: Over all batches.
    settings: How it was measured, of plain numbers and strings.
    alignment: The decomposition of each matrix (`kronecker_alignment`), by
      `LayerCurvature.name` (which is the path, unless layers are stacked); None where
      it was not computed. Attach it with `dataclasses.replace(report, alignment=...)`.
  """

  layers: tuple[LayerCurvature, ...]
  loss: float
  settings: Mapping[str, Any]
  alignment: Mapping[str, Any] | None = None
