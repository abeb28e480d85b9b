"""Stand-ins for torchvision and torchaudio where they are not installed.

vLLM's wrappers of language models, and some of its language models, import them at the top of their
modules, for images and sound. A teacher reads text alone and calls none of it. Beside a CPU build
of torch they are left out, because only CUDA builds of them are published.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from transformers.utils import is_torchaudio_available, is_torchvision_available

NAMES = ("torchvision", "torchaudio")


def install() -> None:
    """Let `import torchvision` and `import torchaudio` succeed in this process where they are not
    installed. What they would do raises ModuleNotFoundError when it is called."""
    # transformers remembers the answer, so it goes on choosing classes that do without them.
    _ = is_torchvision_available(), is_torchaudio_available()
    absent = [name for name in NAMES if importlib.util.find_spec(name) is None]
    if absent:
        sys.meta_path.append(StandIns(absent))


class StandIns:
    """Finds and makes modules for these packages and everything below them."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


class Module(ModuleType):
    """Every name in it is an `Absent` class."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {"package": self.__name__.partition(".")[0]})


class Absent(type):
    """A class that can be named, inherited from and looked into, but neither made nor called."""

    package: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {"package": cls.package})

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise ModuleNotFoundError(f"No module named {cls.package!r}", name=cls.package)
