"""What a config comes to before any weights are there: networks, objectives, optimizers, mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import FrozenConfigDict

from hfjax import convert, parallel, pipeline
from hfjax.convert import checkpoint
from hfjax.diffusion import guidance as guiding
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.distill.objectives import Distillation
from hfjax.distill.reconstruction import Reconstruction
from hfjax.distill.supervised import FlowMatching, Regression
from hfjax.models import umt5, vae, wan
from hfjax.models.geometry import Geometry
from hfjax.models.presets import WanConfig
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import VaeConfig
from hfjax.streaming.config import StreamConfig
from hfjax.training import lora
from hfjax.training.config import ConfigError
from hfjax.training.defaults import STAGES
from hfjax.training.optimizers import OptimizerConfig
from hfjax.training.update import Average, Part, init_part

RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class Low:
  """Low-rank adapters that are trained in place of the student; see `training.lora`."""

  rank: int
  alpha: float
  targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A config, checked, as the objects that training is made of.

  student, critic, teacher, vae: architectures, None where the stage has none.
  text: architecture of the text encoder, where it is trained.
  objective: of the stage.
  """

  config: FrozenConfigDict
  mesh: Mesh
  student: WanConfig
  stream: StreamConfig
  objective: Distillation | FlowMatching | Regression | Reconstruction
  optimizer: OptimizerConfig
  average: Average | None
  critic: WanConfig | None = None
  critic_optimizer: OptimizerConfig | None = None
  teacher: WanConfig | None = None
  vae: VaeConfig | None = None
  text: Umt5Config | None = None
  low: Low | None = None

  @property
  def stage(self) -> str:
    """One of `STAGES`."""
    return self.config.stage

  @property
  def distills(self) -> bool:
    """Whether there are a critic and a teacher."""
    return isinstance(self.objective, Distillation)

  @property
  def causal(self) -> bool:
    """Whether the student is sampled as a stream."""
    return not isinstance(self.objective, FlowMatching) or self.objective.forcing != "none"

  @property
  def frames(self) -> int:
    """Latent frames of training clips."""
    c = self.config
    if isinstance(self.objective, Distillation):
      return self.objective.last * self.stream.geometry.chunk
    if isinstance(self.objective, Reconstruction):
      return (self.objective.frames - 1) // self.objective.vae.time_factor + 1
    return c.flow.frames if self.stage == "flow" else c.ode.frames

  @property
  def trajectory_shape(self) -> tuple[int, int, int, int, int] | None:
    """Of trajectories that are regressed on: states, and those of clips; None if none are."""
    weight = self.objective.regression_weight if isinstance(self.objective, Distillation) else 0
    if not isinstance(self.objective, Regression) and not weight:
      return None
    return (len(self.stream.steps) + 1, self.config.ode.frames, *self.latent_shape[1:])

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    """Of training clips: frames, rows, columns, channels."""
    g = self.stream.geometry
    return (self.frames, g.height, g.width, self.student.out_dim)

  def updates(self, part: str) -> int:
    """Updates of "student" or "critic" in all of training."""
    every = self.config.distill.generator_every if self.distills and part == "student" else 1
    return -(-self.config.steps // every)

  def optimizer_of(self, part: str):
    """The transformation of gradients of "student" or "critic"."""
    chosen = self.critic_optimizer if part == "critic" else self.optimizer
    assert chosen is not None
    return chosen.make(self.updates(part))

  def average_of(self, part: str) -> Average | None:
    """All but the critic's weights are averaged."""
    return None if part == "critic" else self.average

  def shapes(self, network: WanConfig, dtype: Any = jnp.float32) -> Any:
    """Of a transformer's parameters, with shardings."""
    like = _shapes(wan.init_params, network)
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), like)
    return parallel.abstract(self.mesh, tree)

  def trained_shapes(self, part: str) -> Any:
    """Of what is trained of a part: parameters, or adapters, or those of two networks."""
    if part == "autoencoder":
      assert self.vae is not None
      return parallel.abstract(self.mesh, _shapes(vae.init_params, self.vae))
    network = self.critic if part == "critic" else self.student
    assert network is not None
    params = self.shapes(network)
    if part == "student" and self.text is not None:
      text = parallel.abstract(self.mesh, _shapes(umt5.init_params, self.text))
      return {"student": params, "text": text}
    if part == "critic" or self.low is None:
      return params
    low = self.low
    make = lambda: lora.init(params, jax.random.key(0), low.rank, low.targets)
    return parallel.abstract(self.mesh, jax.eval_shape(make))

  def part_shapes(self, part: str) -> Part:
    """Of all that an update of a part changes, with shardings."""
    make = functools.partial(
      init_part, optimizer=self.optimizer_of(part), average=self.average_of(part)
    )
    return parallel.abstract(self.mesh, jax.eval_shape(make, self.trained_shapes(part)))

  @property
  def parts(self) -> tuple[str, ...]:
    """What is trained; the student with its text encoder is one."""
    if isinstance(self.objective, Reconstruction):
      return ("autoencoder",)
    return ("student", "critic") if self.distills else ("student",)


