"""Parameters of the diffusion transformer from published tensors, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from hfjax.convert import names
from hfjax.models.presets import WanConfig

_SHOWN = 20  # tensors named in an error


def leaves(config: WanConfig) -> tuple[names.Leaf, ...]:
  """The rows of the name table that the architecture has."""
  table = names.DIT
  table += names.DIT_LINEAR if config.linear else ()
  return table + (names.DIT_IMAGE if config.image_dim else ())


def config_from_original(cfg: Mapping[str, Any], linear: bool) -> WanConfig:
  """Architecture from the keys of an original `config.json`.

  linear: whether the checkpoint has the hybrid projection.
  Raises ValueError on a missing key or an architecture that hfjax does not have.
  """
  need = (
    "dim",
    "ffn_dim",
    "num_heads",
    "num_layers",
    "in_dim",
    "out_dim",
    "text_dim",
    "text_len",
    "freq_dim",
    "patch_size",
  )
  missing = [k for k in need if k not in cfg]
  if missing:
    raise ValueError(
      f"The model's configuration lacks {', '.join(missing)}; give a Wan config.json."
    )
  if not cfg.get("qk_norm", True) or not cfg.get("cross_attn_norm", True):
    raise ValueError(
      "The model has no query/key norm or no cross-attention norm; every published Wan "
      "model has both, and hfjax supports only these."
    )
  patch = tuple(cfg["patch_size"])
  if len(patch) != 3 or patch[0] != 1:
    raise ValueError(f"The patch is {patch}; hfjax takes (1, rows, columns), one frame deep.")
  return WanConfig(
    dim=cfg["dim"],
    ffn_dim=cfg["ffn_dim"],
    heads=cfg["num_heads"],
    layers=cfg["num_layers"],
    in_dim=cfg["in_dim"],
    out_dim=cfg["out_dim"],
    text_dim=cfg["text_dim"],
    text_len=cfg["text_len"],
    freq_dim=cfg["freq_dim"],
    patch=patch[1:],
    image_dim=1280 if cfg.get("model_type") == "i2v" else 0,
    linear=linear,
    eps=cfg.get("eps", 1e-6),
  )


def from_original(config: WanConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Nested parameters from tensors under original names; dtypes stay as they are.

  Raises ValueError that lists missing, unexpected and misshapen tensors, at most 20 by name.
  """
  table = leaves(config)
  wanted = {s for leaf in table for name in leaf.sources for s in _expand(name, config.layers)}
  _complain("missing", wanted - tensors.keys())
  _complain("unexpected", tensors.keys() - wanted)
  shapes = _shapes(config)
  wrong = [
    f"{n} {list(tensors[n].shape)} instead of {list(shapes[n])}"
    for n in sorted(wanted)
    if tuple(tensors[n].shape) != shapes[n]
  ]
  _complain("misshapen", wrong)

  params: dict[str, Any] = {}
  for leaf in table:
    layered = "{i}" in leaf.sources[0]
    parts = []
    for i in range(config.layers if layered else 1):
      sources = [
        _fold(np.asarray(tensors[s.format(i=i)]), layout, config)
        for s, layout in zip(leaf.sources, leaf.layouts, strict=True)
      ]
      parts.append(sources[0] if leaf.axis is None else np.stack(sources, axis=leaf.axis))
    _put(params, leaf.path, np.stack(parts) if layered else parts[0])
  return params


