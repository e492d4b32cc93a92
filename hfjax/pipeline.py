"""All networks between a prompt and pixels, loaded together."""

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hfjax import convert, text
from hfjax.convert import stored
from hfjax.models import sampling_presets, taehv, umt5, vae, wan
from hfjax.models.presets import PRESETS, WanConfig
from hfjax.streaming.pixels import Autoencoder
from hfjax.streaming.stream import default_dtype

# By the names that people give: the model of convert.load, and its network.
AUTOENCODERS = {"full": ("vae", vae), "tiny": ("taehv", taehv)}
# Where the model lies that comes with hfjax, of the shapes world.
EMBEDDED = Path(__file__).resolve().parent / "assets" / "tiny"


class EncodesText(Protocol):
  """Prompts to text contexts `[b t w]`, float32; `surplus` is how many tokens are cut off."""

  def __call__(self, prompts: Sequence[str]) -> Array: ...

  def surplus(self, prompt: str) -> int: ...


class Pipeline(NamedTuple):
  """A video model with all that is around it.

  encode: text context `[b t w]`, in float32, of a list of prompts. variant: semantics that the
  weights were trained with, a name in `geometry.VARIANTS`; None if it is not known.
  preset: how they are meant to be sampled, a name in `SAMPLING_PRESETS`.
  """

  config: WanConfig
  params: wan.Params
  variant: str | None
  encode: EncodesText
  autoencoder: Autoencoder
  preset: str = "hybrid"


class TextEncoder:
  """UMT5 with its tokenizer; weights are loaded when the first prompt comes."""

  def __init__(self, path: Path, config: WanConfig, dtype: Any):
    self.path, self.dtype, self.model = path, dtype, config
    self.tokenizer = text.Tokenizer.load(path, config.text_len)

  @functools.cached_property
  def loaded(self) -> convert.Loaded:
    """The network; CheckpointError if it does not fit the transformer or the tokenizer."""
    loaded = convert.load(self.path, "umt5", dtype=self.dtype)
    if loaded.config.dim != self.model.text_dim:
      raise convert.CheckpointError(
        f"The text encoder in {self.path} gives rows of {loaded.config.dim} numbers, and the "
        f"transformer takes {self.model.text_dim}; bring the two that were trained together."
      )
    if self.tokenizer.vocab > loaded.config.vocab:
      raise convert.CheckpointError(
        f"The tokenizer in {self.path} has {self.tokenizer.vocab} ids, and the text encoder knows "
        f"{loaded.config.vocab}; use the tokenizer that the encoder was trained with."
      )
    return loaded

  def __call__(self, prompts: Sequence[str]) -> Float[Array, "b t w"]:
    tokens = self.tokenizer(prompts)
    return _encode(self.loaded.config, self.dtype, self.loaded.params, tokens.ids, tokens.length)

  def surplus(self, prompt: str) -> int:
    """Tokens of a prompt that are cut off, as there is no room for them."""
    return self.tokenizer.surplus(prompt)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config, dtype, params, ids, length):
  return umt5.encode(config, params, ids, length, dtype).astype(jnp.float32)


class RandomText:
  """Stands for a text encoder: rows of noise that depend on the prompt alone, one for each word."""

  def __init__(self, config: WanConfig):
    self.model = config

  def __call__(self, prompts: Sequence[str]) -> Float[Array, "b t w"]:
    rows = np.zeros((len(prompts), self.model.text_len, self.model.text_dim), np.float32)
    for row, prompt in zip(rows, prompts, strict=True):
      words = text.clean(prompt).split()[: len(row)]
      for place, word in enumerate(words):
        seed = int.from_bytes(hashlib.sha256(f"{place} {word}".encode()).digest()[:8])
        row[place] = np.random.default_rng(seed).standard_normal(row.shape[1])
    return jnp.asarray(rows)

  def surplus(self, prompt: str) -> int:
    """Words that are cut off."""
    return max(0, len(text.clean(prompt).split()) - self.model.text_len)


def load(
  path_or_hub_id: str | Path | None = None, autoencoder: str = "full", dtype: Any = None
) -> Pipeline:
  """A pipeline from a folder of weights, from the Hub, or with random ones: "random:hybrid-1.3b".

  path_or_hub_id: the model that comes with hfjax by default. autoencoder: "full" or "tiny".
  dtype: of the weights and of text encoder and autoencoder; see `stream.default_dtype`.

  Raises CheckpointError on what cannot be loaded, or does not fit together.
  """
  _check_kind(autoencoder)
  dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
  name = str(embedded() if path_or_hub_id is None else path_or_hub_id)
  if name.startswith("random:"):
    return _random(name.removeprefix("random:"), autoencoder, dtype)
  path = convert.locate(name)
  config, params, variant, preset = convert.load(path, "dit", dtype=dtype)
  assert preset is not None  # every transformer has one
  decoder = load_autoencoder(path, autoencoder, dtype)
  _check_latents(path, config, decoder.config)
  try:
    encode = TextEncoder(path, config, dtype)
  except (FileNotFoundError, ValueError) as e:
    raise convert.CheckpointError(str(e)) from e
  return Pipeline(config, params, variant, encode, decoder, preset)


