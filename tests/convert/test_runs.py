"""Runs of training as checkpoints."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from hfjax import convert as loading
from hfjax.checksums import checksum
from hfjax.convert import CheckpointError, checkpoint, dit, runs
from hfjax.models import wan
from hfjax.training import lora
from tests.convert.helpers import HYBRID, ROOT, convert, flat, refused, same
from tests.helpers import shapes_of

BF16 = np.dtype(ml_dtypes.bfloat16)
MESH = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
NOTE = {
  "format": "hfjax-run-1",
  "architecture": dataclasses.asdict(HYBRID),
  "variant": "paper",
  "preset": "hybrid",
  "lora": None,
  "config": {"seed": 0},
}


def params(seed):
  """Weights that differ everywhere, without the cost of drawing them by JAX."""
  r = np.random.default_rng(seed)
  shapes = shapes_of(wan.init_params, HYBRID)
  return jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), shapes)


def split(tree):
  """On two devices, by the last axis."""
  spec = lambda x: jax.sharding.PartitionSpec(
    *(None,) * (x.ndim - 1), None if x.shape[-1] % 2 else "fsdp"
  )
  return jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(MESH, spec(x))), tree)


def write(folder, steps):
  """A run as training leaves it; steps: items by step."""
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
    for step, (items, note) in steps.items():
      saved = {k: ocp.args.StandardSave(split(x)) for k, x in items.items()}
      note = ocp.args.JsonSave({**NOTE, **note, "step": step})
      manager.save(step, args=ocp.args.Composite(**saved, note=note))
  return folder


FIRST, SECOND, AVERAGE = (params(seed) for seed in range(3))
RANK, ALPHA = 3, 4.5


def adapters(seed):
  r, tree = (
    np.random.default_rng(seed),
    lora.init(FIRST, jax.random.key(0), RANK, ("q", "v", "ffn")),
  )
  return jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), tree)


TRAINED, TRAINED_AVERAGE = adapters(0), adapters(1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  moments = {"mu": np.zeros((4, 4), np.float32)}
  return write(
    tmp_path_factory.mktemp("runs") / "mine",
    {
      10: ({"student": FIRST, "optimizers": moments}, {}),
      20: ({"student": SECOND, "ema": AVERAGE, "optimizers": moments}, {}),
    },
  )


@pytest.fixture
def run(written, tmp_path):
  """A copy that a test may damage."""
  shutil.copytree(written, tmp_path / "run")
  return tmp_path / "run"


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
  told = {"lora": {"rank": RANK, "alpha": ALPHA, "targets": ["q", "v", "ffn"]}}
  items = {"student": FIRST, "adapters": TRAINED, "ema": TRAINED_AVERAGE}
  return write(tmp_path_factory.mktemp("runs") / "adapted", {5: (items, told)})


def weights(folder):
  return load_file(folder / "dit" / "model.safetensors")


@pytest.mark.parametrize(
  ("args", "want"), [((), SECOND), (("--ema",), AVERAGE), (("--step", 10), FIRST)]
)
def test_a_step_is_converted_bit_for_bit(written, tmp_path, capsys, args, want):
  assert convert(written, tmp_path / "ours", *args) == 0
  same(weights(tmp_path / "ours"), flat(want))
  loaded = loading.load(tmp_path / "ours")
  assert (loaded.config, loaded.variant, loaded.preset) == (HYBRID, "paper", "hybrid")
  told = json.loads((tmp_path / "ours" / "dit" / "config.json").read_text())["origin"]
  step = 10 if want is FIRST else 20
  assert told == {"run": "mine", "step": step, "averaged": want is AVERAGE, "adapters": None}
  out, err = capsys.readouterr()
  assert f"of step {step} were taken" in out and err == ""
  assert ("--ema takes" in out) == (want is SECOND)


def test_other_dtypes_namings_and_semantics(written, tmp_path):
  assert convert(written, tmp_path / "bf16", "--dtype", "bf16") == 0
  same(weights(tmp_path / "bf16"), {k: x.astype(BF16) for k, x in flat(SECOND).items()})
  assert convert(written, tmp_path / "original", "--to", "original") == 0
  got = load_file(tmp_path / "original" / "diffusion_pytorch_model.safetensors")
  same(got, dit.to_original(HYBRID, SECOND))
  part = checkpoint.open_parts(written, variant="reference_dense")[0]
  assert (part.config.linear, part.variant) == (False, "reference_dense")
  assert not any("linear_proj" in name for name in part.tensors)


def test_a_run_is_loaded_onto_other_devices(written):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[1:]), "x")
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  with pytest.warns(UserWarning) as told:
    loaded = loading.load(written, sharding=lambda name, shape: place, dtype="bf16")
  assert "Weights of step 20 were taken." in {str(warning.message) for warning in told}
  assert (loaded.config, loaded.variant, loaded.preset) == (HYBRID, "paper", "hybrid")
  assert all(x.sharding == place for x in jax.tree.leaves(loaded.params))
  same(flat(loaded.params), {k: x.astype(BF16) for k, x in flat(SECOND).items()})


def test_only_the_wanted_item_is_read_and_each_array_once(run, monkeypatch):
  for item in ("student", "optimizers"):
    shutil.rmtree(run / "checkpoints" / "20" / item)
  shutil.rmtree(run / "checkpoints" / "10" / "optimizers")
  seen, restore = [], runs._restore
  monkeypatch.setattr(runs, "_restore", lambda f, name: seen.append(name) or restore(f, name))
  for style in ("hfjax", "original"):
    part = runs.open_run(run, averaged=True)
    assert len(seen) <= 1  # to see whether it can be read
    seen.clear()
    for entry in checkpoint.entries(part, style, None)[0]:
      for _ in entry.pieces():
        pass
    assert sorted(seen) == sorted(flat(AVERAGE))
    seen.clear()


def test_adapters_are_merged(low_rank, tmp_path, capsys):
  for args, trained in (((), TRAINED), (("--ema",), TRAINED_AVERAGE)):
    assert convert(low_rank, tmp_path / "ours", "--overwrite", *args) == 0
    assert "8 adapters of rank 3 were merged, with alpha 4.5" in capsys.readouterr().out
    got, base = weights(tmp_path / "ours"), {k: x.copy() for k, x in flat(FIRST).items()}
    changed = {"q": 0, "v": 2}
    for name, part in changed.items():
      update = np.einsum("lmr,lrhd->lmhd", trained[name]["down"], trained[name]["up"]) * 1.5
      base["blocks/self_attn/qkv/kernel"][:, :, part] += update
    for name in ("ffn_in", "ffn_out"):
      update = np.einsum("lmr,lrf->lmf", trained[name]["down"], trained[name]["up"]) * 1.5
      base[f"blocks/{name}/kernel"] += update
    assert got.keys() == base.keys()
    for name, x in base.items():
      exact = not any(s in name for s in ("qkv/kernel", "ffn_in/kernel", "ffn_out/kernel"))
      np.testing.assert_allclose(got[name], x, rtol=0, atol=0 if exact else 1e-5)


def test_what_a_run_lacks_is_said(run, tmp_path, capsys):
  error = refused(capsys, run, tmp_path / "o", "--step", 10, "--ema")
  assert "no moving averages of weights at step 10; leave out --ema" in error
  assert "no checkpoint of step 15; it has 10, 20." in refused(
    capsys, run, tmp_path / "o", "--step", 15
  )
  assert "holds no vae: only dit" in refused(capsys, run, tmp_path / "o", "--model", "vae")
  for inside in ("checkpoints", "checkpoints/20", "checkpoints/20/student"):
    error = refused(capsys, run / inside, tmp_path / "o")
    assert f"is a part of a run of training; give its folder, {run}, and --step" in error
  (tmp_path / "new" / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
  for _ in range(2):
    assert "has written no checkpoint yet" in refused(capsys, tmp_path / "new", tmp_path / "o")
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "5.orbax-checkpoint-tmp", ignore_errors=True)
  (tmp_path / "other" / "checkpoints").mkdir(parents=True)
  (tmp_path / "other" / "checkpoints" / "model.txt").touch()
  error = refused(capsys, tmp_path / "other", tmp_path / "o", "--step", 3)
  assert "is no run of training, which alone has steps; leave out --step" in error
  assert not (tmp_path / "o").exists()


def largest(folder):
  return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGES = {
  "no note": lambda step: shutil.rmtree(step / "note"),
  "no item": lambda step: shutil.rmtree(step / "student"),
  "empty note": lambda step: (step / "note" / "metadata").write_text(""),
  "half of a table": lambda step: cut(step / "student" / "manifest.ocdbt"),
  "half of the names": lambda step: cut(step / "student" / "_METADATA"),
  "no numbers": lambda step: largest(step / "student" / "ocdbt.process_0" / "d").unlink(),
  "half of the numbers": lambda step: cut(largest(step / "student" / "ocdbt.process_0" / "d")),
  "everything": lambda step: [shutil.rmtree(f) for f in step.iterdir() if f.is_dir()],
}


def cut(file):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_the_newest_step_is_said_and_the_one_before_is_not_taken_for_it(
  run, tmp_path, capsys, damage
):
  DAMAGES[damage](run / "checkpoints" / "20")
  error = refused(capsys, run, tmp_path / "o")
  assert "The checkpoint of step 20 of " in error and "is damaged, or was removed" in error
  assert "step 10 can be taken instead, with --step 10." in error
  assert not (tmp_path / "o").exists()
  assert convert(run, tmp_path / "o", "--step", 10) == 0
  same(weights(tmp_path / "o"), flat(FIRST))
  DAMAGES["no item"](run / "checkpoints" / "10")
  assert "no other step of the run can be read" in refused(capsys, run, tmp_path / "o2")


@pytest.mark.parametrize("averaged", [False, True])
def test_numbers_that_are_not_those_that_were_saved_are_refused(tmp_path, averaged):
  """As a disk may change them, which Orbax does not see."""
  kept, item = {"student": FIRST, "ema": AVERAGE}, "ema" if averaged else "student"
  sums = {name: checksum(tree) for name, tree in kept.items()}
  damaged = jax.tree.map(np.copy, kept)
  damaged[item]["head"]["modulation"].flat[3] += 1e-3
  write(tmp_path / "good", {1: (kept, {"checksums": sums})})
  write(tmp_path / "bad", {1: (damaged, {"checksums": sums})})
  with pytest.warns(UserWarning, match="of step 1 were taken"):
    same(flat(loading.load(tmp_path / "good", "dit", averaged=averaged).params), flat(kept[item]))
  with pytest.raises(CheckpointError, match=f"damaged.*arrays of its {item} are not those"):
    loading.load(tmp_path / "bad", "dit", averaged=averaged)


def test_an_unfinished_step_is_not_seen(run):
  shutil.copytree(run / "checkpoints" / "20", run / "checkpoints" / "30.orbax-checkpoint-tmp")
  assert runs.open_run(run).origin["step"] == 20


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"format": "hfjax-run-9"}, "is of the format hfjax-run-9, and this hfjax reads hfjax-run-1"),
    ({"format": None}, "its note says nothing"),
    ({"variant": "mine"}, "the unknown variant 'mine'"),
    ({"preset": ["hybrid"]}, "the unknown preset"),
    ({"architecture": None}, "describes no transformer"),
    ({"architecture": {"dim": 7}}, "describes no transformer"),
    ({"architecture": {**NOTE["architecture"], "dim": 64}}, "not of the architecture in its note"),
    ({"architecture": {**NOTE["architecture"], "linear": False}}, "linear_proj"),
    ({"lora": {"rank": 0, "alpha": 1}}, "describes no adapters"),
    ({"lora": [3]}, "describes no adapters"),
    ({"lora": {"rank": 3, "alpha": "much"}}, "describes no adapters"),
    ({"lora": {"rank": 3, "alpha": 1}}, "it has no adapters"),
  ],
)
def test_notes_that_cannot_be_followed(run, change, sentence):
  file = run / "checkpoints" / "20" / "note" / "metadata"
  file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
  with pytest.raises(CheckpointError, match=sentence):
    runs.open_run(run)


@pytest.mark.parametrize("told", [{"rank": 2, "alpha": 1}, {"rank": 6, "alpha": 1}])
def test_adapters_of_another_rank_are_refused(low_rank, tmp_path, told):
  shutil.copytree(low_rank, tmp_path / "run")
  file = tmp_path / "run" / "checkpoints" / "5" / "note" / "metadata"
  file.write_text(json.dumps({**json.loads(file.read_text()), "lora": told}))
  with pytest.raises(CheckpointError, match="its adapters do not fit blocks.0.ffn.0"):
    runs.open_run(tmp_path / "run")


def test_weights_as_adapters_are_refused(run):
  shutil.copytree(run / "checkpoints/20/student", run / "checkpoints/20/adapters")
  file = run / "checkpoints" / "20" / "note" / "metadata"
  told = {"lora": {"rank": 3, "alpha": 1}}
  file.write_text(json.dumps({**json.loads(file.read_text()), **told}))
  with pytest.raises(CheckpointError, match="its adapters are no adapters of this model"):
    runs.open_run(run)


def test_importing_does_not_import_orbax():
  code = "import sys, hfjax.convert; sys.exit('orbax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
