"""Dependencies run one way only."""

import ast
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / 'spectral_optax'
# Each may import those to its left.
ORDER = (
  'transfer',
  'solvers',
  'layout',
  'curvature',
  'measured',
  'exponents',
  'update_size',
  'sharding',
  'transform',
  'optimizer',
  '__init__',
)


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


def outside_of_functions(node: ast.AST):
  for child in ast.iter_child_nodes(node):
    yield child
    if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      yield from outside_of_functions(child)


def imported_packages(nodes) -> set[str]:
  tops = set()
  for node in nodes:
    if isinstance(node, ast.Import):
      tops |= {alias.name.split('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      tops.add((node.module or '').split('.')[0])
  return tops - sys.stdlib_module_names


def test_the_library_needs_jax_and_optax_alone():
  known = {'jax', 'numpy', 'optax', 'spectral_optax'}
  # Inside the functions that need them, and nowhere but there.
  optional = {'curvature': {'flax', 'matplotlib', 'rich', 'tqdm'}}
  for file in PACKAGE.rglob('*.py'):
    tree = ast.parse(file.read_text())
    assert imported_packages(outside_of_functions(tree)) <= known, file
    allowed = known | optional.get(room(file), set())
    assert imported_packages(ast.walk(tree)) <= allowed, file
