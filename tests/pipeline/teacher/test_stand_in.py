"""Stand-ins for packages of images and sound that are not installed."""

import importlib.util
import subprocess
import sys

import pytest

from pipeline.teacher.stand_in import NAMES
from tests.helpers.paths import ROOT

absent = [name for name in NAMES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif("torchvision" not in absent, reason="torchvision is installed")

CODE = """
import importlib.util
from pipeline.teacher import stand_in
stand_in.install()
stand_in.install()
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvF
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.utils import is_torchvision_available
assert not is_torchvision_available()
class Own(v2.Transform):
    pass
assert tvF.InterpolationMode.BICUBIC
for call in (tvF.resize, Own):
    try:
        call()
    except ModuleNotFoundError as error:
        print(error)
try:
    import torchvision_of_someone
except ModuleNotFoundError as error:
    print(error)
"""


def test_they_can_be_imported_but_not_used() -> None:
    """What transformers believes does not change."""
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "No module named 'torchvision'",
        "No module named 'torchvision'",
        "No module named 'torchvision_of_someone'",
    ]
