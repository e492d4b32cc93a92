"""Stage `vae`: what it measures, and its runs, of a linear network, which compiles in no time."""

import dataclasses
import json
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import pipeline, train
from hfjax.data import shapes, shards
from hfjax.data.made import MadeClips
from hfjax.models import vae
from hfjax.models.vae import VaeConfig
from hfjax.training import autoencoder, config, plan, weights
from hfjax.training.feed import Feed
from hfjax.training.stages import Stage
from hfjax.video import read_image, read_video
from tests.training.runs import (
  FLOW,
  arrays,
  asks,
  assert_same_arrays,
  each_batch,
  metrics,
  one_device,
  said,
  saved,
  small_programs,
)

# Two pixels a side and two frames to a latent, but for the first frame.
MINI = VaeConfig(
  dim=4, z_dim=4, mean=(0.5,) * 4, std=(2.0,) * 4, dim_mult=(1, 2), num_res_blocks=1,
  temporal_downsample=(True,),
)  # fmt: skip
STEPS, FRAMES, SIDE = 60, 5, 16
VAE = [
  *FLOW,
  "--config.stage=vae",
  "--config.vae.weights=random:small",
  "--config.text.weights=nowhere",  # which nothing looks for
  f"--config.steps={STEPS}",
  "--config.optimizer.rate=0.03",
  f"--config.autoencoder.frames={FRAMES}",
  f"--config.geometry.height={SIDE // 2}",
  f"--config.geometry.width={SIDE // 2}",
  "--config.checkpoint.every=30",
  f"--config.validation.every={STEPS}",
]
CLIPS = MadeClips(FRAMES, SIDE, SIDE, 3, count=8, seed=0)  # those of the runs


LINEAR = dataclasses.replace(MINI, dim=2)  # not those of networks that were traced


