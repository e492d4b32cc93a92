"""One update of one network: gradients, optimizer, average; a bad one is left out.

What an update changes is one pytree, a `Part`, whose memory is donated.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from hfjax import parallel

# `loss(params, fixed, batch, key) -> (loss, figures)`; only params carry gradients.
Loss = Callable[[Any, Any, Any, PRNGKeyArray], tuple[Array, dict[str, Array]]]
COUNTS = ("updates", "skipped", "in_row")  # of a `Part`


class Part(NamedTuple):
  """A network under training.

  params: float32. ema: moving average of them, or None. updates: that were made. skipped: those
  left out, as a loss or gradient was not finite, and in_row how many of them since a good one.
  """

  params: Any
  opt: Any
  ema: Any
  updates: Int[Array, ""]
  skipped: Int[Array, ""]
  in_row: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Average:
  """Moving average of weights: `decay ema + (1 - decay) params` after each update from `start` on.

  Until then it is the weights themselves. start: in updates.
  """

  decay: float = 0.99
  start: int = 0

  def __post_init__(self):
    if not 0 <= self.decay < 1 or self.start < 0:
      raise ValueError(
        f"The average has a decay of {self.decay} from update {self.start} on; give a decay in "
        "[0, 1) and a start of at least 0."
      )


def init_part(
  params: Any, optimizer: optax.GradientTransformation, average: Average | None
) -> Part:
  """A network that was not updated yet; its average is a copy."""
  zero = lambda: jnp.zeros((), jnp.int32)  # buffers of their own, to be donated
  ema = None if average is None else jax.tree.map(jnp.copy, params)
  return Part(params, optimizer.init(params), ema, zero(), zero(), zero())


def make_update(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  average: Average | None,
  mesh: Mesh,
  like: Part,
  smallest: int = parallel.SMALLEST,
) -> Any:
  """`update(part, fixed, batch, key) -> (part, figures)`, jitted; the part is donated.

  batch: leaves `[k b ...]`: gradients of k microbatches, each with a key of its own, are averaged.
  figures: those of the loss, averaged over the microbatches that have them, `loss`,
  `gradient_norm` before clipping, `parameter_norm`, `finite`, the part's `COUNTS` after the update,
  and `ema_distance`, the norm of parameters minus their average.
  like: shapes of the part, from which its shardings derive.
  """

  def gradients(params, fixed, batch, key):
    def one(total, inputs):
      microbatch, number = inputs
      (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(
        params, fixed, microbatch, jax.random.fold_in(key, number)
      )
      figures = {"loss": value, **figures}
      return jax.tree.map(jnp.add, total, grads), figures

    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:  # no sum is held beside the gradients
      zero = jax.tree.map(lambda x: x[0], batch)
      (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(
        params, fixed, zero, jax.random.fold_in(key, 0)
      )
      return grads, {"loss": value, **figures}
    total = jax.tree.map(jnp.zeros_like, params)
    total, figures = jax.lax.scan(one, total, (batch, jnp.arange(count)))
    means = {k: jnp.nanmean(x.astype(jnp.float32)) for k, x in figures.items() if k != "loss"}
    means["loss"] = figures["loss"].mean()  # one that is not finite shall be seen
    return jax.tree.map(lambda x: x / count, total), means

  def update(part: Part, fixed, batch, key):
    grads, figures = gradients(part.params, fixed, batch, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(figures["loss"])
    changes, opt = optimizer.update(grads, part.opt, part.params)
    params = optax.apply_updates(part.params, changes)
    finite &= jnp.isfinite(optax.tree.norm(params))  # what an update makes of finite gradients
    updates = part.updates + 1
    ema = part.ema
    if average is not None:
      decay = jnp.where(updates > average.start, average.decay, 0.0)
      ema = optax.incremental_update(params, ema, 1 - decay)
    keep = lambda new, old: jnp.where(finite, new, old)
    params, opt, ema, updates = jax.tree.map(
      keep, (params, opt, ema, updates), (part.params, part.opt, part.ema, part.updates)
    )
    bad = ~finite
    new = Part(params, opt, ema, updates, part.skipped + bad, jnp.where(bad, part.in_row + 1, 0))
    figures |= {
      "gradient_norm": norm,
      "parameter_norm": optax.tree.norm(params),
      "finite": finite,
      **{name: getattr(new, name) for name in COUNTS},
    }
    if average is not None:
      apart = jax.tree.map(lambda a, b: a - b, params, ema)
      figures["ema_distance"] = optax.tree.norm(apart)
    return new, figures

  where = parallel.shardings(mesh, like, smallest)
  return jax.jit(update, donate_argnums=0, out_shardings=(where, parallel.replicated(mesh)))
