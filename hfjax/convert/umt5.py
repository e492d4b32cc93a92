"""The UMT5 text encoder: name table, and its architecture from a published configuration."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from hfjax.convert import told
from hfjax.convert.table import Leaf, Table, vector
from hfjax.models import umt5
from hfjax.models.umt5 import Umt5Config

_HEAD_ROWS = "(h d) i -> i h d"
_ROWS = "o i -> i o"
_ATTN, _FFN = "blocks.{i}.attn", "blocks.{i}.ffn"

_LEAVES: tuple[Leaf, ...] = (
  *vector("token_embedding", "token_embedding.weight", "v o -> v o"),
  *vector("blocks/norm1/scale", "blocks.{i}.norm1.weight"),
  Leaf(
    "blocks/attn/qkv/kernel",
    (f"{_ATTN}.q.weight", f"{_ATTN}.k.weight", f"{_ATTN}.v.weight"),
    (_HEAD_ROWS,) * 3,
    axis=1,
  ),
  *vector(
    "blocks/attn/position", "blocks.{i}.pos_embedding.embedding.weight", "bucket h -> bucket h"
  ),
  *vector("blocks/attn/out/kernel", f"{_ATTN}.o.weight", "o (h d) -> h d o"),
  *vector("blocks/norm2/scale", "blocks.{i}.norm2.weight"),
  Leaf(
    "blocks/ffn/in/kernel", (f"{_FFN}.gate.0.weight", f"{_FFN}.fc1.weight"), (_ROWS,) * 2, axis=1
  ),
  *vector("blocks/ffn/out/kernel", f"{_FFN}.fc2.weight", _ROWS),
  *vector("norm/scale", "norm.weight"),
)

_LAYER = "encoder.block.{i}.layer"

# Module names of Transformers' UMT5EncoderModel, by original module name; shapes are the same.
TRANSFORMERS: dict[str, str] = {
  "token_embedding": "shared",
  "norm": "encoder.final_layer_norm",
  "blocks.{i}.norm1": f"{_LAYER}.0.layer_norm",
  **{f"{_ATTN}.{x}": f"{_LAYER}.0.SelfAttention.{x}" for x in "qkvo"},
  "blocks.{i}.pos_embedding.embedding": f"{_LAYER}.0.SelfAttention.relative_attention_bias",
  "blocks.{i}.norm2": f"{_LAYER}.1.layer_norm",
  f"{_FFN}.gate.0": f"{_LAYER}.1.DenseReluDense.wi_0",
  f"{_FFN}.fc1": f"{_LAYER}.1.DenseReluDense.wi_1",
  f"{_FFN}.fc2": f"{_LAYER}.1.DenseReluDense.wo",
}

# Transformers' names of copies, and of what they are copies of; a file may hold either or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight"}


@functools.cache  # the network is traced for its shapes
def table(config: Umt5Config) -> Table:
  """The name table of an architecture; its Diffusers names are those of Transformers."""
  return Table(
    leaves=_LEAVES,
    init=lambda: umt5.init_params(config, jax.random.key(0)),
    sizes={"h": config.heads},
    diffusers=TRANSFORMERS,
    layers=config.layers,
  )


def from_original(config: Umt5Config, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters from tensors under original names; see `Table.from_original`."""
  return table(config).from_original(tensors)


def to_original(config: Umt5Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under original names; see `Table.to_original`."""
  return table(config).to_original(params)


_WHAT = "text encoder"
_KEYS = {
  "vocab": "vocab", "vocab_size": "vocab", "dim": "dim", "d_model": "dim", "dim_attn": "dim_attn",
  "dim_ffn": "dim_ffn", "d_ff": "dim_ffn", "num_heads": "heads", "num_layers": "layers",
  "num_buckets": "buckets", "relative_attention_num_buckets": "buckets",
  "max_distance": "max_distance", "relative_attention_max_distance": "max_distance",
  "eps": "eps", "layer_norm_epsilon": "eps",
}  # fmt: skip
_ONLY = {"feed_forward_proj": ("gated-gelu",), "model_type": ("umt5",), "shared_pos": (False,)}


def owns(cfg: Mapping[str, Any]) -> bool:
  """Whether a config.json is a text encoder's."""
  return told.is_of(cfg, _KEYS, "umt5")


def told_by(cfg: Mapping[str, Any]) -> told.Told:
  """What the original encoder's arguments or a Transformers config.json tell.

  Raises ValueError on an architecture that hfjax does not have.
  """
  found = told.read(_WHAT, cfg, _KEYS, _ONLY)
  heads, head_dim = cfg.get("num_heads"), cfg.get("d_kv")
  if isinstance(heads, int) and isinstance(head_dim, int):
    told.add(found, "dim_attn", f"num_heads {heads} times d_kv", heads * head_dim)
  return found


def config_from_original(cfg: Mapping[str, Any]) -> Umt5Config:
  """Architecture from the arguments of the original encoder, or from a Transformers config.json.

  Raises ValueError on a missing key or an architecture that hfjax does not have.
  """
  need = ("vocab", "dim", "dim_attn", "dim_ffn", "heads", "layers")
  return Umt5Config(**told.values(_WHAT, told_by(cfg), *need))


config_from_transformers = config_from_original
