"""Cases of single parts: schedule, embeddings, sparse attention, networks on whole inputs."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import pallas_kernels
from goldens.file import (
  AUTOENCODER,
  EMBEDDING,
  FORWARD,
  SPARSE,
  Golden,
  Row,
  UnreadableError,
  halves_to_pairs,
  model,
  pairs_to_halves,
)
from hfjax.convert import dit
from hfjax.convert import umt5 as text_names
from hfjax.convert import vae as video_names
from hfjax.diffusion.schedule import TRAIN_TIMESTEPS, FlowSchedule, training_target
from hfjax.models import rope, wan
from hfjax.models import umt5 as text_encoder
from hfjax.models import vae as video_coder


def schedule(g: Golden) -> Iterator[Row]:
  expected = {
    "sigma_min": 0.0,
    "sigma_max": 1.0,
    "extra_one_step": True,
    "num_train_timesteps": TRAIN_TIMESTEPS,
  }
  for key, value in expected.items():
    if g.cfg.get(key, value) != value:
      raise UnreadableError(
        f"{g.name} has {key} {g.cfg[key]}; hfjax's schedule is made for {value}."
      )
  for entry in g.setting("shifts"):
    name = f"shift{entry['shift']:g}/"
    i, o = "in/" + name, "out/" + name
    table, few = FlowSchedule(entry["shift"]), FlowSchedule(entry["shift"], entry["few_steps"])
    t, clean, noise, x_t = (jnp.asarray(g[i + k]) for k in ("t", "clean", "noise", "xt"))
    yield from g.close_to_magnitude(o + "sigmas", table.sigmas)
    yield from g.close_to_magnitude(o + "timesteps", table.timesteps)
    yield from g.close_to_magnitude(o + "training_weights", table.training_weights)
    yield from g.close_to_magnitude(
      o + "warped_steps", table.warp(g[i + "denoising_steps"].tolist())
    )
    yield from g.equal(o + "timestep_id", table.index(t))
    yield from g.close_to_magnitude(o + "training_weight_at_t", table.training_weight(t))
    yield from g.close_to_magnitude(o + "noisy", table.add_noise(clean, noise, t))
    yield from g.close_to_magnitude(o + "training_target", training_target(clean, noise))
    flow = jnp.asarray(g[i + "flow"])
    yield from g.close_to_magnitude(o + "x0_from_flow", table.x0_from_flow(flow, x_t, t))
    # The golden takes its noisy and clean latents from these two inputs.
    yield from g.close_to_magnitude(o + "flow_from_x0", table.flow_from_x0(clean, x_t, t))
    yield from g.close_to_magnitude(o + "few_sigmas", few.sigmas)
    yield from g.close_to_magnitude(o + "few_timesteps", few.timesteps)
    x, states = jnp.asarray(g[i + "few_start"]), []
    outputs = jnp.asarray(g[i + "few_model_outputs"])
    for flow, tau in zip(outputs, few.timesteps, strict=True):
      x = few.step(flow, x, jnp.full(x.shape[:1], tau))
      states.append(x)
    yield from g.close_to_magnitude(o + "few_states", jnp.stack(states))
    n, start = g.setting("to_final_index"), jnp.asarray(g[i + "few_start"])
    final = few.step(outputs[n], start, jnp.full(start.shape[:1], few.timesteps[n]), to_final=True)
    yield from g.close_to_magnitude(o + "step_to_final", final)


def embeddings(g: Golden) -> Iterator[Row]:
  for width in g.setting("sinusoidal_dims"):
    got = rope.timestep_embedding(g["in/positions"], width)
    yield from g.close(f"out/sinusoidal_{width}", got, EMBEDDING)
  for n, case in enumerate(g.setting("rope_cases")):
    d = case["head_dim"]
    x = pairs_to_halves(g[f"in/rope{n}_x"])
    frames, *grid = case["grid"]
    if g.has(f"out/rope{n}_freq_cos"):
      rows = jnp.arange(g[f"out/rope{n}_freq_cos"].shape[0])
      parts = [rope.turn(rows, rope.frequencies(w)) for w in rope.split_pairs(d // 2)]
      for k, name in enumerate(("cos", "sin")):
        table = jnp.concatenate([p[k] for p in parts], axis=-1)
        yield from g.close(f"out/rope{n}_freq_{name}", table, EMBEDDING)
    for key, start in (
      (f"out/rope{n}", 0),
      *((f"out/rope{n}_start{s}", s) for s in g.setting("starts")),
    ):
      at = jnp.broadcast_to(start + jnp.arange(frames), (x.shape[0], frames))
      rotation = rope.grid_rotation(at, tuple(grid), d)
      tokens = rotation.cos.shape[1]
      turned = rope.rotate(jnp.asarray(x[:, :tokens]), rotation)
      got = np.concatenate([np.asarray(turned), x[:, tokens:]], axis=1)
      yield from g.close(key, halves_to_pairs(got), EMBEDDING)


def block_sparse(g: Golden) -> Iterator[Row]:
  for case in g.setting("cases"):
    q, k, v, cot = (jnp.asarray(g[f"in/{case['name']}/{n}"]) for n in ("q", "k", "v", "cot"))
    block = case["block"]
    for ratio in case["ratios"]:
      for layout, center in (("bsld", "heads"), ("bhld", "sequence")):
        o = f"out/{case['name']}/ratio{ratio:g}/{layout}/"
        index, count = pallas_kernels.block_map(
          q, k, ratio, center=center, block_q=block, block_k=block
        )
        blocks = pallas_kernels.num_blocks(k.shape[1], block)
        chosen = np.zeros((*index.shape[:3], blocks), np.int8)
        np.put_along_axis(chosen, np.asarray(index), 1, axis=-1)
        yield from g.equal(o + "real_topk", [count.max()])
        yield from g.equal(o + "block_map", chosen)
        yield from g.equal(o + "lut_sorted", np.sort(index, axis=-1))
        attend = partial(
          pallas_kernels.block_sparse_attention,
          block_index=index,
          block_count=count,
          block_q=block,
          block_k=block,
        )
        out, back = jax.vjp(lambda *a, attend=attend: attend(*a), q, k, v)
        turn = (0, 1, 2, 3) if layout == "bsld" else (0, 2, 1, 3)
        yield from g.close(o + "out", out.transpose(turn), SPARSE)
        for name, grad in zip(("dq", "dk", "dv"), back(cot), strict=True):
          yield from g.close(o + name, grad.transpose(turn), SPARSE)


def wan_bidirectional(g: Golden) -> Iterator[Row]:
  config, params = model(g)
  for batch in sorted({k.split("/")[1] for k in g.arrays if k.startswith("in/")}):
    i, o = f"in/{batch}/", f"out/{batch}/"
    x, cot = (rearrange(g[i + k], "b c f y x -> b f y x c") for k in ("x", "cot"))
    context = np.zeros((x.shape[0], config.text_len, config.text_dim), np.float32)
    for n in range(x.shape[0]):
      rows = g[f"{i}context{n}"]
      context[n, : rows.shape[0]] = rows
    forward = jax.jit(lambda p, x=x, t=g[i + "t"], c=context: wan.predict_flow(config, p, x, t, c))
    flow, back = jax.vjp(forward, params)
    yield from g.close(o + "flow", rearrange(flow, "b f y x c -> b c f y x"), FORWARD)
    grads = dit.to_original(config, back(jnp.asarray(cot))[0])
    for name in g.setting("grads"):
      yield from g.close_to_norm(f"{o}grad/{name}", grads[name])


def umt5(g: Golden) -> Iterator[Row]:
  config = text_names.config_from_original(g.cfg)
  params = jax.tree.map(jnp.asarray, text_names.from_original(config, g.params()))
  encode = jax.jit(text_encoder.encode, static_argnums=(0, 4, 5))
  for n in range(len(g.setting("batches"))):
    i, o = f"in/batch{n}/", f"out/batch{n}/"
    inputs = (g[i + "ids"], g[i + "mask"].sum(axis=1), jnp.float32)
    yield from g.close(o + "hidden", encode(config, params, *inputs, True), FORWARD)
    yield from g.close(o + "hidden_padding_zeroed", encode(config, params, *inputs, False), FORWARD)
  got = text_encoder.relative_buckets(
    g["in/relative_positions"], config.buckets, config.max_distance
  )
  yield from g.equal("out/relative_buckets", got)


def vae(g: Golden) -> Iterator[Row]:
  statistics = {f"latents_{k}": g[f"in/{k}"].tolist() for k in ("mean", "std")}
  config = video_names.config_from_original({**g.cfg, **statistics})
  params = jax.tree.map(jnp.asarray, video_names.from_original(config, g.params()))
  encode, decode = (jax.jit(partial(f, config)) for f in (video_coder.encode, video_coder.decode))
  video, latent, stream = (
    rearrange(g[f"in/{k}"], "b c t y x -> b t y x c") for k in ("video", "latent", "latent_stream")
  )

  def close(key: str, x: Any) -> Iterator[Row]:
    yield from g.close(
      f"out/{key}", rearrange(np.asarray(x), "b t y x c -> b c t y x"), AUTOENCODER
    )

  yield from close("encoded", encode(params, video))
  yield from close("encoded_first_frame_only", encode(params, video[:, :1]))
  yield from close("decoded", decode(params, latent))
  first, cache = jax.jit(partial(video_coder.decode_first, config))(params, stream[:, :1])
  go_on = jax.jit(partial(video_coder.decode_chunk, config))
  at = 0
  for n, frames in enumerate(g.setting("pieces")):
    given = stream[:, max(at, 1) : at + frames]
    pixels = [] if at else [first]
    if given.shape[1]:
      more, cache = go_on(params, cache, given)
      pixels.append(more)
    yield from close(f"cached_decode_piece{n}", jnp.concatenate(pixels, axis=1))
    at += frames
