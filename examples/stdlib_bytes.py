"""Bytes of Python's standard library: real text that every machine has."""

import dataclasses
import functools
import pathlib
import sysconfig

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Sequences of `context` bytes with what follows each, from one text.

  Attributes:
    text: uint8.
    context: How many bytes a network sees.
    outputs: How many classes to tell apart: 2, 4, ... 256, the leading bits of the next
      byte; or more, of the next two bytes the `outputs - 1` most common pairs, and all others.
  """

  text: np.ndarray
  context: int
  outputs: int

  def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and classes, int32, both (count, context)."""
    start = rng.integers(len(self.text) - self.context - 2, size=count)
    windows = self.text[start[:, None] + np.arange(self.context + 2)].astype(np.int32)
    following = windows[:, 1:-1]
    if self.outputs <= 256:
      return windows[:, :-2], following * self.outputs // 256
    return windows[:, :-2], self._pair_classes[256 * following + windows[:, 2:]]

  @functools.cached_property
  def _pair_classes(self) -> np.ndarray:
    text = self.text.astype(np.int64)
    counts = np.bincount(256 * text[:-1] + text[1:], minlength=2**16)
    common = np.argsort(-counts, kind='stable')[: self.outputs - 1]
    classes = np.full(2**16, self.outputs - 1, np.int32)
    classes[common] = np.arange(self.outputs - 1)
    return classes


def load(context: int, outputs: int = 256, limit: int = 2_000_000) -> Bytes:
  """The modules at the top of the library, by name, as many bytes as `limit`."""
  folder = pathlib.Path(sysconfig.get_paths()['stdlib'])
  text = b''
  for path in sorted(folder.glob('*.py')):
    text += path.read_bytes()
    if len(text) >= limit:
      break
  if len(text) < 100 * context:
    raise FileNotFoundError(f'{folder} has too little Python source to train on.')
  return Bytes(np.frombuffer(text[:limit], np.uint8), context, outputs)


def hold_out(data: Bytes, blocks: int = 64, every: int = 16) -> tuple[Bytes, Bytes]:
  """Text to train on, and what is held out of it: one block in `every`, from all over.

  Modules differ; the end of the text alone would be other modules than those trained on.
  """
  parts = np.array_split(data.text, blocks)
  held = [i for i in range(blocks) if i % every == every // 2]
  join = lambda indices: np.concatenate([parts[i] for i in indices])
  rest = [i for i in range(blocks) if i not in held]
  return tuple(dataclasses.replace(data, text=join(of)) for of in (rest, held))  # type: ignore
