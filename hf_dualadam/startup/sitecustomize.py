"""Imported by Python at the start of a process under ``hf-dualadam``; see the package that it is in.

Uses only the standard library, and no syntax of newer Pythons: any Python with this ``PYTHONPATH`` runs it.
"""

import os
import sys
from importlib import machinery, util

HERE = os.path.dirname(os.path.abspath(__file__))
# Register when the first of these is imported, before its code runs, so that none is half initialized.
ROOTS = {
    "transformers.training_args": "hf_dualadam",
    "transformers.trainer_callback": "hf_dualadam",
    "transformers.trainer_optimizer": "hf_dualadam",
    "transformers.trainer": "hf_dualadam",
    "timm.optim": "hf_dualadam.timm",
}


class RegisterFirst:
    """A finder that finds nothing, but registers the optimizers before a module they are registered with is used."""

    def __init__(self):
        self.done = set()

    def find_spec(self, name, path=None, target=None):
        """Register if this is the first import that needs it, which also imports the module itself."""
        registering = ROOTS.get(name)
        if registering is None or registering in self.done:
            return None
        self.done.add(registering)
        if registering in sys.modules:  # it is being imported, and registers itself
            return None
        try:
            __import__(registering)
        except Exception as error:
            sys.stderr.write(f"hf-dualadam: the optimizers are not registered in this process: {error}\n")
        module = sys.modules.get(name)
        if module is not None:  # the import continues with the module's own spec and would run it again
            module.__spec__ = machinery.ModuleSpec(name, Imported(module), origin=module.__spec__.origin)
        return getattr(module, "__spec__", None)


class Imported:
    """A loader for a module that is already imported."""

    def __init__(self, module):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec):
        """Return the module that is already loaded."""
        return self.module

    def exec_module(self, module):
        """Restore the spec, which the import system has replaced; the code has already run."""
        module.__spec__ = self.spec


class FindPackage:
    """A finder of this package if it is not installed: in the checkout whose launcher started the process."""

    def find_spec(self, name, path=None, target=None):
        """Find the package that contains this folder."""
        if name != "hf_dualadam":
            return None
        folder = os.path.dirname(HERE)
        return util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def run_the_other():
    """Run the sitecustomize module that Python would have found without this one."""
    spec = machinery.PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.path[:] = [entry for entry in sys.path if entry != HERE]
    if sys.version_info >= (3, 10):  # noqa: UP036 - any Python may find this file
        sys.meta_path.insert(0, RegisterFirst())
        sys.meta_path.append(FindPackage())
    run_the_other()
