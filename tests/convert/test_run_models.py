"""Runs that trained other models than a transformer, or one beside it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from hfjax import convert as loading
from hfjax.checksums import checksum
from hfjax.convert import CheckpointError, checkpoint, runs
from hfjax.models import umt5, vae
from hfjax.models.umt5 import Umt5Config
from hfjax.models.vae import VaeConfig
from tests.convert.helpers import convert, flat, refused, same
from tests.convert.test_runs import AVERAGE, FIRST, write
from tests.helpers import shapes_of

TEXT = Umt5Config(vocab=20, dim=12, dim_attn=8, dim_ffn=8, heads=2, layers=1)
VAE = VaeConfig(
  dim=4, z_dim=2, mean=(0.5, -1.0), std=(2.0, 0.25), dim_mult=(1, 2), num_res_blocks=1,
  temporal_downsample=(True,),
)  # fmt: skip
SMOOTH = dataclasses.replace(VAE, mean=(0.25, 1.0))


def draw(init, config, seed):
  r = np.random.default_rng(seed)
  return jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), shapes_of(init, config))


WORDS, WORDS_AVERAGE = (draw(umt5.init_params, TEXT, seed) for seed in (1, 2))
PIXELS, PIXELS_AVERAGE = (draw(vae.init_params, VAE, seed) for seed in (3, 4))


def noted(items, **models):
  """Items of a step, and what its note says of them."""
  told = {name: dataclasses.asdict(config) for name, config in models.items()}
  sums = {name: checksum(tree) for name, tree in items.items()}
  return items, {"models": told, "checksums": sums}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """A run that trained a transformer with its text encoder; at first without averages."""
  first = {"student": AVERAGE, "umt5": WORDS_AVERAGE}
  then = {"student": FIRST, "ema": AVERAGE, "umt5": WORDS, "umt5_ema": WORDS_AVERAGE}
  folder = tmp_path_factory.mktemp("runs") / "both"
  return write(folder, {10: noted(first, umt5=TEXT), 20: noted(then, umt5=TEXT)})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A run that trained an autoencoder."""
  items = {"vae": PIXELS, "vae_ema": PIXELS_AVERAGE}
  folder = tmp_path_factory.mktemp("runs") / "alone"
  return write(folder, {5: noted(items, vae=VAE, vae_ema=SMOOTH)})


@pytest.fixture
def run(both, tmp_path):
  """A copy that a test may damage."""
  return shutil.copytree(both, tmp_path / "run")


def test_which_models_a_run_has(both, alone):
  assert runs.models(both) == runs.models(both, 10) == ["dit", "umt5"]
  assert runs.models(alone) == ["vae"]


def test_each_is_read_bit_for_bit(both, alone):
  for folder, model, config, averaged, want in (
    (both, "umt5", TEXT, True, WORDS_AVERAGE),
    (alone, "vae", SMOOTH, True, PIXELS_AVERAGE),
  ):
    with pytest.warns(UserWarning, match="eights of step"):
      loaded = loading.load(folder, model, averaged=averaged)
    same(flat(loaded.params), flat(want))
    assert loaded.config == config and loaded.variant is None and loaded.preset is None


def test_all_are_converted_with_the_tokenizer(run, tmp_path, capsys):
  (run / "tokenizer").mkdir()
  (run / "tokenizer" / "spiece.model").write_bytes(b"pieces")
  assert convert(run, tmp_path / "ours") == 0
  out = capsys.readouterr().out
  assert "umt5: The step has moving averages of them as well, which --ema takes." in out
  assert sorted(x.name for x in (tmp_path / "ours").iterdir()) == ["dit", "google", "umt5"]
  place = tmp_path / "ours" / "google" / "umt5-xxl" / "spiece.model"
  assert place.read_bytes() == b"pieces"
  same(flat(loading.load(tmp_path / "ours", "umt5", verify=True).params), flat(WORDS))
  # One of them alone.
  assert convert(run, tmp_path / "text", "--model", "umt5", "--step", 10) == 0
  assert sorted(x.name for x in (tmp_path / "text").iterdir()) == ["google", "umt5"]
  same(flat(loading.load(tmp_path / "text", "umt5").params), flat(WORDS_AVERAGE))
  told = json.loads((tmp_path / "text" / "umt5" / "config.json").read_text())
  assert told["origin"]["step"] == 10 and told["variant"] is None and told["preset"] is None
  assert convert(run, tmp_path / "dit", "--model", "dit") == 0
  assert [x.name for x in (tmp_path / "dit").iterdir()] == ["dit"]


