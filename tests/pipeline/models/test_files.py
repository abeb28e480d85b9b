"""What is read of a model directory lies in it, and a broken JSON file is named."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.models.files import read_json, refuse_links_out


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "[" * 100_000, "\xff", "{} {}"])
def test_what_is_no_json_object_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json: expected"):
        read_json(file)


def test_a_link_to_a_file_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").symlink_to("vocab.json")  # inside
    (folder / "gone").symlink_to("nowhere")
    refuse_links_out(folder)
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"tokenizer\.model is a link to a file outside"):
        refuse_links_out(folder)


def test_the_layout_of_the_hub_is_allowed(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1234"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    refuse_links_out(snapshot)
    link = tmp_path / "link"
    link.symlink_to(snapshot)  # the user's own link to a directory
    refuse_links_out(link)
    (tmp_path / "secret").write_text("key")
    (blobs / "def").symlink_to(tmp_path / "secret")
    (snapshot / "vocab.json").symlink_to("../../blobs/def")
    with pytest.raises(ConfigError, match=r"vocab\.json is a link"):
        refuse_links_out(snapshot)
