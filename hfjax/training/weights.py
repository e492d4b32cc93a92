"""Where training's networks come from: loaded or made where they shall lie."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hfjax import convert, parallel, pipeline
from hfjax import text as texts
from hfjax.convert import checkpoint
from hfjax.data import contexts
from hfjax.models import umt5, vae, wan
from hfjax.models.presets import WanConfig
from hfjax.models.vae import VaeConfig
from hfjax.streaming.pixels import Autoencoder
from hfjax.training import lora
from hfjax.training.plan import RANDOM, Plan

_LINEAR = "linear_proj"


def load_trained(plan: Plan, part: str) -> Any:
  """Parameters of a part to begin with, float32.

  Random ones are those that training from scratch begins with. A projection of the linear branch
  that weights lack is zero, so that nothing changes at first (quirk 3); one that shall not be there
  is left out.
  """
  c = plan.config
  if part == "autoencoder":
    return _begin(plan, "vae", c.init or c.vae.weights, vae.init_params, plan.vae, c.init_ema)
  if part == "student" and plan.text is not None:
    return {
      "student": _load_transformer(plan, part),
      "text": _begin(plan, "umt5", c.text.weights, umt5.init_params, plan.text),
    }
  return _load_transformer(plan, part)


def _begin(plan: Plan, kind: str, weights: str, init: Any, config: Any, averaged: bool = False):
  """Parameters of another model than a transformer."""
  if weights.startswith(RANDOM):
    make = lambda seed: init(config, jax.random.fold_in(jax.random.key(seed), 3))
    return parallel.create(make, plan.mesh, plan.config.seed)
  place = parallel.placing(plan.mesh)
  return convert.load(weights, kind, place, "float32", averaged=averaged).params


def statistics(plan: Plan) -> VaeConfig | None:
  """The autoencoder that training begins with, with statistics of latents; None of a random one."""
  c = plan.config
  source = c.init or c.vae.weights
  if source.startswith(RANDOM):
    return None
  return checkpoint.open_parts(convert.locate(source), "vae", averaged=c.init_ema)[0].config


def _load_transformer(plan: Plan, part: str) -> Any:
  c = plan.config
  if part == "critic":
    assert plan.critic is not None
    network, weights, averaged = plan.critic, c.critic.weights, False
  else:
    network, weights, averaged = plan.student, c.init or c.student.weights, c.init_ema
  if weights.startswith(RANDOM):
    number = ("student", "critic").index(part)
    return parallel.create(
      lambda seed: wan.init_params(network, jax.random.fold_in(jax.random.key(seed), number)),
      plan.mesh, c.seed,
    )  # fmt: skip
  place = parallel.placing(plan.mesh)
  loaded = convert.load(weights, "dit", place, "float32", averaged=averaged)
  return fit(loaded.params, plan.shapes(network))


def fit(params: dict[str, Any], like: Any) -> dict[str, Any]:
  """Parameters with or without the linear branch's projection, as `like` has it."""
  attention = dict(params["blocks"]["self_attn"])
  want = like["blocks"]["self_attn"].get(_LINEAR)
  if want is None:
    attention.pop(_LINEAR, None)
  elif _LINEAR not in attention:
    make = lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding)
    attention[_LINEAR] = jax.tree.map(make, want)
  return {**params, "blocks": {**params["blocks"], "self_attn": attention}}


def load_teacher(plan: Plan) -> Any:
  """The teacher's parameters; random ones are drawn such that none is without effect."""
  assert plan.teacher is not None
  weights, dtype = plan.config.teacher.weights, jnp.dtype(plan.config.teacher.dtype)
  if weights.startswith(RANDOM):
    params = pipeline.draw_params(wan.init_params, plan.teacher, dtype)
    return jax.device_put(params, parallel.shardings(plan.mesh, params))
  loaded = convert.load(weights, "dit", parallel.placing(plan.mesh), dtype)
  return fit(loaded.params, plan.shapes(plan.teacher, dtype))


def load_autoencoder(plan: Plan) -> Autoencoder | None:
  """The autoencoder, in the compute dtype, whole on every device."""
  if plan.vae is None:
    return None
  weights, dtype = plan.config.vae.weights, plan.stream.compute_dtype
  everywhere = parallel.replicated(plan.mesh)
  if weights.startswith(RANDOM):
    params = pipeline.draw_params(vae.init_params, plan.vae, dtype)
    return Autoencoder("vae", plan.vae, jax.device_put(params, everywhere), dtype)
  loaded = convert.load(weights, "vae", lambda name, shape: everywhere, dtype)
  return Autoencoder("vae", loaded.config, loaded.params, dtype)