@functools.cache  # takes a second, and is asked for often
def _shapes(init: Callable[[Any, Any], Any], network: Any) -> Any:
  return jax.eval_shape(functools.partial(init, network), jax.random.key(0))


def make_plan(config: FrozenConfigDict) -> Plan:
  """Checks a config and everything that follows from it.

  Raises ConfigError on values that cannot work, CheckpointError on weights that are not there.
  """
  try:
    return _make_plan(config)
  except convert.CheckpointError:
    raise
  except ConfigError:
    raise
  except ValueError as e:
    raise ConfigError(str(e)) from e


def _make_plan(c: FrozenConfigDict) -> Plan:
  if c.stage not in STAGES:
    raise ConfigError(f"The stage is {c.stage!r}; choose one of {', '.join(STAGES)}.")
  for name in ("steps", "batch", "accumulate", "most_skipped"):
    if c[name] < 1:
      raise ConfigError(f"{name} is {c[name]}; it must be at least 1.")
  for group, name in (
    ("checkpoint", "every"), ("checkpoint", "keep"), ("log", "every"), ("data", "made"),
  ):  # fmt: skip
    if c[group][name] < 1:
      raise ConfigError(f"{group}.{name} is {c[group][name]}; it must be at least 1.")
  if c.text.device not in ("default", "cpu"):
    raise ConfigError(f"text.device is {c.text.device!r}; choose default or cpu.")
  if c.data.on_bad not in ("skip", "fail"):
    raise ConfigError(f"data.on_bad is {c.data.on_bad!r}; choose skip or fail.")
  for name, value in (("seed", c.seed), ("validation.seed", c.validation.seed)):
    if not 0 <= value < 2**32:
      raise ConfigError(f"{name} is {value}; give a whole number from 0 to 2^32 - 1.")
  if c.data.prefetch < 0:
    raise ConfigError(f"data.prefetch is {c.data.prefetch}; it must be at least 0.")
  if c.teacher.dtype not in ("bfloat16", "float16", "float32"):
    raise ConfigError(f"teacher.dtype is {c.teacher.dtype!r}; choose bfloat16 or float32.")
  if c.init_ema and not c.init:
    raise ConfigError("init_ema is set and init is not; say with init which run's averages.")
  if c.flow.train_text_encoder and (c.stage != "flow" or c.lora.rank):
    raise ConfigError(
      "flow.train_text_encoder is set, which the stage flow knows without adapters only; leave it "
      "out, or set stage to flow and lora.rank to 0."
    )
  if c.optimizer.kind == "muon" and (c.stage == "vae" or c.lora.rank):
    raise ConfigError(
      "optimizer.kind is muon, which moves matrices of transformers, and an autoencoder or "
      "adapters are to be trained; set it to adam."
    )
  if c.stage == "vae" and c.autoencoder.decoder_only and c.optimizer.decay:
    raise ConfigError(
      f"optimizer.decay is {c.optimizer.decay}, by which an encoder that shall stay would shrink "
      "(autoencoder.decoder_only); set it to 0."
    )
  if c.compute.unroll < 1:
    raise ConfigError(f"compute.unroll is {c.compute.unroll}; it must be at least 1.")
  if c.batch % c.accumulate:
    raise ConfigError(
      f"A batch of {c.batch} does not divide into {c.accumulate} parts; make batch a multiple of "
      "accumulate."
    )
  mesh = parallel.make_mesh(c.compute.fsdp)
  parallel.check_batch(mesh, c.batch // c.accumulate)
  begins = c.init and c.stage != "vae"
  student = dataclasses.replace(
    architecture(c.init if begins else c.student.weights, "init" if begins else "student.weights"),
    linear=c.student.linear,
  )
  stream = StreamConfig(
    student, Geometry(patch=student.patch, **dict(c.geometry)), remat=c.compute.remat,
    dtype=c.compute.dtype, backend=c.compute.backend, **dict(c.denoising),
  )  # fmt: skip
  autoencoder = vae_architecture(c.init if c.init and c.stage == "vae" else c.vae.weights)
  average = None
  if c.ema.decay:
    every = c.distill.generator_every if c.stage in ("dmd", "hybrid") else 1
    average = Average(c.ema.decay, -(-c.ema.start // every))
  low = None
  if c.lora.rank:
    if not (0 < c.lora.rank <= student.dim and 0 <= c.lora.alpha < float("inf")):
      raise ConfigError(
        f"lora.rank is {c.lora.rank} and lora.alpha {c.lora.alpha}; give a rank from 1 to the "
        f"model's width of {student.dim}, and an alpha of at least 0."
      )
    low = Low(c.lora.rank, float(c.lora.alpha or c.lora.rank), tuple(c.lora.targets))
  common: dict[str, Any] = {
    "config": c, "mesh": mesh, "student": student, "stream": stream, "average": average,
    "vae": autoencoder, "optimizer": OptimizerConfig(**dict(c.optimizer)), "low": low,
  }  # fmt: skip
  if c.stage == "vae":
    return _checked(_autoencoding(c, common))
  if c.stage == "flow":
    f, g = c.flow, stream.geometry
    if f.train_text_encoder:
      common["text"] = text_architecture(c.text.weights, student)
    objective: Any = FlowMatching(
      student, f.shift, f.weighted, f.drop_text, f.forcing, g.chunk, f.context_noise,
      c.compute.dtype, c.compute.remat, c.compute.unroll,
    )  # fmt: skip
    if f.frames < 1 or (f.forcing != "none" and f.frames % g.chunk):
      raise ConfigError(
        f"flow.frames is {f.frames}; give at least 1, and with teacher forcing a multiple of the "
        f"chunk of {g.chunk}."
      )
    return _checked(Plan(objective=objective, **common))
  alone = int(c.stage == "ode" and c.ode.first_clean)
  regresses = c.stage == "ode" or (c.stage in ("dmd", "hybrid") and c.distill.regression_weight)
  whole = c.ode.frames > alone and (c.ode.frames - alone) % stream.geometry.chunk == 0
  if regresses and not whole:
    raise ConfigError(
      f"ode.frames is {c.ode.frames}; give a multiple of the chunk of {stream.geometry.chunk}"
      f"{', plus 1 for the clean frame' if alone else ''}."
    )
  if c.stage == "ode":
    teacher = architecture(c.teacher.weights, "teacher.weights") if c.data.path == "made" else None
    objective = Regression(stream, c.ode.first_clean, c.ode.forcing, c.compute.unroll)
    return _checked(Plan(objective=objective, teacher=teacher, **common))
  critic = architecture(c.critic.weights, "critic.weights")
  teacher = architecture(c.teacher.weights, "teacher.weights")
  options = {k: v for k, v in c.distill.items() if k != "generator_every"}
  for name in ("reflow_stop", "score_shift", "times_shift"):
    options[name] = options[name] or None
  if c.distill.generator_every < 1:
    raise ConfigError(
      f"distill.generator_every is {c.distill.generator_every}; it must be at least 1."
    )
  objective = Distillation(
    stream, dataclasses.replace(critic, linear=False), dataclasses.replace(teacher, linear=False),
    autoencoder, dtype=c.compute.dtype, remat=c.compute.remat, unroll=c.compute.unroll, **options,
  )  # fmt: skip
  return _checked(Plan(
    objective=objective, critic=objective.critic, teacher=objective.teacher,
    critic_optimizer=OptimizerConfig(**dict(c.critic_optimizer)), **common,
  ))  # fmt: skip


def _autoencoding(c: FrozenConfigDict, common: dict[str, Any]) -> Plan:
  """Of the stage vae."""
  sizes = common["vae"]
  if sizes is None or c.lora.rank:
    raise ConfigError(
      "The stage vae trains the whole autoencoder that vae.weights names; name one, and set "
      "lora.rank to 0."
    )
  # What is learnt does not depend on statistics of the latents, which are measured at the end.
  sizes = dataclasses.replace(sizes, mean=(0.0,) * sizes.z_dim, std=(1.0,) * sizes.z_dim)
  a = c.autoencoder
  objective = Reconstruction(sizes, dtype=c.compute.dtype, remat=c.compute.remat, **dict(a))
  return Plan(objective=objective, **common | {"vae": sizes})


def _checked(plan: Plan) -> Plan:
  c = plan.config
  if plan.vae is not None and plan.vae.z_dim != plan.student.out_dim:
    raise ConfigError(
      f"The student makes latents of {plan.student.out_dim} channels, and the autoencoder in "
      f"{c.vae.weights} has {plan.vae.z_dim}; bring the two that were trained together."
    )
  v = c.validation
  if v.every < 0 or v.frames < 1 or not 1 <= v.fps <= 240:
    raise ConfigError(
      "validation.every must be at least 0, validation.frames at least 1 and validation.fps from 1 "
      f"to 240; they are {v.every}, {v.frames} and {v.fps}."
    )
  if v.every and not all(isinstance(p, str) and p.strip() for p in v.prompts):
    raise ConfigError(f"validation.prompts are {v.prompts}; say in words what videos show.")
  # Those of validation videos, too.
  MultistepSolver("unipc", c.flow.solver_steps, c.flow.shift)
  guiding.count_texts(c.flow.guidance)
  guiding.as_interval(c.flow.guidance_interval)
  for part in plan.parts:
    plan.part_shapes(part)  # finds targets of adapters that the model lacks
  return plan


def architecture(weights: str, key: str) -> WanConfig:
  """Of the transformer in a folder of weights, or of random ones.

  key: of the config, by which they were given. Raises CheckpointError, which names it, without one.
  """
  if weights.startswith(RANDOM):
    return pipeline.named_preset(weights.removeprefix(RANDOM))
  try:
    return checkpoint.open_parts(convert.locate(weights), "dit")[0].config
  except convert.CheckpointError as e:
    raise convert.CheckpointError(f"{key} of the config cannot be used. {e}") from e


def text_architecture(weights: str, student: WanConfig) -> Umt5Config:
  """Of a text encoder that is trained with the student."""
  if weights.startswith(RANDOM):
    name = weights.removeprefix(RANDOM)
    if name not in umt5.PRESETS:
      raise ConfigError(
        f"There is no text encoder {name!r} to draw weights for; choose one of "
        f"{', '.join(umt5.PRESETS)} in text.weights."
      )
    found = umt5.PRESETS[name]
  else:
    try:
      found = checkpoint.open_parts(convert.locate(weights), "umt5")[0].config
    except convert.CheckpointError as e:
      raise convert.CheckpointError(f"text.weights of the config cannot be used. {e}") from e
  if found.dim != student.text_dim:
    raise ConfigError(
      f"The text encoder in {weights} gives rows of {found.dim} numbers, and the student takes "
      f"{student.text_dim}; bring two that fit together."
    )
  return found


def vae_architecture(weights: str) -> VaeConfig | None:
  """Of the autoencoder; None where there shall be none."""
  if weights == "none":
    return None
  if weights.startswith(RANDOM):
    return pipeline.named_vae(weights.removeprefix(RANDOM))
  return checkpoint.open_parts(convert.locate(weights), "vae")[0].config
