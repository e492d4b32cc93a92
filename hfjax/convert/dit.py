"""The diffusion transformer: name table, and its architecture from a published configuration."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from hfjax.convert import told
from hfjax.convert.source import CheckpointError
from hfjax.convert.table import Leaf, Table, linear, vector
from hfjax.models import wan
from hfjax.models.presets import WanConfig

# Neighbouring channels (2j, 2j + 1) of a head form a rotary pair there, channels (j, j + d/2) here.
_ROTARY_ROWS = "(h pair two) i -> i h (two pair)"
_ROTARY = "(h pair two) -> h (two pair)"
_HEAD_ROWS = "(h d) i -> i h d"
_HEADS = "(h d) -> h d"
_OUT = "o (h d) -> h d o"


def _norm(path: str, source: str) -> tuple[Leaf, ...]:
  return (*vector(f"{path}/scale", f"{source}.weight"), *vector(f"{path}/bias", f"{source}.bias"))


def _fused(path: str, sources: tuple[str, ...], rotary: tuple[bool, ...]) -> tuple[Leaf, Leaf]:
  rows = tuple(_ROTARY_ROWS if r else _HEAD_ROWS for r in rotary)
  biases = tuple(_ROTARY if r else _HEADS for r in rotary)
  return (
    Leaf(f"{path}/kernel", tuple(f"{s}.weight" for s in sources), rows, axis=1),
    Leaf(f"{path}/bias", tuple(f"{s}.bias" for s in sources), biases, axis=0),
  )


_SELF, _CROSS = "blocks.{i}.self_attn", "blocks.{i}.cross_attn"

_ROWS: tuple[Leaf, ...] = (
  *linear("patch_embedding", "patch_embedding", "o c 1 p q -> (p q c) o"),
  *linear("text/in", "text_embedding.0"),
  *linear("text/out", "text_embedding.2"),
  *linear("time/in", "time_embedding.0"),
  *linear("time/out", "time_embedding.2"),
  *linear("time/projection", "time_projection.1", "(six o) i -> i six o", "(six o) -> six o"),
  Leaf("blocks/modulation", ("blocks.{i}.modulation",), ("1 six o -> six o",)),
  *_fused("blocks/self_attn/qkv", (f"{_SELF}.q", f"{_SELF}.k", f"{_SELF}.v"), (True, True, False)),
  Leaf("blocks/self_attn/norm_q/scale", (f"{_SELF}.norm_q.weight",), (_ROTARY,)),
  Leaf("blocks/self_attn/norm_k/scale", (f"{_SELF}.norm_k.weight",), (_ROTARY,)),
  *linear("blocks/self_attn/out", f"{_SELF}.o", _OUT),
  *_norm("blocks/norm_cross", "blocks.{i}.norm3"),
  *linear("blocks/cross_attn/q", f"{_CROSS}.q", _HEAD_ROWS, _HEADS),
  *_fused("blocks/cross_attn/kv", (f"{_CROSS}.k", f"{_CROSS}.v"), (False, False)),
  Leaf("blocks/cross_attn/norm_q/scale", (f"{_CROSS}.norm_q.weight",), (_HEADS,)),
  Leaf("blocks/cross_attn/norm_k/scale", (f"{_CROSS}.norm_k.weight",), (_HEADS,)),
  *linear("blocks/cross_attn/out", f"{_CROSS}.o", _OUT),
  *linear("blocks/ffn_in", "blocks.{i}.ffn.0"),
  *linear("blocks/ffn_out", "blocks.{i}.ffn.2"),
  Leaf("head/modulation", ("head.modulation",), ("1 two o -> two o",)),
  *linear("head/projection", "head.head"),
)

# Hybrid models only.
_HYBRID_ROWS: tuple[Leaf, ...] = linear("blocks/self_attn/linear_proj", f"{_SELF}.linear_proj")

# Image-to-video models only.
_IMAGE_ROWS: tuple[Leaf, ...] = (
  *_norm("text/image_norm_in", "img_emb.proj.0"),
  *linear("text/image_in", "img_emb.proj.1"),
  *linear("text/image_out", "img_emb.proj.3"),
  *_norm("text/image_norm_out", "img_emb.proj.4"),
  *_fused("blocks/cross_attn/image_kv", (f"{_CROSS}.k_img", f"{_CROSS}.v_img"), (False, False)),
  Leaf("blocks/cross_attn/norm_image_k/scale", (f"{_CROSS}.norm_k_img.weight",), (_HEADS,)),
)

# Module names of Diffusers' WanTransformer3DModel, by original module name; shapes are the same.
DIFFUSERS: dict[str, str] = {
  "patch_embedding": "patch_embedding",
  "text_embedding.0": "condition_embedder.text_embedder.linear_1",
  "text_embedding.2": "condition_embedder.text_embedder.linear_2",
  "time_embedding.0": "condition_embedder.time_embedder.linear_1",
  "time_embedding.2": "condition_embedder.time_embedder.linear_2",
  "time_projection.1": "condition_embedder.time_proj",
  "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
  "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
  "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
  "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
  "blocks.{i}.modulation": "blocks.{i}.scale_shift_table",
  "blocks.{i}.norm3": "blocks.{i}.norm2",
  "blocks.{i}.ffn.0": "blocks.{i}.ffn.net.0.proj",
  "blocks.{i}.ffn.2": "blocks.{i}.ffn.net.2",
  **{
    f"blocks.{{i}}.{a}_attn.{x}": f"blocks.{{i}}.attn{n}.{y}"
    for a, n in (("self", 1), ("cross", 2))
    for x, y in (
      ("q", "to_q"),
      ("k", "to_k"),
      ("v", "to_v"),
      ("o", "to_out.0"),
      ("norm_q", "norm_q"),
      ("norm_k", "norm_k"),
    )
  },
  "blocks.{i}.self_attn.linear_proj": "blocks.{i}.attn1.linear_proj",
  "blocks.{i}.cross_attn.k_img": "blocks.{i}.attn2.add_k_proj",
  "blocks.{i}.cross_attn.v_img": "blocks.{i}.attn2.add_v_proj",
  "blocks.{i}.cross_attn.norm_k_img": "blocks.{i}.attn2.norm_added_k",
  "head.modulation": "scale_shift_table",
  "head.head": "proj_out",
}


@functools.cache  # the network is traced for its shapes
def table(config: WanConfig) -> Table:
  """The name table of an architecture."""
  rows = _ROWS
  rows += _HYBRID_ROWS if config.linear else ()
  rows += _IMAGE_ROWS if config.image_dim else ()
  p, q = config.patch
  return Table(
    leaves=rows,
    init=lambda: wan.init_params(config, jax.random.key(0)),
    sizes={"h": config.heads, "two": 2, "six": 6, "p": p, "q": q},
    diffusers=DIFFUSERS,
    layers=config.layers,
  )


def from_original(config: WanConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters from tensors under original names; see `Table.from_original`."""
  return table(config).from_original(tensors)


