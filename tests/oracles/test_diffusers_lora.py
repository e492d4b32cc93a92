"""Saved adapters against Diffusers, which translates files of original names for its own model."""

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from safetensors.torch import load_file

from hfjax.convert import dit
from hfjax.models import wan
from hfjax.models.presets import WanConfig
from hfjax.training import lora

SIZES = {"dim": 32, "ffn_dim": 48, "heads": 2, "layers": 2, "text_dim": 12, "freq_dim": 16}


@pytest.mark.parametrize("image_dim", [0, 10])
def test_diffusers_reads_the_same_updates(tmp_path, image_dim):
  config, r = WanConfig(**SIZES, image_dim=image_dim), np.random.default_rng(0)
  params = jax.eval_shape(lambda: wan.init_params(config, jax.random.key(0)))
  draw = lambda tree: jax.tree.map(lambda x: r.normal(size=x.shape).astype(np.float32), tree)
  params, adapters = draw(params), draw(lora.init(params, jax.random.key(0), 4, "all"))
  lora.save(tmp_path / "l.safetensors", config, adapters, 3.0)
  theirs = WanLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "l.safetensors"))
  before = dit.to_original(config, params)
  after = dit.to_original(config, lora.merge(params, adapters, 3.0))
  changed = {n for n in before if np.abs(after[n] - before[n]).max() > 0.1}
  table = dit.table(config)
  assert len(theirs) == 2 * len(changed) == 2 * 2 * len(adapters)
  for name in changed:
    module = f"transformer.{table.diffusers_name(name).removesuffix('.weight')}"
    update = torch.matmul(theirs[f"{module}.lora_B.weight"], theirs[f"{module}.lora_A.weight"])
    np.testing.assert_allclose(before[name] + update.numpy(), after[name], rtol=0, atol=2e-5)
