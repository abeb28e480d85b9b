"""Foreign text, made safe for a terminal."""

import unicodedata

# Control characters (an escape sequence can set a title, clear the screen, fill the clipboard),
# formats (they can turn the direction of text, or hide it), halves of pairs, line separators.
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
KEPT = {"\n", "\t", "\u200c", "\u200d"}  # the joiners are part of words and emoji


def printable(text: str) -> str:
    r"""The text with \x1b, \u202e and so on written out; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(escaped(character) for character in text)


def escaped(character: str) -> str:
    if character in KEPT or unicodedata.category(character) not in UNSAFE:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def one_line(text: str) -> str:
    """As printable, with line ends written out too."""
    return printable(text).replace("\n", "\\n")
