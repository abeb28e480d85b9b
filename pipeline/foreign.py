"""Text that comes from anyone: shown without commands for the terminal, and without secrets."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from pipeline.errors import ConfigError

# Categories of Unicode: controls, invisible formats (they turn the reading direction, too), halves
# of pairs, and the separators of lines and paragraphs.
NOT_SHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # zero width (non-)joiner: needed in Persian, in Hindi, in emoji
USER = re.compile(r"(?<=://)[^/\s@'\"]*@")
QUERY = re.compile(
    r"([?&][\w.-]*(?:sig|signature|token|key|secret|password|credential)[\w.-]*=)[^&\s'\"]+", re.I
)
SECRET_NAME = re.compile(
    r"(?:.*_)?(?:(?:hub|hf|auth|access|api|secret|private|session)_?(?:token|key)|passw(?:or)?d|secret)"
    r"|token",
    re.I,
)


def printable(text: str) -> str:
    """The text with every character that would command a terminal escaped, as in \\x1b, and
    without user names, passwords and signatures in URLs. Line ends and tabs stay."""
    return without_secrets("".join(map(visible, text)))


def visible(character: str) -> str:
    if character in "\n\t" or character in JOINERS:
        return character
    if unicodedata.category(character) not in NOT_SHOWN:
        return character
    return character.encode("unicode_escape").decode()


def without_secrets(text: str) -> str:
    return QUERY.sub(r"\1***", USER.sub("***@", text))


def refuse_secrets(settings: Any) -> None:
    """ConfigError for a password or token in a setting: settings are written into plans, runs,
    logs and reports, which are copied and shown."""
    for name, value in texts_of(settings, ""):
        if value and SECRET_NAME.fullmatch(name.rpartition(".")[2]):
            raise ConfigError(
                f"{name}: a password or token does not belong into the settings, which are written "
                "down. Set it in the environment, such as HF_TOKEN or AWS_SECRET_ACCESS_KEY"
            )
        if without_secrets(value) != value:
            raise ConfigError(
                f"{name}: {printable(value)} holds a user name, a password or a signature, and "
                "paths are written down. Set them in the environment, such as AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY, or copy the file here first"
            )


def texts_of(settings: Any, name: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every text among the settings; keys are texts, too."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = {
            part.name: getattr(settings, part.name) for part in dataclasses.fields(settings)
        }
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield name or "settings", str(key)
            yield from texts_of(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from texts_of(value, name)
    elif isinstance(settings, str):
        yield name, settings
