"""Tests run on the processor, whatever the machine has, and draw the same examples every time."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here are tiny, so that compiling them is most of the work.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
  " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  " --xla_cpu_parallel_codegen_split_count=1"
  # XLA's former emitters of loops, which compile several times faster than those through MLIR.
  " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
# Two devices, so that what is sharded has something to be sharded over.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
# The Hopper interpreter's threads wait for each other on XLA's threads, of which there is one for
# each core by default: with two, all of them might wait.
os.environ["NPROC"] = "16"
# What one module, worker or command compiles is compiled for all of them, and forgotten at the
# end: the first process makes the folder, and the environment tells the others of it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  PROGRAMS = tempfile.mkdtemp(prefix="hfjax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
  atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import pytest

from hfjax.convert import dit, taehv, umt5, vae

jax.config.update("jax_default_matmul_precision", "highest")
# The first example of a test compiles, so deadlines would measure the compiler.
hypothesis.settings.register_profile(
  "hfjax", deadline=None, max_examples=20, derandomize=True, database=None
)
hypothesis.settings.load_profile("hfjax")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
  """A process may map only so much memory, and programs of all tests together are more."""
  yield
  for kind in (dit, taehv, umt5, vae):  # a module may put other networks in place of hfjax's
    kind.table.cache_clear()
  jax.clear_caches()
  gc.collect()