def to_original(config: WanConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under original names; see `Table.to_original`."""
  return table(config).to_original(params)


_WHAT = "transformer"
_KEYS = {
  "dim": "dim", "added_kv_proj_dim": "dim", "ffn_dim": "ffn_dim", "num_heads": "heads",
  "num_attention_heads": "heads", "num_layers": "layers", "in_dim": "in_dim",
  "in_channels": "in_dim", "out_dim": "out_dim", "out_channels": "out_dim", "text_dim": "text_dim",
  "text_len": "text_len", "freq_dim": "freq_dim", "image_dim": "image_dim", "eps": "eps",
}  # fmt: skip
_ONLY = {
  "qk_norm": (True, "rms_norm_across_heads"),
  "cross_attn_norm": (True,),
  "model_type": ("t2v", "i2v"),
}


# Models of the family that hfjax does not have, by the model_type of their config.json.
_OTHERS = {
  "flf2v": "Wan 2.1 FLF2V, which takes a first and a last frame",
  "ti2v": "Wan 2.2 TI2V, which takes text and image, and latents of 48 channels",
  "s2v": "Wan 2.2 S2V, which takes speech",
  "animate": "Wan 2.2 Animate, which takes poses and faces",
}
_HAVE = "hfjax has only Wan 2.1's text-to-video and image-to-video (CLIP) transformers."
_NAMES = "|".join((r"\w*Wan\w*Model", "t2v", "i2v", *_OTHERS))


def owns(cfg: Mapping[str, Any]) -> bool:
  """Whether a config.json is a transformer's."""
  return told.is_of(cfg, _KEYS, _NAMES)


def check_family(names: Iterable[str], dim: int, in_dim: int, out_dim: int):
  """Raises CheckpointError, with its name, on a model of the family that hfjax does not have."""
  held, other = set(names), None
  if held & {"img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"}:
    other = _OTHERS["flf2v"]
  elif (dim, in_dim, out_dim) == (3072, 48, 48):
    other = _OTHERS["ti2v"]
  elif (in_dim, out_dim) == (36, 16) and "img_emb.proj.0.weight" not in held:
    other = "Wan 2.2 I2V, which takes an image without its CLIP embedding (img_emb)"
  if other:
    raise CheckpointError(f"By its tensors this is {other}; {_HAVE}")


def told_by(cfg: Mapping[str, Any]) -> told.Told:
  """What an original or a Diffusers config.json tells of the architecture.

  Raises ValueError on an architecture that hfjax does not have.
  """
  name = cfg.get("_class_name", "WanModel")
  if not isinstance(name, str) or not re.fullmatch(r"\w*Wan\w*Model", name):
    raise ValueError(f"The configuration is of a {name}; give that of a Wan transformer.")
  if (other := _OTHERS.get(str(cfg.get("model_type")))) is not None:
    raise ValueError(f"By its model_type this is {other}; {_HAVE}")
  found = told.read(_WHAT, cfg, _KEYS, _ONLY)
  heads, head_dim = cfg.get("num_attention_heads"), cfg.get("attention_head_dim")
  if isinstance(heads, int) and isinstance(head_dim, int):
    key = f"num_attention_heads {heads} times attention_head_dim"
    told.add(found, "dim", key, heads * head_dim)
  if (patch := cfg.get("patch_size")) is not None:
    if not isinstance(patch, (list, tuple)) or len(patch) != 3 or patch[0] != 1:
      raise ValueError(f"The patch is {patch}; hfjax takes (1, rows, columns), one frame deep.")
    told.add(found, "patch", "patch_size", tuple(patch[1:]))
  if cfg.get("model_type") == "t2v":
    told.add(found, "image_dim", "image width with model_type t2v", 0)
  return found


def config_from_original(cfg: Mapping[str, Any], linear: bool) -> WanConfig:
  """Architecture from the keys of an original `config.json`.

  linear: whether the checkpoint has the hybrid projection.
  Raises ValueError on a missing key or an architecture that hfjax does not have.
  """
  need = ("dim", "ffn_dim", "heads", "layers", "in_dim", "out_dim", "text_dim", "text_len")
  values = told.values(_WHAT, told_by(cfg), *need, "freq_dim", "patch")
  if cfg.get("model_type") == "i2v":
    values.setdefault("image_dim", 1280)
  return WanConfig(**values, linear=linear)


def published_config(config: WanConfig, style: str) -> dict[str, Any]:
  """config.json that original or Diffusers code wants beside the tensors."""
  c = config
  both = {
    "patch_size": [1, *c.patch],
    "text_dim": c.text_dim,
    "freq_dim": c.freq_dim,
    "ffn_dim": c.ffn_dim,
    "num_layers": c.layers,
    "eps": c.eps,
  }
  if style == "original":
    return {
      "_class_name": "WanModel",
      "model_type": "i2v" if c.image_dim else "t2v",
      **both,
      "text_len": c.text_len,
      "in_dim": c.in_dim,
      "dim": c.dim,
      "out_dim": c.out_dim,
      "num_heads": c.heads,
    }
  return {
    "_class_name": "WanTransformer3DModel",
    **both,
    "num_attention_heads": c.heads,
    "attention_head_dim": c.head_dim,
    "in_channels": c.in_dim,
    "out_channels": c.out_dim,
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": c.image_dim or None,
    "added_kv_proj_dim": c.dim if c.image_dim else None,
    "rope_max_seq_len": 1024,
  }
