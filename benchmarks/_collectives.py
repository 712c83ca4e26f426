"""What a compiled program sends between devices, read from its optimised HLO.

    bytes_sent(compiled.as_text())        # By kind, of one device in one run

With k devices in a group and b bytes of result on each, a device sends: all-to-all and
collective-permute (k - 1)/k b and b, all-gather (k - 1)/k b, reduce-scatter (k - 1) b, all-reduce
(one of each) 2 (k - 1)/k b. Loops are counted as often as they say that they run.
"""

import collections
import functools
import math
import re
from collections.abc import Callable

KINDS = ('all-to-all', 'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute')
SIZES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8}
SIZES |= {'f64': 8, 's32': 4, 'u32': 4, 'f32': 4, 'c64': 8}
FACTORS: dict[str, Callable[[int], float]] = {
  'all-to-all': lambda k: (k - 1) / k,
  'all-gather': lambda k: (k - 1) / k,
  'all-reduce': lambda k: 2 * (k - 1) / k,
  'reduce-scatter': lambda k: k - 1,
  'collective-permute': lambda k: 1,
}

COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$', re.MULTILINE)
OPERATION = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\(')
ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
LOOP = re.compile(r' while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
BRANCHES = re.compile(
  r' conditional\(.*(?:branch_computations=\{([^}]*)\}'
  r'|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+))'
)
CALLS = re.compile(r'(?:to_apply|calls)=%?([\w.-]+)')
BOUND = re.compile(r' (%?[\w.-]+) = s32\[\]\S* constant\((\d+)\)')
LESS = re.compile(r' compare\([^)]*?(%?[\w.-]+)\), direction=LT')


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  """Lines of instructions by computation, and which one is the whole program."""
  found, entry = {}, ''
  for head in COMPUTATION.finditer(hlo):
    end = hlo.find('\n}', head.end())
    found[head[2]] = [line for line in hlo[head.end() : end].splitlines() if ' = ' in line]
    entry = head[2] if head[1] else entry
  return found, entry


def trips(line: str, condition: list[str]) -> int:
  """How often a loop runs; 1 if it does not look like one that counts."""
  if known := TRIPS.search(line):
    return int(known[1])
  bounds = {m[1].lstrip('%'): int(m[2]) for x in condition for m in BOUND.finditer(f' {x}')}
  less = [m[1].lstrip('%') for x in condition for m in LESS.finditer(x)]
  return bounds.get(less[0], 1) if len(less) == 1 else 1


def group_size(line: str) -> int:
  """Devices that exchange with one another."""
  if lists := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return len(lists[1].split(','))
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]', line):
    return int(iota[2])
  if mesh := re.search(r"replica_groups=mesh\['([^']*)'?([^\]]*)\]\S* *\{([^}]*)\}", line):
    sizes = dict(re.findall(r"'?([\w]+)'?=(\d+)", f"'{mesh[1]}'{mesh[2]}"))
    return math.prod(
      int(sizes[name]) for name in re.findall(r"'?([\w]+)'?", mesh[3]) if name in sizes
    )
  return 0


def size_of(types: str) -> int:
  """Bytes of all arrays in an HLO type."""
  return sum(
    SIZES.get(name, 4) * math.prod(int(n) for n in shape.split(',') if n)
    for name, shape in ARRAY.findall(types)
  )


def bytes_sent(hlo: str, devices: int, branch: Callable = max) -> dict[str, int]:
  """Bytes that one device sends in one run, by kind of collective.

  Args:
    hlo: Of the compiled program.
    devices: That it runs on: where an operation names no groups, all are one.
    branch: Which branch of a condition counts: `max` or `min` in bytes.
  """
  parts, entry = computations(hlo)

  @functools.cache
  def of(name: str) -> collections.Counter:
    total = collections.Counter()
    for line in parts.get(name, ()):
      if loop := LOOP.search(line):
        for _ in range(trips(line, parts.get(loop[1], []))):
          total += of(loop[2])
      elif branches := BRANCHES.search(line):
        names = branches[1].split(', ') if branches[1] else branches.groups()[1:]
        total += branch((of(n.lstrip('%')) for n in names), key=lambda c: c.total())
      elif operation := OPERATION.search(line):
        kind, result = operation[2], operation[1]
        size = size_of(result)
        if operation[3] and kind in ('all-gather', 'collective-permute'):
          # (operand, result) of what is only begun here, and then numbers of its own.
          arrays = [size_of(m[0]) for m in ARRAY.finditer(result)]
          size = max(arrays) if kind == 'all-gather' else arrays[0]
        total[kind] += round(size * FACTORS[kind](group_size(line) or devices))
      else:
        for called in CALLS.findall(line):
          total += of(called)
    return total

  return dict(of(entry))