class Encoder(nn.Module):
  """Stands for `vae.Encoder`: the mean of the frames, two pixels by two, by a matrix."""

  config: VaeConfig
  dtype: Any = jnp.float32
  moments: bool = False

  @nn.compact
  def __call__(self, x, past=None):
    b, t, rows, columns, _ = x.shape
    y = x.reshape(b, t // 2, 2, rows, columns, 3).mean(axis=2) if past else x[:, :1]
    y = y.reshape(b, -1, rows // 2, 2, columns // 2, 2, 3).swapaxes(3, 4)
    y = nn.Dense(2 * self.config.z_dim, name="dense")(y.reshape(*y.shape[:4], 12))
    return y if self.moments else y[..., : self.config.z_dim], {"conv_in": x[:, -1:]}


class Decoder(nn.Module):
  """Stands for `vae.Decoder`, likewise."""

  config: VaeConfig
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, z, past=None):
    b, f, rows, columns, _ = z.shape
    x = nn.Dense(12, name="dense")(z).reshape(b, f, rows, columns, 2, 2, 3).swapaxes(3, 4)
    x = x.reshape(b, f, 2 * rows, 2 * columns, 3)
    return jnp.repeat(x, 2, axis=1) if past else x, {"conv_in": z[:, -1:]}


@pytest.fixture(scope="module", autouse=True)
def programs():
  with small_programs(), one_device(), pytest.MonkeyPatch.context() as patch:
    patch.setitem(pipeline._SMALL, "vae", LINEAR)
    patch.setattr(vae, "Encoder", Encoder)
    patch.setattr(vae, "Decoder", Decoder)
    yield


def run(workdir, *more):
  return train.main([*VAE, f"--workdir={workdir}", *more])


def planned(*more):
  return plan.make_plan(config.parse([*VAE, "--workdir=unused", *more]).config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that nothing interrupts."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(weights, "Encoder", None)  # there is no text to be encoded
    patch.setattr(weights, "load_autoencoder", None)
    assert run(folder) == 0
  return folder


@pytest.fixture(scope="module")
def held(whole):
  """Arrays and note of its last step."""
  return arrays(whole, STEPS)


# What is measured


@pytest.mark.parametrize("count", [1, 8, 19])
def test_statistics_are_those_of_all_clips(monkeypatch, count):
  r = np.random.default_rng(0)
  clips = list(r.integers(0, 256, (count, 5, 4, 4, 3), np.uint8))
  # The last channel hardly changes.
  latents = lambda x: x[..., [0, 1, 2, 0]] / 9 * [1, 2, 3, 1e-6] + [5, -6, 7, 8]
  seen = []

  def encode(config, dtype, params, batch):
    seen.append(len(batch))
    return latents(batch)

  monkeypatch.setattr(autoencoder, "_encode", encode)
  mean, std = autoencoder.statistics(LINEAR, None, clips, "float32")
  rows = latents(np.stack(clips)).reshape(-1, 4)
  np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-12)
  np.testing.assert_allclose(std[:3], rows.std(axis=0)[:3], rtol=1e-12)
  assert std[3] == 1e-3 and max(seen) <= 8
  json.dumps([mean, std])


def test_the_ratio_is_of_bytes():
  a = np.full((2, 3), 250, np.uint8)
  assert autoencoder.psnr(a, a) == math.inf
  assert autoencoder.psnr(a, a - 250) == pytest.approx(20 * math.log10(255 / 250))
  assert autoencoder.psnr(a - 249, a - 250) == pytest.approx(20 * math.log10(255))


# What a run leaves behind


def test_it_learns(whole):
  rows = [row for row in metrics(whole) if "autoencoder/loss" in row]
  assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
  first, last = ([row["autoencoder/psnr"] for row in x] for x in (rows[:3], rows[-3:]))
  assert np.mean(last) > np.mean(first) + 12  # measured: 2.8 and 20.3
  want = {"loss", "psnr", "distance", "edges", "divergence", "latent_power", "learning_rate"}
  assert {f"autoencoder/{name}" for name in want} <= rows[0].keys()
  assert all(row["autoencoder/skipped"] == 0 for row in rows)


def test_videos_show_clips_beside_what_comes_back(whole):
  (row,) = [row for row in metrics(whole) if "validation/raw_psnr" in row]
  (other,) = [row for row in metrics(whole) if "validation/ema_psnr" in row]
  assert row["step"] == other["step"] == STEPS
  assert row["validation/raw_psnr"] > 19 and other["validation/ema_psnr"] > 19
  stems = [f"step-{STEPS:06d}-{kind}-{i}" for kind in ("raw", "ema") for i in (0, 1)]
  files = {x.name for x in (whole / "videos").iterdir()}
  assert files == {stem + end for stem in stems for end in (".mp4", ".png")}
  ratios = []
  for i in (0, 1):
    frames = read_video(whole / f"videos/step-{STEPS:06d}-raw-{i}.mp4").frames
    assert frames.shape == (FRAMES, SIDE, 2 * SIDE, 3)
    assert read_image(whole / f"videos/step-{STEPS:06d}-raw-{i}.png").size
    clip = CLIPS[i]["video"]
    assert autoencoder.psnr(frames[:, :, :SIDE], clip) > 25  # what compression leaves
    ratios.append(autoencoder.psnr(frames[:, :, SIDE:], clip))
  assert np.mean(ratios) == pytest.approx(row["validation/raw_psnr"], abs=2)


def test_a_run_without_videos_to_show_makes_none(tmp_path):
  told = []
  autoencoder.validate(planned(), {"raw": None}, [], 3, tmp_path, None, told.append)
  assert not told and not [*tmp_path.iterdir()]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, held, tmp_path, capsys):
  with each_batch(asks(25)):
    assert run(tmp_path) == 0
  assert saved(tmp_path) == [25]
  assert run(tmp_path) == 0
  assert "Going on after step 25." in said(capsys)
  assert metrics(tmp_path) == metrics(whole)
  (got, note), (want, whole_note) = arrays(tmp_path, STEPS), held
  assert_same_arrays(got, want)
  assert {k.split("/")[0] for k in want} == {"vae", "vae_ema", "optimizers"}
  assert note["models"] == whole_note["models"] and note["data"] == whole_note["data"]


