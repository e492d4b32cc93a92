"""What the Hopper kernels have in common: programs of consumers that a producer feeds.

A program serves one list or more. Each list has consumers, warpgroups of 64 rows, and rings of
slots in shared memory; one more warpgroup fills the slots by TMA. A consumer waits until a slot is
full, and says when it is free again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device
from pallas_kernels.problem import Inputs, Problem

ROWS = 64  # of a wgmma, and so of a warpgroup


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How a kernel is built.

  lists: how many a program serves. stages: slots of a ring, at least 2. width: listed blocks that a
  step takes (forward).
  """

  lists: int = 2
  stages: int = 2
  width: int = 1


def registers(consumers: int) -> tuple[int, int]:
  """Registers of a thread of each consumer, and of the producer.

  A program starts with all of a multiprocessor's registers, the same for each thread. More than
  those are never granted: the kernel would wait for ever.
  """
  start = 65536 // (128 * (consumers + 1)) // 8 * 8
  producer = 40 if consumers < 3 else 24
  return min((start * (consumers + 1) - producer) // consumers // 8 * 8, 240), producer


def tile(shape: tuple[int, ...], dtype) -> Any:
  """Shared memory for tiles that wgmma and TMA can both use."""
  transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def transpose(ref):
  """The transposed view of a tile."""
  return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def columns(x, shape):
  """Repeats a value per row over the columns of `shape`."""
  return lax.broadcast_in_dim(x, shape, [0])


def rows(x, shape):
  """Repeats a value per column over the rows of `shape`."""
  return lax.broadcast_in_dim(x, shape, [1])


def place(shape, axis):
  """Number of each element along an axis of a product's result."""
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def product(problem: Problem, acc, a, b, scratch=None):
  """`acc` plus the product of registers `a` and tile `b`; waits for it.

  The interpreter takes no accumulator that holds anything and no left side in registers, so there
  it goes by way of `scratch`.
  """
  if problem.interpret:
    scratch[...] = a
    plgpu.commit_smem()

    def multiply(ref):
      plgpu.wgmma(ref, scratch, b)
      return ref[...]

    return acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, jnp.float32))

  def add(ref):
    ref[...] = acc
    plgpu.wgmma(ref, a, b)
    return ref[...]

  return pl.run_scoped(add, plgpu.ACC(acc.shape, jnp.float32))


def tiles_product(a, b):
  """The product of two tiles; waits for it."""

  def multiply(ref):
    plgpu.wgmma(ref, a, b)
    return ref[...]

  return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


class Stream:
  """Tiles that are fetched and used together: one ring a list.

  buffers: references `[lists * stages, ...]`; full, free: their barriers.
  """

  def __init__(self, stages: int, buffers, full, free):
    self.stages, self.buffers, self.full, self.free_ = stages, buffers, full, free

  def slot(self, rank, step):
    return rank * self.stages + lax.rem(step, self.stages)

  def take(self, rank, step):
    """Waits for the tiles of a step of a list; their references."""
    at = self.slot(rank, step)
    plgpu.barrier_wait(self.full.at[at])
    refs = [x.at[at] for x in self.buffers]
    return refs[0] if len(refs) == 1 else refs

  def held(self, rank, step):
    """The one tile of a step that was taken before."""
    return self.buffers[0].at[self.slot(rank, step)]

  def free(self, rank, step):
    """Says that a consumer does not need them any more."""
    plgpu.barrier_arrive(self.free_.at[self.slot(rank, step)])

  def wait_free(self, rank, step):
    """Waits until no consumer needs the tiles of a step any more."""
    plgpu.barrier_wait(self.free_.at[self.slot(rank, step)])


def produce(
  streams: list[Stream], totals: list[Any], fetch: Callable[[int, Any, int, list, Any], None]
):
  """Fills the rings of all lists, step by step.

  totals: steps of each list. fetch: starts the copies of (stream, rank, step) to buffers, which
  arrive at a barrier.
  """
  stages = streams[0].stages

  def fill(rank, step):
    for number, stream in enumerate(streams):
      pl.when(step >= stages)(functools.partial(stream.wait_free, rank, step))
      at = stream.slot(rank, step)
      fetch(number, rank, step, [x.at[at] for x in stream.buffers], stream.full.at[at])

  @pl.loop(0, functools.reduce(jnp.maximum, totals))
  def _(step):
    for rank, total in enumerate(totals):
      pl.when(step < total)(functools.partial(fill, rank, step))

  # The last use of every slot is awaited, so that no program ends with a barrier in flight.
  @pl.loop(0, stages)
  def _(i):
    for rank, total in enumerate(totals):

      @pl.when(i < total)
      def _(rank=rank, total=total):
        for stream in streams:
          stream.wait_free(rank, total - 1 - i)


