"""Spectral Newton for Optax: each layer's momentum through the map its curvature wants."""

from spectral_optax import curvature
from spectral_optax.exponents import PUBLISHED_ALPHA
from spectral_optax.layout import layer_types, weight_dimension_numbers
from spectral_optax.measured import MeasuredAlphaState, measured_alpha
from spectral_optax.optimizer import spectral_newton
from spectral_optax.solvers import apply_transfer
from spectral_optax.transfer import transfer
from spectral_optax.transform import (
  MomentumState,
  SpectralTransferState,
  scale_by_momentum,
  scale_by_spectral_newton,
  scale_by_spectral_transfer,
  scale_to_rms,
)

__version__ = '0.1.0'

__all__ = [
  # The optimizer and its parts.
  'spectral_newton',
  'scale_by_spectral_newton',
  'scale_by_momentum',
  'scale_by_spectral_transfer',
  'scale_to_rms',
  'MomentumState',
  'SpectralTransferState',
  # The map.
  'transfer',
  'apply_transfer',
  # Which parameter is which.
  'weight_dimension_numbers',
  'layer_types',
  'PUBLISHED_ALPHA',
  # α measured while training.
  'measured_alpha',
  'MeasuredAlphaState',
  # Measuring curvature.
  'curvature',
]
