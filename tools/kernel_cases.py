"""Random calls of block-sparse attention, and their timing: for the benchmark and the GPU check."""

import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import attention
from pallas_kernels.problem import Inputs, Problem


class Size(NamedTuple):
  """A call: batch, heads, head dimension, queries, room for past keys, current keys."""

  b: int = 1
  h: int = 12
  d: int = 128
  s: int = 4680
  past: int = 9360
  n: int = 4680


STREAM = Size()  # a chunk of 832 x 480 pixels in the 1.3B model
ONE_BUFFER = STREAM._replace(past=0, n=14040)
# The streaming size in small, for machines that are no match for it.
SMALL = Size(h=2, d=64, s=300, past=200, n=250)


def draw(
  size: Size, ratio: float, block_q=64, block_k=64, dtype=jnp.bfloat16, seed=0, valid=None
) -> Inputs:
  """Standard normal tensors and lists of random distinct blocks, in ascending order.

  ratio: share of the blocks that is listed. valid: numbers of valid current and past keys, for
    each sample; all by default. Every list that has room for it ends with the last block, which is
    ragged.
  """
  r = np.random.default_rng(seed)
  b, h, d = size.b, size.h, size.d
  keys = jax.random.split(jax.random.key(seed), 5)
  q, k, v, past_k, past_v = (
    jax.random.normal(key, (b, rows, h, d), dtype)
    for key, rows in zip(keys, (size.s, size.n, size.n, size.past, size.past), strict=True)
  )
  nq = pallas_kernels.num_blocks(size.s, block_q)
  blocks = sum(pallas_kernels.num_blocks(x, block_k) for x in (size.past, size.n))
  kept = max(1, int(ratio * blocks))
  index = r.permuted(np.broadcast_to(np.arange(blocks - 1), (b, h, nq, blocks - 1)), axis=-1)
  last = np.full((b, h, nq, 1), blocks - 1)
  index = np.sort(np.concatenate([index[..., : kept - 1], last], axis=-1), axis=-1)
  length, past_length = valid or ([size.n] * b, [size.past] * b)
  ints = lambda x: jnp.asarray(np.array(x), jnp.int32)
  return Inputs(
    q, k, v,
    past_k if size.past else None, past_v if size.past else None,
    ints(index), jnp.full((b, h, nq), kept, jnp.int32), ints(length),
    ints(past_length) if size.past else None,
  )  # fmt: skip


def problem(size: Size, backend: str, block_q=64, block_k=64, past_gradient=True) -> Problem:
  """The problem with the default scale."""
  return Problem(size.d**-0.5, block_q, block_k, backend, past_gradient)


def available(size: Size, backends: Sequence[str], dtype=jnp.bfloat16) -> dict[str, str | None]:
  """Why each backend cannot serve calls of a size here; None where it can."""
  inputs = draw(size._replace(s=64, past=0, n=64), 1.0, dtype=dtype)
  return {
    name: attention.BACKENDS[name].unsupported(problem(size, name), inputs) for name in backends
  }


def commit() -> str:
  """Commit of the working tree, if git knows."""
  try:
    run = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def milliseconds(call: Callable, sets: Sequence[Any], calls: int = 40, repeats: int = 7) -> float:
  """Median time of a call, as the device sees it: many are queued, over changing inputs."""
  run = jax.jit(call)
  jax.block_until_ready([run(x) for x in sets])
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready([run(sets[i % len(sets)]) for i in range(calls)])
    times.append((time.perf_counter() - start) / calls)
  return 1e3 * statistics.median(times)


def milliseconds_in_one(call: Callable, sets: Sequence[Any], repeats: int = 15) -> float:
  """Median time of a call among many in one program, one for each set, on the device alone.

  For calls so short that the host could not launch them fast enough: the device is given a large
  product first, during which the host launches all of them. The time with fewer calls is
  subtracted, so that neither the product nor the start of a program counts.
  """
  n = 8192 if jax.default_backend() == "gpu" else 128
  few = len(sets) // 4
  filler = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
  product = jax.jit(lambda x: functools.reduce(lambda y, _: (y @ x) / n**0.5, range(8), x))
  run = jax.jit(lambda sets: [call(x) for x in sets])

  def seconds(sets):
    start = time.perf_counter()
    jax.block_until_ready((product(filler), run(sets)))
    return time.perf_counter() - start

  seconds(sets), seconds(sets[:few])
  apart = [seconds(sets) - seconds(sets[:few]) for _ in range(repeats)]
  return 1e3 * statistics.median(apart) / (len(sets) - few)
