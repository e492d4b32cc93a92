"""A folder of the shapes world's model as hfjax ships it, with random weights."""

import math
from pathlib import Path

import jax
import numpy as np

from hfjax import pipeline
from hfjax.convert import checkpoint
from hfjax.convert.part import Part, named_tensors
from hfjax.convert.registry import KINDS
from hfjax.convert.source import Tensor
from hfjax.data import shapes, vocabulary
from hfjax.models import presets, umt5, vae, wan
from hfjax.streaming.trees import named

NETWORKS = {
  "dit": (presets.PRESETS["shapes"], wan.init_params),
  "vae": (pipeline.SHAPES_VAE, vae.init_params),
  "umt5": (umt5.PRESETS["shapes"], umt5.init_params),
}


def write(folder: Path, preset: str = "shapes") -> Path:
  """Writes transformer, autoencoder, text encoder and tokenizer; preset: that is recorded."""
  for name, (config, init) in NETWORKS.items():
    kind, semantics = KINDS[name], ("paper", preset) if name == "dit" else (None, None)
    tensors = named_tensors(kind.table(config), _draw(config, init))
    part = Part(kind, config, tensors, semantics[0], {"files": {}}, preset=semantics[1])
    (folder / name).mkdir(parents=True)
    checkpoint.write_part(part, folder / name, "hfjax", None, lambda count: None)
  place = folder / checkpoint.TOKENIZER
  place.mkdir(parents=True)
  model = vocabulary.train(shapes.prompts("train", 400, 0), NETWORKS["umt5"][0].vocab)
  (place / "spiece.model").write_bytes(model)
  return folder


def _draw(config, init) -> dict[str, Tensor]:
  """Arrays by path, none of them without effect; in NumPy, as JAX would compile each shape."""
  r, arrays = np.random.default_rng(0), {}
  for path, like in named(jax.eval_shape(lambda: init(config, jax.random.key(0)))).items():
    first, last = path.split("/")[0], path.split("/")[-1]
    inputs = like.shape[first == "blocks" : -1]
    spread = math.prod(inputs) ** -0.5 if last in ("kernel", "embedding") else 0.05
    x = r.normal(float(last == "scale"), spread, like.shape).astype(np.float32)
    arrays[path] = Tensor(x.shape, x.dtype, lambda row=None, x=x: x if row is None else x[row])
  return arrays
