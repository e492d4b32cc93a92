"""Stage `vae` with its real networks: what is learnt, and what others make of it."""

import dataclasses
import json
import shutil

import convert_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax import convert, pipeline
from hfjax.convert import runs
from hfjax.models.vae import VaeConfig
from hfjax.streaming.pixels import Autoencoder
from hfjax.streaming.trees import named
from hfjax.training import config, plan, weights
from tests.training.runs import FLOW, arrays, assert_same_arrays, metrics, small_programs
from tests.training.test_autoencoder import CLIPS, MINI, STEPS, planned, run

RATE = "--config.optimizer.rate=0.01"
pytestmark = pytest.mark.slow  # compiling takes its time


@pytest.fixture(scope="module", autouse=True)
def programs():
  with small_programs(), pytest.MonkeyPatch.context() as patch:
    patch.setitem(pipeline._SMALL, "vae", MINI)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "run"
  assert run(folder, RATE) == 0
  return folder


@pytest.fixture(scope="module")
def held(whole):
  """Arrays and note of its last step."""
  return arrays(whole, STEPS)


def test_it_learns(whole):
  ratios = [x["autoencoder/psnr"] for x in metrics(whole) if "autoencoder/psnr" in x]
  assert np.mean(ratios[-3:]) > np.mean(ratios[:3]) + 5  # measured: 10.1 and 20.2


def test_every_array_of_both_halves_moves(held):
  start, (end, _) = weights.load_trained(planned(), "autoencoder"), held
  names = {f"vae/{k}": x for k, x in named(start).items()}
  assert {k.split("/")[1] for k in names} == {"encoder", "decoder"}
  assert names.keys() == {k for k in end if k.startswith("vae/")}
  for name, x in names.items():
    assert np.any(end[name] != x), name


@pytest.mark.parametrize("averaged", [False, True])
def test_latents_of_what_is_converted_are_normalised(whole, held, tmp_path, averaged):
  out = tmp_path / "out"
  args = [str(whole), str(out), "--quiet", *["--ema"] * averaged]
  assert convert_checkpoint.main(args) == 0
  assert sorted(x.name for x in out.iterdir()) == ["vae"]
  loaded = convert.load(out, "vae")
  want, _ = held
  item = "vae_ema" if averaged else "vae"
  got = {f"{item}/{k}": x for k, x in named(loaded.params).items()}
  assert_same_arrays(got, {k: x for k, x in want.items() if k.split("/")[0] == item})
  assert dataclasses.replace(loaded.config, mean=MINI.mean, std=MINI.std) == MINI
  clips = jnp.asarray(np.stack([CLIPS[i]["video"] for i in range(8)]))
  z = Autoencoder("vae", loaded.config, loaded.params, jnp.float32).encode(clips)
  rows = np.float64(z).reshape(-1, 4)
  np.testing.assert_allclose(rows.mean(axis=0), 0, rtol=0, atol=1e-4)
  np.testing.assert_allclose(rows.std(axis=0), 1, rtol=1e-4)


def test_statistics_of_earlier_runs_count_for_both(whole, held, tmp_path):
  """Which recorded those of the averages alone."""
  told = held[1]["models"]
  assert told["vae"]["mean"] != told["vae_ema"]["mean"]
  folder = convert_note(whole, tmp_path, lambda models: models.pop("vae_ema"))
  for averaged in (False, True):
    found = runs.open_run(folder, averaged, model="vae").config
    assert found.mean == tuple(told["vae"]["mean"]) and found.std == tuple(told["vae"]["std"])


def convert_note(run, target, change):
  """A copy of a run's last step whose note has other models."""
  place = target / "checkpoints" / str(STEPS)
  shutil.copytree(run / "checkpoints" / str(STEPS), place)
  (file,) = (place / "note").rglob("metadata")
  note = json.loads(file.read_text())
  change(note["models"])
  file.write_text(json.dumps(note))
  return target


def test_an_encoder_that_stays_keeps_its_latents(whole, held, tmp_path):
  more = (
    f"--config.init={whole}",
    "--config.init_ema=true",
    "--config.autoencoder.decoder_only=true",
  )
  # Other clips, whose statistics differ; stopped once, after which the first run is not needed.
  assert run(tmp_path / "run", RATE, *more, "--config.seed=3", "--config.steps=1") == 0
  assert (
    run(tmp_path / "run", RATE, "--config.autoencoder.decoder_only=true", "--config.seed=3") == 0
  )
  now, note = arrays(tmp_path / "run", STEPS)
  before, told = held
  for name in ("vae", "vae_ema"):
    assert note["models"][name] == told["models"]["vae_ema"]
    for key in (k for k in now if k.startswith(f"{name}/")):
      same = np.array_equal(now[key], before[f"vae_ema/{key.split('/', 1)[1]}"])
      assert same == (key.split("/")[1] == "encoder"), key


@pytest.mark.parametrize("averaged", [False, True])
def test_another_run_begins_with_its_weights(whole, held, averaged):
  p = planned(f"--config.init={whole}", f"--config.init_ema={averaged}")
  assert p.parts == ("autoencoder",) and p.vae.mean == (0,) * 4 and p.vae.std == (1,) * 4
  begin = named(weights.load_trained(p, "autoencoder"))
  item = "vae_ema" if averaged else "vae"
  want = {k: x for k, x in held[0].items() if k.split("/")[0] == item}
  assert_same_arrays({f"{item}/{k}": x for k, x in begin.items()}, want)


def test_later_stages_take_its_statistics_too(whole, held):
  p = plan.make_plan(
    config.parse([*FLOW, "--workdir=unused", f"--config.vae.weights={whole}"]).config
  )
  told = held[1]["models"]["vae"]
  assert p.stage == "flow" and p.vae.mean == tuple(told["mean"]) and p.vae.std == tuple(told["std"])
  assert weights.load_autoencoder(p).config == p.vae


def test_the_small_autoencoder_learns(tmp_path, monkeypatch):
  """That of `random:tiny`, by its real factors."""
  monkeypatch.setitem(
    pipeline._SMALL, "vae", VaeConfig(dim=8, z_dim=16, mean=(0.0,) * 16, std=(1.0,) * 16)
  )
  more = ["vae.weights=random:tiny", "student.weights=random:tiny", "geometry.height=2"]
  more += ["geometry.width=2", "validation.every=0", "optimizer.rate=0.005"]
  assert run(tmp_path, *(f"--config.{x}" for x in more)) == 0
  ratios = [row["autoencoder/psnr"] for row in metrics(tmp_path)]
  assert np.mean(ratios[-3:]) > np.mean(ratios[:3]) + 4
