"""How weights are to be sampled: what is inferred, recorded, and said."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from hfjax.convert import CheckpointError, checkpoint, dit, load, recognise, source
from hfjax.diffusion.solvers import MultistepSolver
from hfjax.models import sampling_presets
from hfjax.models.geometry import VARIANTS, Geometry
from hfjax.models.presets import PRESETS
from hfjax.models.sampling_presets import SAMPLING_PRESETS
from hfjax.streaming.config import StreamConfig
from tests.convert.helpers import (
  DENSE,
  HYBRID,
  TENSORS,
  convert,
  put,
  refused,
  tensors_of,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Taken for")
DENSE_CFG = dit.published_config(DENSE, "original")
PLAIN = tensors_of(DENSE)
FILE = "diffusion_pytorch_model.safetensors"
OTHERWISE = "the converter's --variant and --preset say otherwise."


def recorded(folder):
  """Variant and preset of a converted folder, as it says and as it loads."""
  info = json.loads((folder / "dit" / "config.json").read_text())
  loaded = load(folder)
  assert (info["variant"], info["preset"]) == (loaded.variant, loaded.preset)
  return loaded.variant, loaded.preset


def change(folder, **values):
  """Other values in a transformer's config.json; None takes one out."""
  path = folder / "dit" / "config.json"
  info = {**json.loads(path.read_text()), **values}
  path.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))
  return info


@pytest.fixture
def trainer(monkeypatch):
  """Lets safetensors stand for trainers' files, by key, as reading those needs PyTorch."""

  def put_file(path, key, tensors=PLAIN, cfg=DENSE_CFG):
    put(path.parent, tensors, cfg, path.name)
    held[path.name] = key

  def read(path, averaged):
    tensors = source.read_safetensors(path)
    return recognise.Group(path, tensors, [path], held[path.name], "ema" in held[path.name])

  held = {}
  monkeypatch.setattr(recognise, "_read", read)
  return put_file


@pytest.mark.parametrize("name", SAMPLING_PRESETS)
def test_presets_can_be_sampled(name):
  p = SAMPLING_PRESETS[name]
  assert p.variant is None or p.variant in VARIANTS
  assert (p.solver is None) == bool(p.steps) == (p.guidance == 1)
  assert p.solver or not p.bidirectional
  if p.solver:
    assert (p.window, p.sink) == (21, 0 if p.bidirectional else 1)
    solver = MultistepSolver(p.solver, p.solver_steps, p.shift)
    ends = {
      (50, 5): [999, 995, 991, 172, 92], (50, 3): [999, 992, 985, 111, 57],
      (24, 3): [999, 985, 970, 214, 115],
    }[p.solver_steps, int(p.shift)]  # fmt: skip
    np.testing.assert_array_equal(solver.timesteps[[0, 1, 2, -2, -1]], ends)
    return
  model = PRESETS["hybrid-1.3b" if p.variant is None else "wan-1.3b"]
  geometry = Geometry(60, 104, window=p.window, sink=p.sink, variant=p.variant or "paper")
  config = StreamConfig(model, geometry, steps=p.steps, shift=p.shift)
  warped = {5: [1000, 937.5, 833.333313, 625], 3: [1000, 900, 750, 500]}[int(p.shift)]
  np.testing.assert_allclose(config.timesteps, warped)


@pytest.mark.parametrize(
  ("linear", "distilled", "names", "preset"),
  [
    (True, False, ["longlive.pt"], "hybrid"),
    (False, True, [], "self_forcing"),
    (False, False, [], "wan"),
    (False, True, ["model.pt", "LongLive-1.3B"], "longlive"),
    (False, False, ["my_long-live_tune.safetensors"], "longlive"),
    (False, True, ["LONG_LIVE.pt"], "longlive"),
    (False, False, ["SelfForcing_14B.safetensors"], "self_forcing"),
    (False, False, ["Self-Forcing-Diffusers"], "self_forcing"),
    (False, True, ["self_forcing_dmd.pt", "longlive"], "self_forcing"),
    (False, False, ["long.pt", "live", "forcing"], "wan"),
  ],
)
def test_what_weights_speak_for(linear, distilled, names, preset):
  assert sampling_presets.infer(linear, distilled, names)[0] == preset