def halved(programs: int, consumers: int) -> int:
  """How many programs, the last ones, are run as two of one consumer each.

  As whole ones they would run alone at the end and leave most multiprocessors without work.
  """
  cores = device.multiprocessors()
  last = programs % cores
  return last if consumers == 2 and 2 * last <= cores else 0


def split_half(programs: int, halves: int):
  """The program to do the work of, and whether a consumer has a part in it.

  programs: whole ones, of which the last `halves` are run as two.
  """
  n = lax.axis_index("n")
  if not halves:
    return n, lambda wg: jnp.bool_(True)
  whole = n < programs - halves
  half = n - (programs - halves)
  work = lax.select(whole, n, programs - halves + half // 2)
  return work, lambda wg: whole | (half % 2 == wg)


def split_programs(n, heads: int, served: int, lists: int):
  """What program `n` serves: sample, head, and functions of a list's rank in it.

  The first gives the block that a list belongs to, the second whether it is this program's own: the
  last program may have lists to spare, which repeat the last block and store nothing. Programs of a
  head are neighbours, so that its keys stay in the cache.
  """
  groups = -(-served // lists)
  group, head, batch = n % groups, (n // groups) % heads, n // (groups * heads)

  def block_of(rank):
    return jnp.minimum(group * lists + rank, served - 1)

  def is_own(rank):
    return group * lists + rank < served

  return batch, head, block_of, is_own


def run_warpgroups(consumers: int, consume, produce):
  """The two roles of a program's warpgroups: consumers by number, and the producer."""
  wg = lax.axis_index("wg")
  many, few = registers(consumers)

  @pl.when(wg < consumers)
  def _():
    plgpu.set_max_registers(many, action="increase")
    consume(wg)

  @pl.when(wg == consumers)
  def _():
    plgpu.set_max_registers(few, action="decrease")
    produce()


def launch(
  problem: Problem, kernel, arrays: dict[str, Any], out_type, programs, consumers, scratch
):
  """Runs `kernel(refs, outputs, scratch)` with references by name."""
  interpret = {}
  if problem.interpret:
    interpret["interpret"] = plgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined]
  given = {name: x for name, x in arrays.items() if x is not None}

  def body(refs, *rest):
    outputs = dict(zip(out_type, rest))
    kernel(refs, outputs, dict(zip(scratch, rest[len(out_type) :])))

  out = plgpu.kernel(
    body,
    out_type=tuple(out_type.values()),
    grid=(programs,),
    grid_names=("n",),
    num_threads=consumers + 1,
    thread_name="wg",
    scratch_types=tuple(scratch.values()),
    # Said in full, as the defaults differ between releases.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    **interpret,
  )(given)
  return dict(zip(out_type, out))


class Keys:
  """Blocks of keys and values in one buffer or two, of one sample and head."""

  def __init__(self, problem: Problem, inputs: Inputs, refs, batch, head):
    self.block_k, self.refs, self.batch, self.head = problem.block_k, refs, batch, head
    self.older = inputs.past_blocks(problem.block_k)
    self.has_past = inputs.past_k is not None
    self.past_end: Any = refs["past_length"][batch] if self.has_past else None
    self.end = refs["length"][batch] + self.older * problem.block_k

  def valid(self, block):
    """Keys of a block that count; may be negative, or more than the block."""
    end = self.end
    if self.has_past:
      end = lax.select(block < self.older, self.past_end, end)
    return end - block * self.block_k

  def each_buffer(self, block, do):
    """Calls `do(prefix, rows)` with the buffer that holds a block, and the block's rows in it."""

    def call(prefix, first):
      do(prefix, pl.ds((block - first) * self.block_k, self.block_k))

    if self.has_past:
      pl.when(block < self.older)(lambda: call("past_", 0))
      pl.when(block >= self.older)(lambda: call("", self.older))
    else:
      call("", 0)

  def fetch(self, which, block, target, barrier):
    """Starts the copy of a block of keys ("k") or values ("v")."""

    def copy(prefix, rows):
      source = self.refs[prefix + which].at[self.batch, rows, self.head]
      plgpu.copy_gmem_to_smem(source, target, barrier)

    self.each_buffer(block, copy)
