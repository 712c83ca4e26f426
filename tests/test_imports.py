"""Dependencies run one way only."""

import ast
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / 'spectral_optax'
# Each may import those to its left.
ORDER = ('transfer', 'solvers', 'layout', 'exponents', 'transform', 'optimizer', '__init__')


def room(path: pathlib.Path) -> str:
  top = path.relative_to(PACKAGE).parts[0]
  return top.removesuffix('.py')


def imported_rooms(path: pathlib.Path) -> set[str]:
  rooms = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == 'spectral_optax':
      names = [f'spectral_optax.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module or '']
    else:
      continue
    rooms |= {n.split('.')[1] for n in names if n.startswith('spectral_optax.')}
  return rooms


def test_dependencies_run_one_way():
  files = list(PACKAGE.rglob('*.py'))
  assert {room(f) for f in files} == set(ORDER)
  for file in files:
    allowed = set(ORDER[: ORDER.index(room(file)) + 1])
    assert imported_rooms(file) <= allowed, file


def test_the_library_needs_jax_and_optax_alone():
  known = {'jax', 'numpy', 'optax', 'spectral_optax'}
  for file in PACKAGE.rglob('*.py'):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Import):
        tops = {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        tops = {(node.module or '').split('.')[0]}
      else:
        continue
      assert tops <= known | sys.stdlib_module_names, file
