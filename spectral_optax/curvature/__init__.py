"""Curvature of a loss along the singular directions of each layer's gradient.

For a layer with gradient G = U Σ Vᵀ and Hessian H (of the loss by this layer alone),

    h_k = vec(u_k v_kᵀ)ᵀ H vec(u_k v_kᵀ) ∝ σ_k^α

is what the layer's *curvature exponent* α describes, and T(σ; α) is built on. `measure`
measures it, with all that goes with it, for every matrix of a network; the other functions
are its parts. Source: A. Calvo, "Spectral Asymptotics of Neural Network Loss Landscapes",
arXiv:2606.02596. Nothing in here knows an optimizer.
"""

from spectral_optax.curvature import flax
from spectral_optax.curvature.alignment import (
  KroneckerAlignment,
  align_report,
  kronecker_alignment,
)
from spectral_optax.curvature.capturing import LayerCapture, capture_layers
from spectral_optax.curvature.directional import directional_curvature
from spectral_optax.curvature.fits import (
  Line,
  PowerLawFit,
  RankProfile,
  fit_alpha,
  fit_decay,
  fit_gamma,
  masked_line,
  masked_power_law,
  participation_bound,
  participation_ratio,
  rank_profile,
)
from spectral_optax.curvature.measuring import measure
from spectral_optax.curvature.online import joint_curvature, orthogonal_signs
from spectral_optax.curvature.report import CurvatureReport, LayerCurvature

__all__ = [
  # A network, in one call.
  'measure',
  'CurvatureReport',
  'LayerCurvature',
  # Curvature along directions.
  'directional_curvature',
  # Of all layers at once, inside a training step.
  'joint_curvature',
  'orthogonal_signs',
  # Why they follow the singular values: the Spectral Alignment Decomposition.
  'kronecker_alignment',
  'KroneckerAlignment',
  'align_report',
  'flax',
  'capture_layers',
  'LayerCapture',
  # Exponents.
  'fit_alpha',
  'fit_gamma',
  'fit_decay',
  'PowerLawFit',
  # The same inside a jitted function.
  'masked_power_law',
  'masked_line',
  'Line',
  # Spectra.
  'rank_profile',
  'RankProfile',
  'participation_ratio',
  'participation_bound',
]
