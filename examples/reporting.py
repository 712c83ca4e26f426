"""What an example or a benchmark writes down: versions, machine, figures."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from typing import Any

import jax

import spectral_optax


def environment() -> dict[str, Any]:
  """Versions and machine."""
  packages = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
  return {
    'python': platform.python_version(),
    'spectral_optax': spectral_optax.__version__,
    **{name: importlib.metadata.version(name) for name in packages},
    'backend': jax.default_backend(),
    'device_kind': jax.devices()[0].device_kind,
    'cpu_count': os.cpu_count(),
    'platform': f'{platform.system()} {platform.machine()}',
    'openblas_threads': os.environ.get('OPENBLAS_NUM_THREADS', ''),
  }


def write_json(path: pathlib.Path, content: Any) -> None:
  """Without NaN and infinity, which JSON does not have: null. A list of numbers is one line."""

  def clean(x: Any) -> Any:
    if isinstance(x, dict):
      return {str(k): clean(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
      return [clean(v) for v in x]
    return x if not isinstance(x, float) else float(f'{x:.6g}') if math.isfinite(x) else None

  text = json.dumps(clean(content), indent=1, ensure_ascii=False)
  text = re.sub(r'\[[-\d.eE+,\snul]*\]', lambda flat: ' '.join(flat.group().split()), text)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text + '\n', encoding='utf-8')
