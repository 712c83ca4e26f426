"""Bytes that a program sends: as by hand."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
PROGRAM = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}

%few (p: f32[8]) -> f32[8] {
  %c = bf16[16]{0} collective-permute(%p), channel_id=2, source_target_pairs={{0,1},{1,0}}
}

%many (p: f32[8]) -> f32[8] {
  %g = f32[1000]{0} all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, {"known_trip_count":{"n":"5"}}
  %i = f32[8]{0} conditional(%q, %a, %a), branch_computations={%few, %many}
  %s = (f32[1,2]{1,0}, f32[1,2]{1,0}) all-to-all(%a, %b), replica_groups=mesh['x'=2,'y'=4] {'x'}
  %b = ((f32[4]{0}), f32[16]{0}) all-gather-start(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}
}
"""


@pytest.fixture
def collectives(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module('_collectives')


@pytest.mark.parametrize(
  ('branch', 'conditional'), [(min, {'collective-permute': 32}), (max, {'all-gather': 2000})]
)
def test_bytes_sent(collectives, branch, conditional):
  want = {
    'all-reduce': 5 * 2 * 3 / 4 * 32,  # Five rounds, four devices.
    'all-to-all': 1 / 2 * 16,
    'all-gather': 3 / 4 * 64,
  }
  for kind, size in conditional.items():
    want[kind] = want.get(kind, 0) + size
  assert collectives.bytes_sent(PROGRAM, 8, branch) == want
