"""A wrapper's student keeps the files of its processor."""

from pathlib import Path

from pipeline.models.processor import copy_processor


def test_only_the_processors_files_are_copied_and_none_is_overwritten(tmp_path: Path) -> None:
    base, saved = tmp_path / "base", tmp_path / "saved"
    base.mkdir()
    saved.mkdir()
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "notes.json"):
        (base / name).write_text(name)
    for folder in (base, saved):
        (folder / "chat_template.jinja").write_text(folder.name)
    copy_processor(base, saved)
    found = {path.name: path.read_text() for path in saved.iterdir()}
    assert found == {
        "preprocessor_config.json": "preprocessor_config.json",
        "video_preprocessor_config.json": "video_preprocessor_config.json",
        "chat_template.jinja": "saved",
    }
