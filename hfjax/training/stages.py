"""What a step of each stage does: which networks are updated, on which batches, in which order."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from hfjax import parallel
from hfjax.distill.inputs import Texts
from hfjax.distill.objectives import Distillation, Frozen
from hfjax.distill.reconstruction import Reconstruction
from hfjax.distill.supervised import FlowMatching, Regression
from hfjax.models import umt5, wan
from hfjax.training import lora
from hfjax.training.plan import Plan
from hfjax.training.update import Loss, Part, make_update

Batch = dict[str, Any]


def array_of(plan: Plan) -> str | None:
  """What data of a stage hold beside prompts, if anything."""
  if plan.trajectory_shape is not None:
    return "trajectory"
  return {"vae": "video", "flow": "latents"}.get(plan.stage)


class Fixed(NamedTuple):
  """Parameters that an update reads and does not change.

  base: the student's, where adapters are trained. other: what is trained of the other network.
  """

  base: Any
  other: Any
  frozen: Frozen


class Tokens(NamedTuple):
  """Prompts of a batch and the negative prompt, not yet encoded, and how many tokens count."""

  ids: Any
  length: Any
  negative_ids: Any
  negative_length: Any


def loss_of(plan: Plan, part: str) -> Loss:
  """The loss of a part, of what is trained of it."""
  o, low = plan.objective, plan.low

  def whole(trained, fixed: Fixed):
    """The student's parameters."""
    return trained if low is None else lora.merge(fixed.base, trained, low.alpha)

  if isinstance(o, Distillation) and part == "critic":
    return lambda trained, fixed, batch, key: o.critic_loss(
      trained, whole(fixed.other, fixed), fixed.frozen, batch["texts"], key
    )
  if isinstance(o, Distillation):
    return lambda trained, fixed, batch, key: o.generator_loss(
      whole(trained, fixed), fixed.other, fixed.frozen, batch["texts"], key, batch.get("trajectory")
    )
  name = array_of(plan)
  assert name is not None
  if isinstance(o, Reconstruction):
    return lambda trained, fixed, batch, key: o.loss(trained, batch[name], key)
  assert isinstance(o, (FlowMatching, Regression))
  if plan.text is not None:
    assert isinstance(o, FlowMatching)

    def with_text(trained, fixed: Fixed, batch: Batch, key: PRNGKeyArray):
      tokens = batch["texts"]
      rows = encoded(plan, trained["text"], tokens, o.dropped(key, len(tokens.ids)))
      return o.loss(trained["student"], batch[name], Texts(rows, rows), key)

    return with_text
  return lambda trained, fixed, batch, key: o.loss(
    whole(trained, fixed), batch[name], batch["texts"], key
  )


def encoded(
  plan: Plan, params: Any, tokens: Tokens, dropped: Bool[Array, "b"]
) -> Float[Array, "b t w"]:
  """Contexts that a text encoder under training makes of tokens, negative ones where dropped.

  Beside the batch, the negative prompt would be a row more, by which no number of devices divides.
  """
  assert plan.text is not None
  ids = jnp.where(dropped[:, None], tokens.negative_ids, tokens.ids)
  length = jnp.where(dropped, tokens.negative_length, tokens.length)
  rows = umt5.encode(plan.text, params, ids, length, plan.stream.compute_dtype)
  return wan.pad_text(plan.student, rows.astype(jnp.float32))


