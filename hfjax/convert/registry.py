"""The models that hfjax converts."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from hfjax.convert import dit, taehv, told, umt5, vae
from hfjax.convert.source import CheckpointError, Tensor, Tensors
from hfjax.convert.table import Table
from hfjax.models.presets import WanConfig
from hfjax.models.taehv import TAEHV, TaehvConfig
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import WAN21, VaeConfig

Shapes = Mapping[str, tuple[int, ...]]

_HEAD_DIM = 128  # of every published transformer


@dataclasses.dataclass(frozen=True)
class Kind:
  """A model, and what conversion needs to know of it.

  config: its configuration class.
  table: name table of a configuration.
  infer: configuration from tensor shapes under original names and a config.json, {} if there is
    none; the third argument collects sentences for the user.
  marks: by naming, tensors that only this model has.
  names: Diffusers' module names by original ones.
  folder: its subfolder in a Diffusers pipeline. stems: names of its files, by naming.
  published: config.json that goes with "original" or "diffusers" tensors, None for none.
  owns: whether a config.json is this model's.
  tied: Diffusers' names of copies, and the names of what they are copies of.
  prepare: tensors as the name table wants them.
  """

  name: str
  config: type
  table: Callable[[Any], Table]
  infer: Callable[[Shapes, Mapping[str, Any], list[str]], Any]
  marks: Mapping[str, tuple[str, ...]]
  names: Mapping[str, str]
  folder: str
  stems: Mapping[str, str]
  published: Callable[[Any, str], dict[str, Any] | None]
  owns: Callable[[Mapping[str, Any]], bool]
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  prepare: Callable[[Any, Tensors], Tensors] = lambda config, tensors: tensors


def _infer_dit(shapes: Shapes, cfg: Mapping[str, Any], say: list[str]) -> WanConfig:
  """Architecture of a transformer (spec section 11.1)."""
  pattern = r"blocks\.[0-9]+\.self_attn\.linear_proj\.weight"
  hybrid = next((n for n in shapes if re.fullmatch(pattern, n)), None)
  need(shapes, {
    "patch_embedding.weight": 5, "text_embedding.0.weight": 2, "time_embedding.0.weight": 2,
    "blocks.0.ffn.0.weight": 2, "head.head.weight": 2, **({hybrid: 2} if hybrid else {}),
  })  # fmt: skip
  dim, in_dim, _, *patch = shapes["patch_embedding.weight"]
  out_dim = shapes["head.head.weight"][0] // (patch[0] * patch[1])
  dit.check_family(shapes, dim, in_dim, out_dim)
  said = dit.told_by(cfg)
  image_dim = shapes.get("img_emb.proj.0.weight", (0,))[0]
  if cfg.get("model_type") == "i2v" and not image_dim:
    raise ValueError(
      "config.json is of an image-to-video model, and the tensors of none (img_emb)."
    )
  if hybrid:
    heads = dim // shapes[hybrid][0]
  elif "heads" in said:
    heads = told.value("transformer", said, "heads")
  elif dim % _HEAD_DIM:
    raise ValueError(
      f"Nothing tells the number of heads of a transformer {dim} wide; put its config.json beside "
      "it."
    )
  else:
    heads = dim // _HEAD_DIM
    say.append(f"Nothing tells the number of heads; taken to be {heads}, of {_HEAD_DIM} channels.")
  config = WanConfig(
    dim=dim,
    ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
    heads=heads,
    layers=count(shapes, r"blocks\.([0-9]{1,9})\."),
    in_dim=in_dim,
    out_dim=out_dim,
    text_dim=shapes["text_embedding.0.weight"][1],
    freq_dim=shapes["time_embedding.0.weight"][1],
    patch=(patch[0], patch[1]),
    image_dim=image_dim,
    linear=hybrid is not None,
    **{k: told.value("transformer", said, k) for k in ("text_len", "eps") if k in said},
  )
  told.check("transformer", said, config)
  return config


def need(shapes: Shapes, ranks: Mapping[str, int]):
  """Raises CheckpointError unless the tensors that tell the architecture are there, not empty."""
  for name, rank in ranks.items():
    shape = shapes.get(name, ())
    if len(shape) != rank or 0 in shape:
      have = f"has shape {list(shape)}" if name in shapes else "is missing"
      raise CheckpointError(
        f"The tensor {name}, which tells the architecture, {have}; it must have {rank} axes, none "
        "of them empty. The checkpoint is incomplete or of another model."
      )


def count(shapes: Shapes, pattern: str) -> int:
  """One more than the largest number that `pattern` finds in the names.

  Raises CheckpointError if that is more than there are tensors.
  """
  found = max((int(m[1]) for n in shapes if (m := re.match(pattern, n))), default=-1) + 1
  if found > len(shapes):
    raise CheckpointError(
      f"The checkpoint has {len(shapes)} tensors, and one of block {found - 1}; it is damaged."
    )
  return found


def _infer_vae(shapes: Shapes, cfg: Mapping[str, Any], say: list[str]) -> VaeConfig:
  """Architecture of the autoencoder: from its configuration, else Wan 2.1's at other widths."""
  need(shapes, {"encoder.conv1.weight": 5, "conv2.weight": 5})
  dim, channels = shapes["encoder.conv1.weight"][:2]
  if channels != 3:
    raise CheckpointError(
      f"This autoencoder takes pixels of {channels} channels, as that of Wan 2.2 does; hfjax has "
      "that of Wan 2.1."
    )
  said = vae.told_by(cfg)
  sizes: dict[str, Any] = {"dim": dim, "z_dim": shapes["conv2.weight"][0]}
  values = {k: told.value("autoencoder", said, k) for k in said if k not in sizes}
  if "mean" not in values and sizes["z_dim"] != WAN21.z_dim:
    n = sizes["z_dim"]
    say.append(f"Nothing tells the statistics of the {n} latent channels; mean 0, deviation 1.")
    values |= {"mean": (0.0,) * n, "std": (1.0,) * n}
  config = dataclasses.replace(WAN21, **values, **sizes)
  told.check("autoencoder", said, config)
  return config


