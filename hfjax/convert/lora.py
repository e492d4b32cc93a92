"""Low-rank updates of transformer weights, merged while a checkpoint is read.

An update of a weight W of rank r is `strength * alpha / r * up @ down`. Alpha is a tensor beside up
and down, or in the file's metadata (Diffusers), or in adapter_config.json (PEFT); else it is r.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from hfjax.convert import source
from hfjax.convert.checkpoint import Part, count_not_finite
from hfjax.convert.source import CheckpointError, Tensor, Tensors

# Ends of names: Diffusers' and PEFT's A and B, original down and up; alpha; whole differences, of a
# weight, a bias, a modulation.
_ENDS = {
  ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora_A.default.weight": "down",
  ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora_B.default.weight": "up",
  ".lora.down.weight": "down", ".lora.up.weight": "up",
  ".alpha": "alpha", ".diff": "diff", ".diff_b": "diff_b", ".diff_m": "diff_m",
}  # fmt: skip
# Some tools write alpha as a whole number.
_ALPHAS: dict[str, np.dtype] = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
# What else updates of weights may be, by patterns in the names that are left over.
_OTHERS = {
  r"\.dora_scale$|\.lora_magnitude_vector\b": "a DoRA, which scales the rows of weights as well",
  r"\.hada_w[12]|\.hada_t[12]": "a LoHa, of products of two low-rank updates",
  r"\.lokr_[wt][12]": "a LoKr, of Kronecker products",
  r"\.oft_(blocks|diag)|\.oft_R\b": "an OFT, which rotates weights",
  r"\.lora_B(\.\w+)?\.bias$": "a LoRA with biases of its own (lora_B.bias)",
  r"[._](k_img|v_img|add_k_proj|add_v_proj|img_emb|image_embedder)\b": (
    "of an image-to-video model, and this is a text-to-video one"
  ),
}
_CHANGED = {".diff_b": "bias", ".diff_m": "modulation"}  # the weight, else
_PREFIXES = (
  "transformer.", "diffusion_model.", "base_model.model.", "pipe.dit.", "model.", "lora_unet__",
  "lora_unet_", "lora_transformer_",
)  # fmt: skip


def parse(text: str) -> tuple[Path, float]:
  """File and strength of `FILE[@STRENGTH]`; CheckpointError if it is anything else."""
  endings = "|".join(map(re.escape, (".safetensors", *source.PICKLES)))
  match = re.fullmatch(rf"(.*(?:{endings}))(?:@(.*))?", text, re.DOTALL)
  if match is None:
    raise CheckpointError(
      f"{text!r} names no file of weights; give FILE.safetensors or FILE.pt, or the same with "
      "@STRENGTH behind."
    )
  path, strength = match[1], "1" if match[2] is None else match[2]
  try:
    value = float(strength)
  except ValueError:
    value = float("nan")
  if not np.isfinite(value):
    raise CheckpointError(f"The strength {strength!r} of {path} is no number; give, say, 0.8.")
  return source.user_path(path), value


def merge(parts: Sequence[Part], path: Path, strength: float = 1.0) -> list[Part]:
  """Parts with the file's updates merged into the transformer.

  Raises CheckpointError if there is no transformer, or if an update fits none of its weights.
  """
  target = next((p for p in parts if p.kind.name == "dit"), None)
  if target is None:
    raise CheckpointError(f"{path} updates a transformer, and the checkpoint holds none.")
  updates = _collect(path, _read(path), target)
  tensors, told = dict(target.tensors), _settings(path)
  for name, update in updates.items():
    tensors[name] = _merged(name, tensors[name], update, strength, path, told)
  note = f"Merged {len(updates)} updates of {path.name} at strength {strength:g}."
  merged = dataclasses.replace(
    target,
    tensors=tensors,
    notes=(*target.notes, note),
    origin={**target.origin, "lora": [*target.origin.get("lora", []), [path.name, strength]]},
  )
  return [merged if p is target else p for p in parts]


def _read(path: Path) -> Tensors:
  """Tensors of a file, of PyTorch those of the one dictionary in it that holds updates."""
  if path.suffix not in source.PICKLES:
    return source.read_safetensors(path, _ALPHAS)
  found = {
    key: held
    for key, held in source.nested(source.read_pickle(path))
    if any(str(name).endswith(tuple(_ENDS)) for name in held)
  }
  if len(found) != 1:
    raise CheckpointError(
      f"{path} holds {len(found)} sets of low-rank updates ({', '.join(found) or 'none'}); give a "
      "file with one."
    )
  return source.pickle_tensors(path, *found.values())


def _collect(path: Path, tensors: Tensors, part: Part) -> dict[str, dict[str, Tensor]]:
  """Updates by the original name of the weight they change."""
  # Some tools write dots as underscores, so that names are looked up rather than translated.
  known: dict[str, str] = {}
  for name in part.tensors:
    module = name.rpartition(".")[0]
    for alias in (module, part.table.diffusers_name(name).rpartition(".")[0]):
      known[alias] = known[alias.replace(".", "_")] = module
  updates: dict[str, dict[str, Tensor]] = {}
  strange, twice = [], []
  for name, tensor in tensors.items():
    end = next((e for e in _ENDS if name.endswith(e)), None)
    module = known.get(_bare(name.removesuffix(end or "")), "")
    weight = f"{module}.{_CHANGED.get(end or '', 'weight')}"
    if end is None or weight not in part.tensors:
      strange.append(name)
    elif _ENDS[end] in updates.setdefault(weight, {}):
      twice.append(name)
    else:
      updates[weight][_ENDS[end]] = tensor
  if twice:
    raise CheckpointError(
      f"{path} updates weights twice, under several names: {', '.join(sorted(twice)[:20])}; keep "
      "one of each."
    )
  if strange or not updates:
    shown = ", ".join(sorted(strange)[:20]) or "nothing"
    kind = next((k for p, k in _OTHERS.items() if any(re.search(p, n) for n in strange)), None)
    if kind:
      raise CheckpointError(
        f"{path} is {kind}; give a plain LoRA of this model. {len(strange)} of its tensors fit no "
        f"weight: {shown}."
      )
    raise CheckpointError(
      f"{path} holds {len(strange)} tensors that update no weight of this transformer: {shown}. It "
      "is of another model, or no LoRA."
    )
  return updates


def _settings(path: Path) -> dict[str, float]:
  """Alpha, and whether it is divided by the root of the rank, where they lie beside the tensors.

  Raises CheckpointError on settings that differ from module to module, or are no numbers.
  """
  if path.suffix in source.PICKLES:
    return {}
  with safe_open(path, framework="np") as f:
    text = (f.metadata() or {}).get("lora_adapter_metadata")
  beside = path.parent / "adapter_config.json"
  if text is not None:
    try:
      held = json.loads(text)
    except ValueError:
      held = None
    told = {str(k).rpartition(".")[2]: v for k, v in held.items()} if type(held) is dict else None
  elif path.name == "adapter_model.safetensors" and beside.is_file():
    told = source.read_json(beside)
  else:
    return {}
  alpha: Any = None if told is None else told.get("lora_alpha")
  number = type(alpha) in (int, float) and math.isfinite(alpha)
  if told is None or told.get("alpha_pattern") or not (number or alpha is None):
    raise CheckpointError(
      f"{path} comes with settings that cannot be followed ({str(told)[:200]}); give a file with a "
      "tensor alpha for each module."
    )
  rooted = {"rooted": 1.0} if told.get("use_rslora") else {}
  return rooted if alpha is None else {"alpha": float(alpha), **rooted}


def _bare(name: str) -> str:
  while True:
    prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
    if prefix is None:
      return re.sub(r"\.(base_layer|default)$", "", name)
    name = name.removeprefix(prefix)


def _merged(
  name: str,
  weight: Tensor,
  update: dict[str, Tensor],
  strength: float,
  path: Path,
  told: dict[str, float],
) -> Tensor:
  shapes = {k: t.shape for k, t in update.items()}
  if len(shapes) == 1 and next(iter(shapes)).startswith("diff"):
    fits = weight.shape in shapes.values()
  elif shapes.keys() - {"alpha"} == {"up", "down"}:
    up, down = shapes["up"], shapes["down"]
    fits = (
      min(len(up), len(down)) >= 2
      and math.prod(up[1:]) == down[0] > 0
      and (up[0], math.prod(down[1:])) == (weight.shape[0], math.prod(weight.shape[1:]))
      and math.prod(shapes.get("alpha", ())) == 1
    )
  else:
    fits = False
  if not fits:
    has = ", ".join(f"{k} {list(s)}" for k, s in sorted(shapes.items()))
    raise CheckpointError(
      f"{path} updates {name} of shape {list(weight.shape)} with {has}, which does not fit: an "
      "update is up and down, with one alpha or none, or a whole difference."
    )

  def read(row: int | None = None) -> np.ndarray:
    x = weight.read()
    was_finite = not count_not_finite(x)
    parts = {k: t.read().astype(np.float32) for k, t in update.items()}
    with np.errstate(all="ignore"):  # what comes of it is looked at below
      if "up" in parts:
        rank = parts["down"].shape[0]
        if "alpha" in parts:
          scale = float(parts["alpha"].item()) / rank
        else:
          scale = told.get("alpha", rank) / (rank**0.5 if "rooted" in told else rank)
        up, down = parts["up"].reshape(-1, rank), parts["down"].reshape(rank, -1)
        change = strength * scale * (up @ down).reshape(x.shape)
      else:
        change = strength * next(iter(parts.values()))
      x = (x.astype(np.float32) + change).astype(weight.dtype)
    bad = count_not_finite(x)
    if bad and was_finite:
      raise CheckpointError(
        f"{path} at strength {strength:g} makes {bad} numbers of {name} NaN or infinite; it is "
        "damaged, or the strength too large."
      )
    return x if row is None else x[row]

  return Tensor(weight.shape, weight.dtype, read)
