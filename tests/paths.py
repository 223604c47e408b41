"""The paths of the optimizers, by name: the options that select each."""

from hf_dualadam.kernels import cpu

PATHS = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "default": {},
    "capturable": {"capturable": True},
}
if cpu.load() is None:
    del PATHS["fused"]
