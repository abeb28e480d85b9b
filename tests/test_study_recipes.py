"""The recipes of scripts/studies: what they make of manual pages and of BIG-bench's questions."""

import gzip
import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.paths import SCRIPTS

PAGE = """PRINTF(3)            Library Functions Manual            PRINTF(3)

NAME
       printf - formatted
       output

DESCRIPTION
       It writes.

       PRINTF(3) in the text stays.

COPYRIGHT
       Nobody's.

SEE ALSO
       scanf(3)

Linux                       2026-01-01                       PRINTF(3)

"""


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / "studies" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_page_is_paragraphs_without_head_foot_and_licence() -> None:
    assert list(recipe("manual_pages").paragraphs(PAGE)) == [
        "\nNAME",
        "printf - formatted output",
        "\nDESCRIPTION",
        "It writes.",
        "PRINTF(3) in the text stays.",
        "\nSEE ALSO",
        "scanf(3)",
    ]


def test_a_page_and_its_translation_are_on_one_side() -> None:
    pages = recipe("manual_pages")
    parts = [pages.part_of(f"man3/page{number}.3") for number in range(4000)]
    assert set(parts) == {"train", "test"}
    assert parts.count("test") == pytest.approx(4000 / pages.HELD_OUT, rel=0.15)
    assert pages.part_of("man3/page7.3") == parts[7], "the name alone decides"


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff here")
def test_groff_renders_a_page(tmp_path: Path) -> None:
    source = ".TH PAGE 1\n.SH NAME\npage \\- ein schönes Wort\n.SH TEXT\nEins\nzwei.\n"
    file = tmp_path / "page.1.gz"
    file.write_bytes(gzip.compress(source.encode()))
    text = recipe("manual_pages").render(file)
    assert "ein schönes Wort" in text
    assert "Eins zwei." in text
    assert "\x1b" not in text


def test_questions_have_one_right_option() -> None:
    def example(text: str, **scores: int) -> dict[str, object]:
        return {"input": text, "target_scores": scores}

    task = {
        "task_prefix": "Think. ",
        "examples": [
            example("one", yes=1, no=0),
            example("two right", a=1, b=1),
            example("one option", a=1),
            example("long " * 200, a=1, b=0),
            {"input": "no options", "target": "a"},
        ],
    }
    (found,) = recipe("bigbench_tasks").questions(task, longest=600)
    assert found == {"question": "Think. \nQ: one\nA:", "options": ["yes", "no"], "answer": 0}
