"""Adds the bundled model, its quiz and its recipe to wheels, as `expertcut/bundled`."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = (  # what `expertcut demo` copies; they stand once in the repository
    "checkpoints/quickstart/*.json",
    "checkpoints/quickstart/README.md",
    "checkpoints/quickstart/model.safetensors",
    "checkpoints/quickstart/quiz/*/*.csv",
    "recipes/quickstart.yaml",
)


class build_py_with_bundle(build_py):
    """`build_py` with the bundled files among the data of the package."""

    def _get_data_files(self):
        files = [str(f) for pattern in BUNDLED for f in sorted(Path().glob(pattern))]
        into = str(Path(self.build_lib, "expertcut", "bundled"))
        return [*super()._get_data_files(), ("expertcut", ".", into, files)]


setup(cmdclass={"build_py": build_py_with_bundle})