class Stage:
  """The networks under training, and the steps that change them.

  parts: by name. base: the student's parameters, where adapters are trained.
  """

  def __init__(self, plan: Plan, parts: dict[str, Part], base: Any, frozen: Frozen):
    self.plan, self.parts, self.base, self.frozen = plan, parts, base, frozen
    self.updates = {name: self.make(plan, name) for name in parts}
    # A key for each network and step; nothing of it needs to be saved.
    self._key = jax.jit(
      lambda step, number: jax.random.fold_in(
        jax.random.fold_in(jax.random.key(plan.config.seed), step), number
      ),
      out_shardings=parallel.replicated(plan.mesh),
    )

  @staticmethod
  def make(plan: Plan, part: str) -> Any:
    """The jitted update of a part; see `make_update`."""
    return make_update(
      loss_of(plan, part), plan.optimizer_of(part), plan.average_of(part), plan.mesh,
      plan.part_shapes(part),
    )  # fmt: skip

  def step(self, number: int, fetch: Callable[[], Batch]) -> dict[str, Mapping[str, Any]]:
    """Makes step `number`, counted from 0; figures by part, still on the device."""
    figures = {}
    for index, name in enumerate(self.parts):
      if name == "student" and number % self.every:
        continue
      update, key = self.updates[name], self._key(number, index)
      part, figures[name] = update(self.parts[name], self.fixed(name), fetch(), key)
      self.parts[name] = part
    return figures

  @property
  def every(self) -> int:
    """Steps from one update of the student to the next."""
    return self.plan.config.distill.generator_every if self.plan.distills else 1

  def fixed(self, name: str) -> Fixed:
    """What an update of a part reads."""
    other = {"student": "critic", "critic": "student"}.get(name)
    trained = self.parts[other].params if other in self.parts else None
    return Fixed(self.base, trained, self.frozen)

  def student(self, averaged: bool = False) -> Any:
    """The student's parameters, adapters merged."""
    low, trained = self.plan.low, self.trained("student", averaged)
    if self.plan.text is not None:
      return trained["student"]
    return trained if low is None else _merged(self.base, trained, low.alpha)

  def text(self, averaged: bool = False) -> Any:
    """The parameters of the text encoder that is trained with the student."""
    return self.trained("student", averaged)["text"]

  def trained(self, name: str, averaged: bool = False) -> Any:
    """What is trained of a part, or its average."""
    part = self.parts[name]
    return part.ema if averaged else part.params


_merged = jax.jit(lora.merge, static_argnums=2)


def put(plan: Plan, arrays: Mapping[str, Any], texts: Texts | Tokens | None) -> Batch:
  """A batch on the devices, `[k b ...]`, of what this process has of it `[n ...]`.

  texts: of the samples, `[n ...]`, and the negative prompt's as `put_negative` gives them.
  """
  parts = plan.config.accumulate

  def place(x: Any) -> Any:
    if not isinstance(x, jax.Array) or jax.process_count() > 1:
      x = np.asarray(x)
    x = x.reshape(parts, len(x) // parts, *x.shape[1:])
    if isinstance(x, jax.Array):  # is on the device already, and the host does not wait for it
      return jax.device_put(x, parallel.batched(plan.mesh, 1))
    return parallel.put_batch(plan.mesh, x, axis=1)

  batch: Batch = {name: place(x) for name, x in arrays.items()}
  if texts is not None:
    batch["texts"] = texts._replace(**{name: place(getattr(texts, name)) for name in _own(texts)})
  return batch


def _own(texts: Texts | Tokens) -> list[str]:
  """Fields that each sample has of its own."""
  return [name for name in texts._fields if not name.startswith("negative")]


def put_negative(plan: Plan, negative: Any) -> Any:
  """What the negative prompt is, `[1 ...]`, for every part of a batch, `[k 1 ...]`."""
  x = np.broadcast_to(np.asarray(negative), (plan.config.accumulate, *np.shape(negative)))
  return jax.device_put(x, parallel.replicated(plan.mesh))


def batch_shapes(plan: Plan) -> Batch:
  """Shapes of a batch, with shardings."""
  c, m, o = plan.config, plan.student, plan.objective
  each = c.batch // c.accumulate
  split, whole = parallel.batched(plan.mesh, 1), parallel.replicated(plan.mesh)

  def struct(*shape: int, dtype: Any = jnp.float32, sharding=split):
    return jax.ShapeDtypeStruct((c.accumulate, *shape), dtype, sharding=sharding)

  if isinstance(o, Reconstruction):
    g, space = plan.stream.geometry, o.vae.space_factor
    shape = (each, o.frames, g.height * space, g.width * space, 3)
    return {"video": struct(*shape, dtype=jnp.uint8)}
  rows = m.text_len
  texts: Any = Texts(struct(each, rows, m.text_dim), struct(1, rows, m.text_dim, sharding=whole))
  if plan.text is not None:
    texts = Tokens(
      struct(each, rows, dtype=jnp.int32), struct(each, dtype=jnp.int32),
      struct(1, rows, dtype=jnp.int32, sharding=whole), struct(1, dtype=jnp.int32, sharding=whole),
    )  # fmt: skip
  name = array_of(plan)
  if name is None:
    return {"texts": texts}
  return {name: struct(each, *(plan.trajectory_shape or plan.latent_shape)), "texts": texts}
