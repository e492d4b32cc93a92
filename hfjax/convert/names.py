"""Where each tensor of a published checkpoint lives in hfjax, and how its axes are folded.

One table serves both directions. A layout is an einops pattern from the published tensor to ours
and, read backwards, from ours to the published one.
"""

from typing import NamedTuple


class Leaf(NamedTuple):
  """One array of ours: its path, and the published tensors it is made of.

  Several sources are stacked along `axis`. A name with `{i}` stands for one tensor per layer, which
  are stacked along a leading axis.
  """

  path: str
  sources: tuple[str, ...]
  layouts: tuple[str, ...]
  axis: int | None = None


# Neighbouring channels (2j, 2j + 1) of a head form a rotary pair there, channels (j, j + d/2) here.
_ROTARY_ROWS = "(h pair two) i -> i h (two pair)"
_ROTARY = "(h pair two) -> h (two pair)"
_HEAD_ROWS = "(h d) i -> i h d"
_HEADS = "(h d) -> h d"
_MATRIX = "o i -> i o"
_OUT = "o (h d) -> h d o"
_SAME = "o -> o"


def _linear(path: str, source: str, matrix: str = _MATRIX, bias: str = _SAME) -> tuple[Leaf, Leaf]:
  return (
    Leaf(f"{path}/kernel", (f"{source}.weight",), (matrix,)),
    Leaf(f"{path}/bias", (f"{source}.bias",), (bias,)),
  )


def _norm(path: str, source: str) -> tuple[Leaf, Leaf]:
  return (
    Leaf(f"{path}/scale", (f"{source}.weight",), (_SAME,)),
    Leaf(f"{path}/bias", (f"{source}.bias",), (_SAME,)),
  )


def _fused(path: str, sources: tuple[str, ...], rotary: tuple[bool, ...]) -> tuple[Leaf, Leaf]:
  rows = tuple(_ROTARY_ROWS if r else _HEAD_ROWS for r in rotary)
  biases = tuple(_ROTARY if r else _HEADS for r in rotary)
  return (
    Leaf(f"{path}/kernel", tuple(f"{s}.weight" for s in sources), rows, axis=1),
    Leaf(f"{path}/bias", tuple(f"{s}.bias" for s in sources), biases, axis=0),
  )


_SELF, _CROSS = "blocks.{i}.self_attn", "blocks.{i}.cross_attn"

DIT: tuple[Leaf, ...] = (
  *_linear("patch_embedding", "patch_embedding", "o c 1 p q -> (p q c) o"),
  *_linear("text/in", "text_embedding.0"),
  *_linear("text/out", "text_embedding.2"),
  *_linear("time/in", "time_embedding.0"),
  *_linear("time/out", "time_embedding.2"),
  *_linear("time/projection", "time_projection.1", "(six o) i -> i six o", "(six o) -> six o"),
  Leaf("blocks/modulation", ("blocks.{i}.modulation",), ("1 six o -> six o",)),
  *_fused("blocks/self_attn/qkv", (f"{_SELF}.q", f"{_SELF}.k", f"{_SELF}.v"), (True, True, False)),
  Leaf("blocks/self_attn/norm_q/scale", (f"{_SELF}.norm_q.weight",), (_ROTARY,)),
  Leaf("blocks/self_attn/norm_k/scale", (f"{_SELF}.norm_k.weight",), (_ROTARY,)),
  *_linear("blocks/self_attn/out", f"{_SELF}.o", _OUT),
  *_norm("blocks/norm_cross", "blocks.{i}.norm3"),
  *_linear("blocks/cross_attn/q", f"{_CROSS}.q", _HEAD_ROWS, _HEADS),
  *_fused("blocks/cross_attn/kv", (f"{_CROSS}.k", f"{_CROSS}.v"), (False, False)),
  Leaf("blocks/cross_attn/norm_q/scale", (f"{_CROSS}.norm_q.weight",), (_HEADS,)),
  Leaf("blocks/cross_attn/norm_k/scale", (f"{_CROSS}.norm_k.weight",), (_HEADS,)),
  *_linear("blocks/cross_attn/out", f"{_CROSS}.o", _OUT),
  *_linear("blocks/ffn_in", "blocks.{i}.ffn.0"),
  *_linear("blocks/ffn_out", "blocks.{i}.ffn.2"),
  Leaf("head/modulation", ("head.modulation",), ("1 two o -> two o",)),
  *_linear("head/projection", "head.head"),
)

# Hybrid models only.
DIT_LINEAR: tuple[Leaf, ...] = _linear("blocks/self_attn/linear_proj", f"{_SELF}.linear_proj")

# Image-to-video models only.
DIT_IMAGE: tuple[Leaf, ...] = (
  *_norm("text/image_norm_in", "img_emb.proj.0"),
  *_linear("text/image_in", "img_emb.proj.1"),
  *_linear("text/image_out", "img_emb.proj.3"),
  *_norm("text/image_norm_out", "img_emb.proj.4"),
  *_fused("blocks/cross_attn/image_kv", (f"{_CROSS}.k_img", f"{_CROSS}.v_img"), (False, False)),
  Leaf("blocks/cross_attn/norm_image_k/scale", (f"{_CROSS}.norm_k_img.weight",), (_HEADS,)),
)

# Module names of Diffusers' WanTransformer3DModel, by original module name; shapes are the same.
DIT_DIFFUSERS: dict[str, str] = {
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
