"""What a study's settings may be."""

import pytest

from pipeline.config import CorpusConfig, HeldOutConfig
from pipeline.errors import ConfigError
from pipeline.study.config import ArmConfig, StudyConfig

CORPUS = CorpusConfig("c")


def study(arm: str = "mol", dump: str = "main") -> StudyConfig:
    return StudyConfig(
        model="m",
        domain=CORPUS,
        general=CORPUS,
        held_out=HeldOutConfig(domain=CORPUS, general=CORPUS),
        output="o",
        arms={arm: ArmConfig()},
        dumps={dump: "path/of/a/dump"},
    )


@pytest.mark.parametrize("name", ["mol", "alpha-0.25", "ce half", "β=3", "8", "a" * 100])
def test_names_of_directories(name: str) -> None:
    study(arm=name, dump=name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../out", "a/b", "/etc", ".hidden", "-rf", "a\n", "a\0b", "a" * 101]
)
def test_other_names_are_refused(name: str) -> None:
    """A run is made in runs/NAME-…: a path would put it anywhere."""
    for given in ({"arm": name}, {"dump": name}):
        with pytest.raises(ConfigError, match="a name becomes part of a directory's"):
            study(**given)
