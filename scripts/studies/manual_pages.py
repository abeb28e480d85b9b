"""Debian's manual pages as JSONL corpora: adaptation text in a language, and the English of it.

    python scripts/studies/manual_pages.py FOLDER manpages-de manpages-de-dev
    python scripts/studies/manual_pages.py FOLDER manpages manpages-dev

Packages are fetched by name with `apt-get download` and unpacked with `dpkg-deb`; nothing is
installed. `groff` renders each page as text of 78 columns, without its licence and its list of
translators, and its lines are joined to paragraphs. Each document is {"id": "man3/printf.3",
"text": ...}. One page in eight is held out, by the hash of its name, so that a page and its
translation are on one side; the order is that of the hashes, too, so that the first pages are a
sample of all. FOLDER gets PACKAGE.train.jsonl and PACKAGE.test.jsonl, named after the
first package.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HELD_OUT = 8  # one page in so many
SHORTEST = 600  # characters; shorter pages are aliases of others
# Sections that are the same in every page.
LEFT_OUT = re.compile(
    r"^(COLOPHON|COPYRIGHT|KOLOPHON|ÜBERSETZUNG|TRADUCTION|LICENSE|AUTOR|AUTOREN|AUTHORS?)\b"
)
# The head and foot that some pages repeat: PRINTF(3) ... PRINTF(3).
REPEATED = re.compile(r"^(\S+\(\w+\)) .* \1$")
RENDER = ("groff", "-K", "utf8", "-m", "mandoc", "-T", "utf8", "-P-cbou", "-rLL=78n", "-rHY=0")


def main(folder: Path, packages: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["apt-get", "download", "-q", *packages], cwd=work, check=True)
        for file in Path(work).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", file, Path(work) / "root"], check=True)
        files = sorted(f for f in (Path(work) / "root").rglob("*.gz") if is_page(f))
        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(render, files))
    pages = {
        f"{file.parent.name}/{file.stem}": text
        for file, text in zip(files, texts, strict=True)
        if len(text) >= SHORTEST
    }
    for part in ("train", "test"):
        names = sorted((name for name in pages if part_of(name) == part), key=digest)
        own = {name: pages[name] for name in names}
        with (folder / f"{packages[0]}.{part}.jsonl").open("w", encoding="utf-8") as out:
            for name, text in own.items():
                print(json.dumps({"id": name, "text": text}, ensure_ascii=False), file=out)
        print(f"{part}: {len(own):,} pages, {sum(map(len, own.values())):,} characters")


def is_page(file: Path) -> bool:
    return file.parent.name.startswith("man") and not file.is_symlink()


def digest(name: str) -> bytes:
    """Decides the order of the pages, and which are held out."""
    return hashlib.sha256(name.encode()).digest()


def part_of(name: str) -> str:
    return "train" if digest(name)[0] % HELD_OUT else "test"


def render(file: Path) -> str:
    source = gzip.decompress(file.read_bytes())
    done = subprocess.run(RENDER, input=source, capture_output=True, check=True)
    return "\n".join(paragraphs(done.stdout.decode(errors="replace")))


def paragraphs(page: str) -> Iterator[str]:
    """The page without its head and foot, each paragraph on one line."""
    held: list[str] = []
    shown = True
    for line in page.split("\n")[2:-3]:
        heading = bool(line) and not line.startswith(" ")
        if heading:
            shown = not LEFT_OUT.match(line)
        words = " ".join(line.split())
        if not shown or REPEATED.match(words):
            continue
        if heading or not words:
            if held:
                yield " ".join(held)
            held = []
        if words and heading:
            yield f"\n{words}"
        elif words:
            held.append(words)
    if held and shown:
        yield " ".join(held)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