def test_semantics_are_of_the_transformer_alone(both, alone):
  parts = checkpoint.open_parts(both, variant="reference_dense")
  assert [p.variant for p in parts] == ["reference_dense", None]
  (part,) = checkpoint.open_parts(alone, variant="paper", preset="hybrid")
  assert (part.kind.name, part.variant, part.preset) == ("vae", None, None)


@pytest.mark.parametrize(
  ("name", "model", "words"),
  [
    ("both", "vae", "holds no vae: only dit, umt5."),
    ("both", "taehv", "holds no taehv: only dit, umt5."),
    ("alone", "dit", "holds no dit: only vae."),
    ("alone", "umt5", "holds no umt5: only vae."),
    ("both", "none", "holds no none: only dit, umt5."),
  ],
)
def test_models_that_a_run_lacks_are_said(both, alone, tmp_path, capsys, name, model, words):
  folder = {"both": both, "alone": alone}[name]
  with pytest.raises(CheckpointError) as error:
    runs.open_run(folder, model=model)
  assert str(error.value) == f"{folder} {words}"
  if model != "none":
    assert words in refused(capsys, folder, tmp_path / "o", "--model", model)
  assert not (tmp_path / "o").exists()


def test_averages_that_a_step_lacks_are_said(both, tmp_path, capsys):
  for more in ((), ("--model", "umt5")):
    error = refused(capsys, both, tmp_path / "o", "--step", 10, "--ema", *more)
    assert "no moving averages of weights at step 10; leave out --ema" in error


DAMAGES = {
  "no item": (lambda step: shutil.rmtree(step / "umt5"), "it has no umt5"),
  "no note": (lambda step: shutil.rmtree(step / "note"), "its note cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_and_the_step_before_is_not_taken_for_it(run, tmp_path, capsys, damage):
  act, words = DAMAGES[damage]
  act(run / "checkpoints" / "20")
  error = refused(capsys, run, tmp_path / "o")
  assert "The checkpoint of step 20 of " in error and words in error
  assert "step 10 can be taken instead, with --step 10." in error
  assert not (tmp_path / "o").exists()
  with pytest.raises(CheckpointError, match=words):
    runs.open_run(run, model="umt5")
  assert runs.open_run(run, step=10, model="umt5").config == TEXT
  if damage != "no note":  # the other one is whole
    assert runs.open_run(run).origin["step"] == 20


def test_numbers_that_are_not_those_that_were_saved_are_refused(tmp_path):
  items = {"student": FIRST, "umt5": jax.tree.map(np.copy, WORDS)}
  _, note = noted(items, umt5=TEXT)
  items["umt5"]["token_embedding"].flat[7] += 1e-3
  folder = write(tmp_path / "bad", {1: (items, note)})
  with pytest.raises(CheckpointError, match="damaged.*arrays of its umt5 are not those"):
    loading.load(folder, "umt5")


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"umt5": {"dim": 7}}, "describes no text encoder"),
    ({"umt5": None}, "describes no text encoder"),
    ({"umt5": {**dataclasses.asdict(TEXT), "dim": 10}}, "not of the architecture in its note"),
    ({"umt5": {**dataclasses.asdict(TEXT), "heads": 3}}, "describes no text encoder"),
    ({"vae": [3]}, "describes no vae"),
  ],
)
def test_notes_that_cannot_be_followed(run, change, sentence):
  file = run / "checkpoints" / "20" / "note" / "metadata"
  file.write_text(json.dumps({**json.loads(file.read_text()), "models": change}))
  with pytest.raises(CheckpointError, match=sentence):
    runs.open_run(run, model=next(iter(change)))


@pytest.mark.parametrize("models", [None, [], "umt5", 3])
def test_a_note_may_say_nothing_of_others(run, models):
  """As those of earlier runs."""
  file = run / "checkpoints" / "20" / "note" / "metadata"
  file.write_text(json.dumps({**json.loads(file.read_text()), "models": models}))
  assert runs.models(run) == ["dit"]
  assert runs.open_run(run).kind.name == "dit"


def test_a_run_without_checkpoints_is_said_whatever_is_asked_for(tmp_path):
  (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
  for model in ("dit", "umt5"):
    with pytest.raises(CheckpointError, match="has written no checkpoint yet"):
      runs.open_run(tmp_path, model=model)