def to_original(config: WanConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Tensors under original names; the inverse of `from_original`, bit for bit.

  Works for anything shaped like parameters, such as gradients.
  """
  tensors = {}
  for leaf in leaves(config):
    array: Any = params
    for key in leaf.path.split("/"):
      array = array[key]
    array = np.asarray(array)
    layered = "{i}" in leaf.sources[0]
    for i in range(config.layers if layered else 1):
      part = array[i] if layered else array
      for n, (source, layout) in enumerate(zip(leaf.sources, leaf.layouts, strict=True)):
        piece = part if leaf.axis is None else np.take(part, n, axis=leaf.axis)
        tensors[source.format(i=i)] = _unfold(piece, layout, config)
  return tensors


def to_diffusers_name(name: str) -> str:
  """Diffusers' name of a tensor, from its original name; KeyError if there is none."""
  parts = name.split(".")
  block = parts[1] if parts[0] == "blocks" else None
  if block is not None:
    parts[1] = "{i}"
  module, suffix = ".".join(parts), ""
  if module not in names.DIT_DIFFUSERS:
    module, suffix = ".".join(parts[:-1]), "." + parts[-1]
  return names.DIT_DIFFUSERS[module].format(i=block) + suffix


def _expand(name: str, layers: int) -> list[str]:
  return [name.format(i=i) for i in range(layers)] if "{i}" in name else [name]


def _shapes(c: WanConfig) -> dict[str, tuple[int, ...]]:
  """Shape of every original tensor, by name (spec section 11.1)."""
  widths = {
    "patch_embedding": (c.dim, c.in_dim, 1, *c.patch),
    "text_embedding.0": (c.dim, c.text_dim),
    "text_embedding.2": (c.dim, c.dim),
    "time_embedding.0": (c.dim, c.freq_dim),
    "time_embedding.2": (c.dim, c.dim),
    "time_projection.1": (6 * c.dim, c.dim),
    "head.head": (c.patch[0] * c.patch[1] * c.out_dim, c.dim),
    "blocks.{i}.ffn.0": (c.ffn_dim, c.dim),
    "blocks.{i}.ffn.2": (c.dim, c.ffn_dim),
    "blocks.{i}.self_attn.linear_proj": (c.head_dim, c.head_dim),
    "img_emb.proj.0": (c.image_dim,),
    "img_emb.proj.1": (c.image_dim, c.image_dim),
    "img_emb.proj.3": (c.dim, c.image_dim),
    "blocks.{i}.modulation": (1, 6, c.dim),
    "head.modulation": (1, 2, c.dim),
  }
  vectors = ("norm_q", "norm_k", "norm3", "norm_k_img", "img_emb.proj.4")
  shapes = {}
  for leaf in leaves(c):
    for source in leaf.sources:
      module, _, suffix = source.rpartition(".")
      shape = widths.get(source) or widths.get(module)
      if shape is None:
        shape = (c.dim,) if module.endswith(vectors) else (c.dim, c.dim)
      if suffix == "bias":
        shape = shape[:1]
      for name in _expand(source, c.layers):
        shapes[name] = shape
  return shapes


def _sizes(layout: str, c: WanConfig) -> dict[str, int]:
  known = {"h": c.heads, "two": 2, "six": 6, "p": c.patch[0], "q": c.patch[1]}
  letters = layout.replace("(", " ").replace(")", " ").split()
  return {k: v for k, v in known.items() if k in letters}


def _fold(x: np.ndarray, layout: str, c: WanConfig) -> np.ndarray:
  return rearrange(x, layout, **_sizes(layout, c))


def _unfold(x: np.ndarray, layout: str, c: WanConfig) -> np.ndarray:
  there, _, ours = layout.partition(" -> ")
  return np.ascontiguousarray(rearrange(x, f"{ours} -> {there}", **_sizes(layout, c)))


def _put(tree: dict[str, Any], path: str, value: np.ndarray):
  *parents, last = path.split("/")
  for key in parents:
    tree = tree.setdefault(key, {})
  tree[last] = value


def _complain(what: str, tensors):
  if not tensors:
    return
  shown = sorted(tensors)
  more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
  plural = "s" if len(shown) > 1 else ""
  raise ValueError(
    f"The checkpoint has {len(shown)} {what} tensor{plural}: {', '.join(shown[:_SHOWN])}{more}. "
    "Check that it holds the architecture that its configuration says."
  )
