"""Kernels that know neither vmap nor shard_map, made to work under both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def axes_of(args) -> frozenset[str]:
  """Axes of a mesh over which arrays vary, under shard_map."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(args)))


def vary(axes: frozenset[str], args):
  """Arrays as such that vary over all of `axes`."""

  def cast(x):
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, args)


def fold_batch(call: Callable) -> Callable:
  """`call`, of arrays with a batch axis in front, such that `jax.vmap` makes the batch larger.

  Kernels do not say over which axes of a mesh their results vary: over those of the inputs.
  """
  mapped_call = jax.custom_batching.custom_vmap(lambda *args: vary(axes_of(args), call(*args)))

  @mapped_call.def_vmap
  def rule(size, mapped, *args):
    def fold(x, is_mapped):
      x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    out = fold_batch(call)(*jax.tree.map(fold, args, tuple(mapped)))
    out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
    return out, jax.tree.map(lambda _: True, out)

  return mapped_call