def test_a_linear_branch_is_hybrid(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  assert recorded(tmp_path / "ours") == ("reference_infer", "hybrid")
  assert load(tmp_path / "wan").preset == "hybrid"
  assert (
    "dit: Taken for variant reference_infer and preset hybrid, as the checkpoint has a linear "
    f"branch; {OTHERWISE}\n" in capsys.readouterr().out
  )


def test_published_folders_are_undistilled(tmp_path, capsys):
  put(tmp_path / "Wan2.1-T2V-1.3B", PLAIN, DENSE_CFG)
  assert convert(tmp_path / "Wan2.1-T2V-1.3B", tmp_path / "ours") == 0
  assert (
    "dit: Taken for variant reference_dense, as the checkpoint has no linear branch, and for "
    f"preset wan, as nothing tells of distillation; {OTHERWISE}\n" in capsys.readouterr().out
  )
  assert convert(tmp_path / "Wan2.1-T2V-1.3B", tmp_path / "theirs", "--to", "diffusers") == 0
  assert convert(tmp_path / "theirs", tmp_path / "again") == 0
  for name in ("ours", "again"):
    assert recorded(tmp_path / name) == ("reference_dense", "wan")
  for path in ("Wan2.1-T2V-1.3B", f"Wan2.1-T2V-1.3B/{FILE}"):
    assert load(tmp_path / path).preset == "wan"


@pytest.mark.parametrize(
  ("path", "given", "preset"),
  [
    ("Self-Forcing-Diffusers/transformer", "Self-Forcing-Diffusers", "self_forcing"),
    ("models--owner--LongLive-1.3B/snapshots/0a1b", "models--owner--LongLive-1.3B/snapshots/0a1b",
     "longlive"),
    ("longlive/weights", "longlive/weights", "wan"),  # not any folder above
    ("longlive", f"longlive/{FILE}", "longlive"),
  ],
)  # fmt: skip
def test_folders_that_are_named_after_a_method(tmp_path, monkeypatch, path, given, preset):
  put(tmp_path / path, PLAIN, DENSE_CFG)
  assert load(tmp_path / given).preset == preset
  monkeypatch.chdir(tmp_path / path)
  assert convert(".", tmp_path / "ours") == 0  # however the folder is given
  if "transformer" not in path:
    assert recorded(tmp_path / "ours")[1] == preset


@pytest.mark.parametrize(
  ("name", "key", "preset", "reason"),
  [
    ("model.pt", "generator", "self_forcing", "the weights are those of a trainer of few-step"),
    ("ema_model.pt", "generator_ema", "self_forcing", "the weights are those of a trainer of few-"),
    ("LongLive_Base.pt", "generator", "longlive", "LongLive_Base.pt is called so"),
    ("long-live.pt", "model", "longlive", "long-live.pt is called so"),
    ("model.pt", "model", "wan", "nothing tells of distillation"),
    ("model.pt", "", "wan", "nothing tells of distillation"),
  ],
)
def test_files_of_trainers(tmp_path, capsys, trainer, name, key, preset, reason):
  trainer(tmp_path / "run" / name, key)
  assert convert(tmp_path / "run" / name, tmp_path / "ours") == 0
  assert recorded(tmp_path / "ours") == ("reference_dense", preset)
  assert f"and for preset {preset}, as {reason}" in capsys.readouterr().out
  # Folders of before there were presets give the same.
  change(tmp_path / "ours", preset=None)
  with pytest.warns(UserWarning, match=f"^Taken for preset {preset}, as {reason}"):
    assert load(tmp_path / "ours").preset == preset


def test_trainers_of_hybrid_models(tmp_path, trainer):
  trainer(tmp_path / "model.pt", "generator", TENSORS, None)
  assert convert(tmp_path / "model.pt", tmp_path / "ours") == 0
  assert recorded(tmp_path / "ours") == ("reference_infer", "hybrid")


@pytest.mark.parametrize("preset", SAMPLING_PRESETS)
def test_the_user_may_say_otherwise_and_it_is_kept(tmp_path, capsys, preset):
  put(tmp_path / "wan", PLAIN, DENSE_CFG)
  assert convert(tmp_path / "wan", tmp_path / "ours", "--preset", preset) == 0
  said = capsys.readouterr().out
  assert "preset" not in said
  assert ("Taken for variant reference_dense, as" in said) == (
    preset in ("hybrid", "shapes", "shapes_teacher", "wan")
  )
  assert recorded(tmp_path / "ours") == ("reference_dense", preset)
  assert convert(tmp_path / "ours", tmp_path / "again") == 0
  assert recorded(tmp_path / "again") == ("reference_dense", preset)
  assert "Taken for" not in capsys.readouterr().out
  assert convert(tmp_path / "again", tmp_path / "third", "--preset", "longlive") == 0
  assert recorded(tmp_path / "third") == ("reference_dense", "longlive")
  assert convert(tmp_path / "wan", tmp_path / "x", "--variant", "reference_dense") == 0
  assert (
    "dit: Taken for preset wan, as nothing tells of distillation; the converter's --preset says "
    "otherwise.\n" in capsys.readouterr().out
  )


def test_a_preset_brings_its_variant(tmp_path, capsys):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  for name in ("wan", "ours"):
    target = tmp_path / f"{name}-dense"
    capsys.readouterr()
    assert convert(tmp_path / name, target, "--preset", "self_forcing") == 0
    assert "4 linear_proj tensors were left out" in capsys.readouterr().out
    assert recorded(target) == ("reference_dense", "self_forcing")
  error = refused(
    capsys, tmp_path / "wan", tmp_path / "x", "--preset", "longlive", "--variant", "paper"
  )
  assert "The preset longlive is of variant reference_dense, and paper was asked for" in error
  assert convert(tmp_path / "wan", tmp_path / "x", "--preset", "hybrid", "--variant", "paper") == 0
  assert recorded(tmp_path / "x") == ("paper", "hybrid")


def test_another_architecture_has_another_preset(tmp_path, capsys):
  put(tmp_path / "hybrid")
  put(tmp_path / "dense", PLAIN, DENSE_CFG)
  for name in ("hybrid", "dense"):
    assert convert(tmp_path / name, tmp_path / f"{name}-ours") == 0
  dense = ("--variant", "reference_dense")
  for name, args, want, said in (
    ("hybrid", dense, ("reference_dense", "self_forcing"), True),
    ("hybrid-ours", dense, ("reference_dense", "self_forcing"), True),
    ("hybrid-ours", ("--variant", "paper"), ("paper", "hybrid"), False),
    ("dense", ("--variant", "paper"), ("paper", "hybrid"), True),
    ("dense-ours", ("--variant", "paper"), ("paper", "hybrid"), True),
    ("dense-ours", dense, ("reference_dense", "wan"), False),
  ):
    capsys.readouterr()
    assert convert(tmp_path / name, tmp_path / "out", *args, "--overwrite") == 0
    assert recorded(tmp_path / "out") == want
    assert (f"Taken for preset {want[1]}, as" in capsys.readouterr().out) == said


def test_an_update_changes_no_preset(tmp_path):
  put(tmp_path / "wan", PLAIN, DENSE_CFG)
  update = {"blocks.0.self_attn.q.diff": np.ones((32, 32), np.float32)}
  save_file(update, tmp_path / "longlive-lora.safetensors")
  args = ("--lora", tmp_path / "longlive-lora.safetensors")
  assert convert(tmp_path / "wan", tmp_path / "ours", *args) == 0
  assert recorded(tmp_path / "ours") == ("reference_dense", "wan")
  assert convert(tmp_path / "wan", tmp_path / "live", *args, "--preset", "longlive") == 0
  assert recorded(tmp_path / "live") == ("reference_dense", "longlive")


@pytest.mark.parametrize(("config", "preset"), [(HYBRID, "hybrid"), (DENSE, "wan")])
def test_folders_of_before_there_were_presets(tmp_path, capsys, config, preset):
  put(tmp_path / "wan", tensors_of(config), dit.published_config(config, "original"))
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  change(tmp_path / "ours", preset=None)
  with pytest.warns(UserWarning, match=f"Taken for preset {preset}, as .* --preset says") as seen:
    assert load(tmp_path / "ours").preset == preset
  assert [w.filename for w in seen] == [__file__]
  capsys.readouterr()
  assert convert(tmp_path / "ours", tmp_path / "again") == 0
  assert f"Taken for preset {preset}, as" in capsys.readouterr().out
  assert recorded(tmp_path / "again")[1] == preset
  for origin in ({}, {"files": [1], "key": ["generator"]}, {"files": {"longlive.pt": 1}}):
    change(tmp_path / "ours", origin=origin)
    want = "longlive" if preset == "wan" and "longlive" in str(origin) else preset
    assert load(tmp_path / "ours").preset == want


@pytest.mark.parametrize("value", ["causvid", "", 3, ["wan"], {"wan": 1}, True])
def test_presets_that_are_unknown_are_damage(tmp_path, capsys, value):
  put(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours") == 0
  change(tmp_path / "ours", preset=value)
  with pytest.raises(CheckpointError, match="is damaged, in its architecture, variant, preset,"):
    load(tmp_path / "ours")
  assert "is damaged" in refused(capsys, tmp_path / "ours", tmp_path / "x")


def test_other_models_have_none(tmp_path, capsys):
  from tests.convert.test_parts import wan_folder

  wan_folder(tmp_path / "wan")
  assert convert(tmp_path / "wan", tmp_path / "ours", "--preset", "self_forcing") == 0
  assert load(tmp_path / "ours").preset == "self_forcing"
  for name in ("vae", "umt5"):
    assert load(tmp_path / "ours", name)[2:] == load(tmp_path / "wan", name)[2:] == (None, None)
    assert checkpoint.open_parts(tmp_path / "ours", name)[0].preset is None
  shutil.copytree(tmp_path / "ours" / "vae", tmp_path / "vae" / "dit")
  change(tmp_path / "vae", preset="wan")
  with pytest.raises(CheckpointError, match="is damaged"):
    load(tmp_path / "vae" / "dit", "vae")