def load_autoencoder(
  path_or_hub_id: str | Path, autoencoder: str = "full", dtype: Any = None
) -> Autoencoder:
  """The autoencoder alone; see `load`."""
  _check_kind(autoencoder)
  dtype = jnp.dtype(default_dtype() if dtype is None else dtype)
  name = str(path_or_hub_id)
  if name.startswith("random:"):
    return _random_autoencoder(named_preset(name.removeprefix("random:")), autoencoder, dtype)
  kind, _ = AUTOENCODERS[autoencoder]
  loaded = convert.load(path_or_hub_id, kind, dtype=dtype)
  return Autoencoder(kind, loaded.config, loaded.params, dtype)


def embedded() -> Path:
  """Folder of the model that comes with hfjax; CheckpointError if it did not come."""
  if not (EMBEDDED / "dit").is_dir():
    raise convert.CheckpointError(
      f"The model that comes with hfjax is not there ({EMBEDDED}); install hfjax anew, or name "
      "weights: a folder that tools/convert_checkpoint.py wrote, or random:tiny for noise."
    )
  return EMBEDDED


def recorded_preset(path_or_hub_id: str | Path) -> str | None:
  """The preset that weights name; None if it takes their tensors to tell, as `load` does."""
  name = str(path_or_hub_id)
  if name.startswith("random:"):
    return _random_preset(named_preset(name.removeprefix("random:")))
  path = convert.locate(name)
  folder = stored.hfjax_models(path).get("dit") if path.is_dir() else None
  return None if folder is None else stored.read_config(folder)[2].get("preset")


def _check_kind(autoencoder: str):
  if autoencoder not in AUTOENCODERS:
    raise convert.CheckpointError(
      f"There is no autoencoder {autoencoder!r}; choose one of {', '.join(AUTOENCODERS)}."
    )


def _check_latents(path: Path, config: WanConfig, autoencoder: Any):
  if autoencoder.z_dim != config.out_dim:
    raise convert.CheckpointError(
      f"In {path} the transformer makes latents of {config.out_dim} channels, and the autoencoder "
      f"has {autoencoder.z_dim}; bring the two that were trained together."
    )


# Small autoencoders for small transformers, so that pictures of noise are quickly made.
_SMALL = {
  "vae": vae.VaeConfig(dim=8, z_dim=16, mean=vae.WAN21.mean, std=vae.WAN21.std),
  "taehv": taehv.TaehvConfig(encoder_dim=8, decoder_dims=(16, 8, 8, 8), memory_blocks=1),
}
_FULL = {"vae": vae.WAN21, "taehv": taehv.TAEHV}
# Of the model of the shapes world; statistics of its latents are measured when it is trained.
SHAPES_VAE = vae.VaeConfig(dim=16, z_dim=16, mean=(0.0,) * 16, std=(1.0,) * 16, num_res_blocks=1)


def named_preset(name: str) -> WanConfig:
  """Architecture by a name of `PRESETS`, with or without its dashes; CheckpointError otherwise."""
  known = {_plain(preset): preset for preset in PRESETS}
  if _plain(name) not in known:
    raise convert.CheckpointError(
      f"There is no model {name!r} to draw weights for; choose one of {', '.join(PRESETS)}."
    )
  return PRESETS[known[_plain(name)]]


def named_vae(name: str) -> vae.VaeConfig:
  """Architecture of the full autoencoder that goes with a named transformer."""
  return _sizes(named_preset(name))["vae"]


def _sizes(config: WanConfig) -> dict[str, Any]:
  if config == PRESETS["shapes"]:
    return {**_SMALL, "vae": SHAPES_VAE}
  return _SMALL if config.dim < 512 else _FULL


def _random_autoencoder(config: WanConfig, autoencoder: str, dtype: Any) -> Autoencoder:
  kind, network = AUTOENCODERS[autoencoder]
  sizes = _sizes(config)[kind]
  return Autoencoder(kind, sizes, draw_params(network.init_params, sizes, dtype), dtype)


def _random(name: str, autoencoder: str, dtype: Any) -> Pipeline:
  config = named_preset(name)
  variant = "paper" if config.linear else "reference_dense"
  return Pipeline(
    config,
    draw_params(wan.init_params, config, dtype),
    variant,
    RandomText(config),
    _random_autoencoder(config, autoencoder, dtype),
    _random_preset(config),
  )


def _random_preset(config: WanConfig) -> str:
  return "shapes" if config == PRESETS["shapes"] else sampling_presets.infer(config.linear)[0]


def draw_params(init, sizes, dtype):
  """Random weights for a network, none of them without effect, whatever training begins with."""
  shapes = jax.eval_shape(lambda: init(sizes, jax.random.key(0)))
  numbers = itertools.count()

  def leaf(path, x):
    first, last = path[0].key, path[-1].key
    inputs = x.shape[first == "blocks" : -1]  # not counting layers, which are stacked
    spread = math.prod(inputs) ** -0.5 if last == "kernel" else 0.0
    return _normal(next(numbers), x.shape, dtype, float(last == "scale"), spread)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed, shape, dtype, mean, spread):
  return (mean + spread * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def _plain(name: str) -> str:
  return re.sub(r"[^a-z0-9]", "", name.lower())