def test_it_tells_statistics_of_its_latents(held):
  """Of both, in NumPy."""
  clips = np.stack([CLIPS[i]["video"] for i in range(8)]) / 127.5 - 1
  pairs = (clips[:, 1::2] + clips[:, 2::2]) / 2
  x = np.concatenate([clips[:, :1], pairs], axis=1)
  x = x.reshape(8, 3, SIDE // 2, 2, SIDE // 2, 2, 3).swapaxes(3, 4).reshape(-1, 12)
  for name in ("vae", "vae_ema"):
    kernel, bias = (np.float64(held[0][f"{name}/encoder/dense/{x}"]) for x in ("kernel", "bias"))
    z = x @ kernel[:, :4] + bias[:4]
    told = held[1]["models"][name]
    np.testing.assert_allclose(told["mean"], z.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(told["std"], z.std(axis=0), rtol=1e-5)
    rest = dataclasses.replace(VaeConfig(**{k: tuple(v) if isinstance(v, list) else v
                                            for k, v in told.items()}),
                               mean=LINEAR.mean, std=LINEAR.std)  # fmt: skip
    assert rest == LINEAR


def test_it_is_no_transformer(whole, tmp_path, capsys):
  args = [*FLOW, f"--workdir={tmp_path}/run", f"--config.init={whole}"]
  assert train.main(args) == 1
  (line,) = said(capsys)
  assert line.startswith("train: init of the config cannot be used. ")
  assert line.endswith(f"{whole} holds no dit: only vae.")


# Before training


def test_a_dry_run_tells_its_size(tmp_path, capsys, monkeypatch):
  # Compiling takes its time, and is the other stages' as well.
  same = staticmethod(lambda plan, part: jax.jit(lambda part, fixed, batch, key: part))
  monkeypatch.setattr(Stage, "make", same)
  assert run(tmp_path / "run", "--dry_run") == 0
  out, error = capsys.readouterr()
  tree = jax.eval_shape(lambda: vae.init_params(LINEAR, jax.random.key(0)))
  size = sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert f"  autoencoder (trained): {size:,} parameters\n" in out
  assert "student" not in out and "  autoencoder: " not in out
  assert "update of the autoencoder: " in out and "TFLOP as XLA counts" in out and not error
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("more", "status", "words"),
  [
    (["vae.weights=none"], 2, "trains the whole autoencoder that vae.weights names"),
    (["lora.rank=2"], 2, "set lora.rank to 0"),
    (["autoencoder.frames=4"], 2, "clips of 4 frames; give 1 and a multiple of 2, at least 3"),
    (["autoencoder.kl=-1.0"], 2, "are -1.0, 1.0 and 1.0; give at least 0"),
    (["optimizer.kind=muon"], 2, "optimizer.kind is muon, which moves matrices of transformers"),
    (
      ["autoencoder.decoder_only=true", "optimizer.decay=0.01"],
      2,
      "optimizer.decay is 0.01, by which an encoder that shall stay would shrink",
    ),
    (["vae.weights=/nowhere"], 1, "/nowhere"),
    (["student.weights=random:tiny"], 2, "latents of 16 channels, and the autoencoder"),
    (["data.path=shapes"], 1, "Clips of the shapes world are 128 pixels wide and high; set geom"),
    (["data.path=/nowhere"], 1, "There is no /nowhere to read clips from; make it with tools/make"),
  ],
)
def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, capsys, more, status, words):
  assert run(tmp_path / "run", *(f"--config.{x}" for x in more)) == status
  (line,) = said(capsys)
  assert line.startswith("train: ") and words in line and line.endswith(".")


# Its data


def clips_folder(folder, side=SIDE, prompts="abcd"):
  def make(start, stop, reject):
    for i in range(start, stop):
      yield {"prompt": prompts[i], "video": np.full((FRAMES, side, side, 3), i, np.uint8)}

  told = {"video": ((FRAMES, side, side, 3), "uint8")}
  shards.write(folder, shards.Plan("clips", len(prompts), told, {}), make)
  return f"--config.data.path={folder}"


def test_clips_of_a_folder_are_taken_and_bad_ones_left_out(tmp_path):
  p = planned(clips_folder(tmp_path / "data", prompts=("a", " ", "c", "d")))
  feed = Feed(p, None, tmp_path, print)
  assert [clip.flat[0] for clip in feed.clips(9)] == [0, 2, 3]
  assert [clip.flat[0] for clip in feed.clips(2)] == [0, 2]
  with pytest.warns(UserWarning, match="empty prompt"):
    batches = [feed()["video"] for _ in range(3)]
  assert batches[0].shape == (1, 2, FRAMES, SIDE, SIDE, 3) and batches[0].dtype == jnp.uint8
  assert {int(x[0, i, 0, 0, 0, 0]) for x in batches for i in (0, 1)} == {0, 2, 3}
  assert feed.rejected == 1


def test_clips_of_the_world_of_shapes_are_drawn(tmp_path):
  side = [f"--config.geometry.{name}=64" for name in ("height", "width")]
  p = planned("--config.data.path=shapes", "--config.data.made=2", "--config.seed=3", *side)
  feed, clips = Feed(p, None, tmp_path, print), shapes.Shapes("train", 2, 3, FRAMES)
  batch = np.asarray(feed()["video"][0])
  assert batch.shape == (2, FRAMES, 128, 128, 3)
  want = [clips[i]["video"] for i in range(2)]
  assert sorted(x.tobytes() for x in batch) == sorted(x.tobytes() for x in want)
  np.testing.assert_array_equal(feed.clips(9), want)


def test_clips_of_another_size_are_refused(tmp_path, capsys):
  assert run(tmp_path / "run", clips_folder(tmp_path / "data", side=8)) == 1
  words = f"has the shape {FRAMES} x 8 x 8 x 3, and any x {SIDE} x {SIDE} x 3 is needed"
  assert words in said(capsys)[-1]
