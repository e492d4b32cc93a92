"""Low-rank adapters of a transformer (LoRA): made, merged into its weights, saved.

Adapters are a tree of their own, `{target: {"down", "up"}}` in float32 (see `convert.adapters`),
so that gradients and optimizers see them alone: `loss(merge(params, adapters, alpha))`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hfjax.convert import dit, source
from hfjax.convert.adapters import TARGETS, Factors, from_original, to_original
from hfjax.convert.source import CheckpointError
from hfjax.models.presets import WanConfig

Params = Mapping[str, Any]
Adapters = dict[str, dict[str, Array]]

# Several targets by one name; what a model lacks is left out of them.
GROUPS = {
  "self": ("q", "k", "v", "o"),
  "cross": ("cross_q", "cross_k", "cross_v", "cross_o", "cross_k_img", "cross_v_img"),
  "ffn": ("ffn_in", "ffn_out"),
  "all": tuple(TARGETS),
}
# Public tools (ComfyUI, Diffusers) know original names of Wan's by it.
_PREFIX = "diffusion_model."
_NAME = re.compile(r"(?:diffusion_model\.)?(blocks\.\d+\.[\w.]+?)\.(lora_[AB]\.weight|alpha)")
_ALPHAS: dict[str, np.dtype] = {
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
}  # of some tools


def init(params: Params, key: Array, rank: int, targets: Sequence[str] | str = "all") -> Adapters:
  """Adapters that change nothing yet: `up` is zero, `down` uniform as PEFT has it; float32.

  params: the transformer's, or their shapes. targets: names in `TARGETS` or `GROUPS`.
  Raises ValueError on an unknown target, one that the model lacks, or a rank below 1.
  """
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise ValueError(f"The rank of adapters is {rank!r}; it must be a whole number from 1 on.")
  adapters = {}
  for name in _expand(params, targets):
    layers, inputs, outputs = _sizes(params, name)
    # Drawn by the target alone, so that others make no difference.
    seed = jax.random.fold_in(key, [*TARGETS].index(name))
    limit = np.prod(inputs) ** -0.5
    down = jax.random.uniform(seed, (layers, *inputs, rank), jnp.float32, -limit, limit)
    adapters[name] = {"down": down, "up": jnp.zeros((layers, rank, *outputs), jnp.float32)}
  return adapters


def merge(params: Params, adapters: Mapping[str, Any], alpha: float | Array) -> dict[str, Any]:
  """Parameters with `alpha / rank * down @ up` added to each target's kernel.

  The sum is taken in float32; dtypes stay as they are. Gradients flow to the adapters only.
  Raises ValueError if adapters do not fit the model.
  """
  merged = jax.tree.map(jax.lax.stop_gradient, params)
  fused: dict[str, list[str]] = {}
  for name in adapters:
    _check(params, name, adapters[name])
    fused.setdefault(TARGETS[name].path, []).append(name)
  blocks = dict(merged["blocks"])
  for path, names in fused.items():
    *parents, last = path.split("/")
    place = blocks
    for parent in parents:
      place[parent] = dict(place[parent])
      place = place[parent]
    changes = {TARGETS[name].part: _change(adapters[name], alpha) for name in names}
    kernel = place[last]["kernel"]
    if None in changes:
      change = changes[None]
    else:  # one concatenation, as XLA's partitioner splits that well
      axis = 1 + TARGETS[names[0]].inputs
      blank = jnp.zeros_like(next(iter(changes.values())))
      change = jnp.stack([changes.get(i, blank) for i in range(kernel.shape[axis])], axis)
    kernel = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    place[last] = {**place[last], "kernel": kernel}
  return {**merged, "blocks": blocks}


def save(path: str | Path, config: WanConfig, adapters: Mapping[str, Any], alpha: float):
  """Writes adapters as safetensors under names that public tools take; all of it, or nothing.

  A layer's are `diffusion_model.blocks.0.self_attn.q.lora_A.weight` `[r i]`, `lora_B.weight`
  `[o r]` and `alpha`, channels in published order. Tools without the hybrid model's layer do not
  take its adapters (`linear_proj`). Arrays must be this process's own.
  Raises CheckpointError if the file cannot be written.
  """
  path, tensors = source.user_path(path), {}
  for module, factors in to_original(config, adapters).items():
    tensors[f"{_PREFIX}{module}.lora_A.weight"] = factors.down
    tensors[f"{_PREFIX}{module}.lora_B.weight"] = factors.up
    tensors[f"{_PREFIX}{module}.alpha"] = np.array(alpha, np.float32)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    save_file(tensors, part, {"format": "pt"})
    os.replace(part, path)
  except (OSError, SafetensorError) as e:
    why = getattr(e, "strerror", None) or e
    raise CheckpointError(f"The adapters cannot be written to {path} ({why}).") from e
  finally:
    if part.is_file():
      part.unlink()


def load(path: str | Path, config: WanConfig) -> tuple[dict[str, Any], float]:
  """Adapters, float32 on the host, and alpha of a file as `save` writes it.

  Files of other tools are read too if all their layers are blocks' linear ones, of one rank and
  alpha, in every block. Raises CheckpointError with a sentence on any other.
  """
  path = source.user_path(path)
  shapes, strange = dit.table(config).shapes, []
  known = {f"blocks.{i}.{t.module}" for i in range(config.layers) for t in TARGETS.values()}
  modules: dict[str, dict[str, np.ndarray]] = {}
  for name, tensor in source.read_safetensors(path, _ALPHAS).items():
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in known or f"{match[1]}.weight" not in shapes:
      strange.append(name)
    else:
      modules.setdefault(match[1], {})[match[2]] = tensor.read().astype(np.float32)
  if strange or not modules:
    shown = ", ".join(sorted(strange)[:5]) or "nothing"
    raise CheckpointError(
      f"{path} holds other things than adapters of this model's blocks ({shown}); give what "
      "training saved for the same architecture."
    )
  factors, alphas = {}, set()
  for module, held in modules.items():
    down, up = (held.get(f"lora_{x}.weight", np.zeros(())) for x in "AB")
    out, into = shapes[f"{module}.weight"]
    rank = down.shape[0] if down.ndim else 0
    alpha = held.get("alpha", np.array(rank, np.float32))
    if (down.shape, up.shape, alpha.size) != ((rank, into), (out, rank), 1) or not rank:
      raise CheckpointError(
        f"{path} has adapters of {module} that do not fit its weight [{out}, {into}]: "
        f"{', '.join(f'{k} {list(x.shape)}' for k, x in sorted(held.items()))}; give what training "
        "saved for the same architecture."
      )
    factors[module] = Factors(down, up)
    alphas.add((rank, float(alpha.item())))
  if len(alphas) > 1:
    raise CheckpointError(
      f"{path} has adapters of several ranks and alphas ({sorted(alphas)[:5]}), and training takes "
      "one; merge it by the converter's --lora instead."
    )
  try:
    return from_original(config, factors), alphas.pop()[1]
  except KeyError as e:
    raise CheckpointError(
      f"{path} has no adapters of {e.args[0]}, and training wants them in every block; merge it by "
      "the converter's --lora instead."
    ) from e


def _expand(params: Params, targets: Sequence[str] | str) -> list[str]:
  """Targets by their own names, in the order of the table."""
  wanted = (targets,) if isinstance(targets, str) else tuple(targets)
  have = [name for name in TARGETS if _kernel(params, name) is not None]
  chosen: set[str] = set()
  for name in wanted:
    group = GROUPS.get(name)
    if group is None and name not in have:
      why = "this model has no" if name in TARGETS else "there is no"
      raise ValueError(
        f"Adapters of {name!r} were asked for, and {why} such layer; choose of {', '.join(have)}, "
        f"or {', '.join(GROUPS)}."
      )
    chosen |= {name} if group is None else {*group} & {*have}
  if not chosen:
    raise ValueError(
      f"Adapters of no layer were asked for; choose of {', '.join(have)}, or {', '.join(GROUPS)}."
    )
  return [name for name in have if name in chosen]


def _kernel(params: Params, name: str) -> Any:
  """The kernel that holds a target, or None."""
  place: Any = params["blocks"]
  for key in TARGETS[name].path.split("/"):
    place = place.get(key, {})
  return place.get("kernel")


def _sizes(params: Params, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
  """Layers, and lengths of a target's axes of inputs and of outputs."""
  target, (layers, *rest) = TARGETS[name], _kernel(params, name).shape
  outputs = rest[target.inputs + (target.part is not None) :]
  return layers, tuple(rest[: target.inputs]), tuple(outputs)


def _check(params: Params, name: str, pair: Mapping[str, Any]):
  if name not in TARGETS or _kernel(params, name) is None:
    raise ValueError(
      f"There are adapters of {name!r}, and the model has no such layer; use the model that they "
      "were made for."
    )
  layers, inputs, outputs = _sizes(params, name)
  down, up = pair["down"].shape, pair["up"].shape
  rank = down[-1]
  if down != (layers, *inputs, rank) or up != (layers, rank, *outputs):
    raise ValueError(
      f"The adapters of {name} have shapes {down} and {up}, and the model's layer takes "
      f"{(layers, *inputs, 'rank')} and {(layers, 'rank', *outputs)}; use the model that they were "
      "made for."
    )


def _change(pair: Mapping[str, Any], alpha: float | Array) -> Float[Array, "l ..."]:
  """What a target's adapters add to its matrix, in float32."""
  down, up = pair["down"].astype(jnp.float32), pair["up"].astype(jnp.float32)
  # Few operations, so that accuracy is cheap: GPUs would take TF32.
  matmul = lambda a, b: jnp.tensordot(a, b, 1, precision="highest")
  return alpha / down.shape[-1] * jax.vmap(matmul)(down, up)
