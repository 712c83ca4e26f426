"""LAPACK calls that never run batched on a CPU.

jaxlib 0.10 runs a *batched* LAPACK call (batch > 1) on the thread pool that runs
the program and blocks in it; when as many such calls can run at once as the pool
has threads, the program waits for ever. Calls of batch one do not do that. So on
a CPU we loop over the batch, and keep it a loop when a user puts `vmap` around
us. Elsewhere the batched call is both safe and faster.
"""

from collections.abc import Callable
from typing import Any

import jax


def in_a_loop(function: Callable[..., Any]) -> Callable[..., Any]:
  """Maps `function`, of single matrices, over the leading axis of its arguments in a loop."""
  # Without this an outer `vmap` would turn the loop's body into a batched call.
  sequential = jax.custom_batching.sequential_vmap(function)

  def loop(*batched):
    if batched[0].shape[0] == 1:
      return jax.tree.map(lambda x: x[None], sequential(*(x[0] for x in batched)))
    return jax.lax.map(lambda single: sequential(*single), batched)

  return loop


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
  """Maps `function` over the leading axis of its arguments; on a CPU in a loop.

  Args:
    function: Takes and returns single matrices; may call LAPACK.

  Returns:
    A function of the same arguments, each with one leading batch axis.
  """
  loop = in_a_loop(function)

  def call(*batched):
    return jax.lax.platform_dependent(*batched, cpu=loop, default=jax.vmap(function))

  return call
