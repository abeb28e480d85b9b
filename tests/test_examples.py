"""The example script runs, and its student learns."""

import re
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import scripts
from tests.helpers.corpora import some_texts, write_texts
from tests.helpers.dumps import with_rows
from tests.helpers.masks import masked, some_targets
from tests.helpers.paths import SCRIPTS
from tests.helpers.records import TARGETS

SCRIPT = SCRIPTS / "examples" / "plain_torch.py"


def test_plain_torch(tmp_path: Path, model_path: Path, dump_path: Path) -> None:
    domain = write_texts(tmp_path / "domain.jsonl", [some_texts(1)[0][::-1]])
    arguments = [model_path, dump_path, domain, tmp_path / "student", 12]
    done = scripts.run(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    found = [
        (float(ce), float(kl)) for ce, kl in re.findall(r"CE ([\d.]+), KL ([\d.]+)", done.stdout)
    ]
    assert len(found) == 12
    assert found[0][1] < 1e-3  # the student still equals the teacher
    assert found[-1][0] < found[0][0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").num_parameters() > 0


def test_plain_torch_learns_the_targets_of_a_dump(
    tmp_path: Path, model_path: Path, dump_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its first step the student is the teacher, wherever the stored positions are."""
    masked_dump = with_rows(
        dump_path,
        tmp_path / "dump",
        lambda record: masked(record, some_targets(len(record.input_ids))),
        targets=TARGETS,
    )
    domain = write_texts(tmp_path / "domain.jsonl", some_texts(1))
    run = runpy.run_path(str(SCRIPT))["main"]
    run(str(model_path), str(masked_dump), str(domain), str(tmp_path / "student"), "1")
    (kl,) = re.findall(r"KL ([\d.]+)", capsys.readouterr().out)
    assert float(kl) < 1e-3