def _vae_config(config: VaeConfig, style: str) -> dict[str, Any] | None:
  if style == "original":
    return None
  return {
    "_class_name": "AutoencoderKLWan",
    "base_dim": config.dim,
    "z_dim": config.z_dim,
    "dim_mult": list(config.dim_mult),
    "num_res_blocks": config.num_res_blocks,
    "attn_scales": [],
    "temperal_downsample": list(config.temporal_downsample),
    "dropout": 0.0,
    "latents_mean": list(config.mean),
    "latents_std": list(config.std),
  }


def _infer_umt5(shapes: Shapes, cfg: Mapping[str, Any], say: list[str]) -> Umt5Config:
  """Architecture of the text encoder."""
  del say
  ranks = {
    "token_embedding.weight": 2, "blocks.0.attn.q.weight": 2, "blocks.0.ffn.fc1.weight": 2,
    "blocks.0.pos_embedding.embedding.weight": 2,
  }  # fmt: skip
  need(shapes, ranks)
  embedding, q, fc1, position = (shapes[n] for n in ranks)
  said = umt5.told_by(cfg)
  config = Umt5Config(
    vocab=embedding[0],
    dim=embedding[1],
    dim_attn=q[0],
    dim_ffn=fc1[0],
    heads=position[1],
    layers=count(shapes, r"blocks\.([0-9]{1,9})\."),
    buckets=position[0],
    **{k: told.value("text encoder", said, k) for k in ("max_distance", "eps") if k in said},
  )
  told.check("text encoder", said, config)
  return config


def _umt5_config(config: Umt5Config, style: str) -> dict[str, Any] | None:
  if style == "original":
    return None
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": config.vocab,
    "d_model": config.dim,
    "d_kv": config.head_dim,
    "d_ff": config.dim_ffn,
    "num_layers": config.layers,
    "num_heads": config.heads,
    "relative_attention_num_buckets": config.buckets,
    "relative_attention_max_distance": config.max_distance,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": config.eps,
  }


def _infer_taehv(shapes: Shapes, cfg: Mapping[str, Any], say: list[str]) -> TaehvConfig:
  """Architecture of the tiny autoencoder: the published one, at other widths (spec section 13)."""
  del cfg, say
  stages = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
  need(shapes, dict.fromkeys(("encoder.0.weight", *stages), 4))
  return dataclasses.replace(
    TAEHV,
    z_dim=shapes[stages[0]][1],
    encoder_dim=shapes["encoder.0.weight"][0],
    decoder_dims=tuple(shapes[s][0] for s in stages),
  )


def _trim_taehv(config: TaehvConfig, tensors: Tensors) -> Tensors:
  """Takes the last frames of checkpoints that make more than the model needs of one."""
  trimmed = dict(tensors)
  for name, rows in taehv.grown_rows(config).items():
    tensor = tensors.get(name)
    if tensor is not None and tensor.shape[:1] > (rows,):
      trimmed[name] = Tensor(
        (rows, *tensor.shape[1:]), tensor.dtype, lambda t=tensor, n=rows: t.read()[-n:]
      )
  return trimmed


KINDS: dict[str, Kind] = {
  "dit": Kind(
    name="dit",
    config=WanConfig,
    table=dit.table,
    infer=_infer_dit,
    marks={
      "original": ("patch_embedding.weight", "text_embedding.0.weight"),
      "diffusers": ("patch_embedding.weight", "condition_embedder.time_proj.weight"),
    },
    names=dit.DIFFUSERS,
    folder="transformer",
    stems={"original": "diffusion_pytorch_model", "diffusers": "diffusion_pytorch_model"},
    published=dit.published_config,
    owns=dit.owns,
  ),
  "vae": Kind(
    name="vae",
    config=VaeConfig,
    table=vae.table,
    infer=_infer_vae,
    marks={
      "original": ("encoder.conv1.weight", "conv2.weight"),
      "diffusers": ("encoder.conv_in.weight", "post_quant_conv.weight"),
    },
    names=vae.table(WAN21).diffusers,
    folder="vae",
    stems={"original": "Wan2.1_VAE", "diffusers": "diffusion_pytorch_model"},
    published=_vae_config,
    owns=vae.owns,
  ),
  "umt5": Kind(
    name="umt5",
    config=Umt5Config,
    table=umt5.table,
    infer=_infer_umt5,
    marks={
      "original": ("token_embedding.weight", "blocks.0.attn.q.weight"),
      "diffusers": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    },
    names=umt5.TRANSFORMERS,
    folder="text_encoder",
    stems={"original": "models_t5_umt5-xxl-enc-bf16", "diffusers": "model"},
    published=_umt5_config,
    owns=umt5.owns,
    tied=umt5.TIED,
  ),
  "taehv": Kind(
    name="taehv",
    config=TaehvConfig,
    table=taehv.table,
    infer=_infer_taehv,
    marks={"original": ("encoder.0.weight", "decoder.1.weight")},
    names={},
    folder="taehv",
    stems={"original": "taew2_1"},
    published=lambda config, style: None,
    owns=lambda cfg: False,
    prepare=_trim_taehv,
  ),
}