class TrainedText:
  """A text encoder under training, with its tokenizer; an `EncodesText`.

  params: that prompts are encoded with.
  """

  def __init__(self, plan: Plan):
    """Raises CheckpointError if there is no tokenizer, or it has more ids than the encoder."""
    c = plan.config
    assert plan.text is not None
    self.model, self.network, self.dtype = plan.student, plan.text, plan.stream.compute_dtype
    self.params: Any = None
    self.folder = tokenizer_folder(plan)
    try:
      self.tokenizer = texts.Tokenizer.load(self.folder, plan.student.text_len, plan.text.vocab)
    except (FileNotFoundError, ValueError) as e:
      key = "text.tokenizer" if c.text.tokenizer else "text.weights"
      raise convert.CheckpointError(f"{key} of the config cannot be used. {e}") from e

  def __call__(self, prompts: Sequence[str]) -> Float[Array, "b t w"]:
    t = self.tokenizer(prompts)
    rows = _encode(self.network, self.dtype, self.params, t.ids, t.length)
    return wan.pad_text(self.model, rows)

  def surplus(self, prompt: str) -> int:
    """Tokens of a prompt that are cut off."""
    return self.tokenizer.surplus(prompt)


_encode = jax.jit(
  lambda config, dtype, params, ids, length: umt5.encode(config, params, ids, length, dtype).astype(
    jnp.float32
  ),
  static_argnums=(0, 1),
)


def tokenizer_folder(plan: Plan) -> Path:
  """Where the tokenizer of a trained text encoder is; CheckpointError if nothing says so."""
  c = plan.config
  if c.text.tokenizer:
    return Path(c.text.tokenizer).expanduser()
  if c.text.weights.startswith(RANDOM):
    raise convert.CheckpointError(
      f"{c.text.weights} has no tokenizer; give the folder of one as text.tokenizer."
    )
  return convert.locate(c.text.weights)


class Encoder:
  """Encodes prompts; weights are loaded when they are needed first, if ever."""

  def __init__(self, plan: Plan):
    c = plan.config
    self.encode: Any
    if plan.text is not None:
      self.encode = TrainedText(plan)
    else:
      self.encode = contexts.text_encoder(c.text.weights, plan.stream.compute_dtype)
    self.network: WanConfig = plan.student
    # On the host the encoder takes no memory of the device, and seconds for each prompt.
    self.device = jax.devices("cpu")[0] if c.text.device == "cpu" else None
    if self.encode.model.text_dim != plan.student.text_dim:
      raise convert.CheckpointError(
        f"The text encoder in {c.text.weights} gives rows of {self.encode.model.text_dim} numbers, "
        f"and the student takes {plan.student.text_dim}; bring the two that were trained together."
      )

    self._known: dict[str, Array] = {}

  def __call__(self, prompts: Sequence[str]) -> Float[Array, "b t w"]:
    """Contexts of full length, float32."""
    if prompts and all(p in self._known for p in prompts):
      return jnp.stack([self._known[p] for p in prompts])
    with jax.default_device(self.device):
      return wan.pad_text(self.network, self.encode(list(prompts)))

  def remember(self, prompts: Sequence[str]):
    """Keeps the contexts of prompts that come again, if they stay the same."""
    if isinstance(self.encode, TrainedText):
      return
    self._known |= dict(zip(prompts, self(prompts), strict=True))

  def let_go(self):
    """Frees the weights; prompts that are not remembered load them anew."""
    vars(self.encode).pop("loaded", None)

  def surplus(self, prompt: str) -> int:
    """Tokens that are cut off."""
    return self.encode.surplus(prompt)

  def keep_tokenizer(self, workdir: Path):
    """Puts the tokenizer beside a text encoder that is trained, so that the run is complete."""
    if isinstance(self.encode, TrainedText) and jax.process_index() == 0:
      found = texts.find(self.encode.folder)
      target = workdir / "tokenizer" / found.name
      if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, target)


def init_adapters(plan: Plan) -> Any:
  """Adapters that change nothing yet."""
  assert plan.low is not None
  low, like = plan.low, plan.shapes(plan.student)

  def make(seed):
    key = jax.random.fold_in(jax.random.key(seed), 2)
    return lora.init(like, key, low.rank, low.targets)

  return parallel.create(make, plan.mesh, plan.config.seed)


def as_pipeline(
  plan: Plan, params: Any, encode: Encoder, autoencoder: Autoencoder
) -> pipeline.Pipeline:
  """What samples videos with the student's weights."""
  variant = plan.stream.geometry.variant
  return pipeline.Pipeline(plan.student, params, variant, encode, autoencoder)
