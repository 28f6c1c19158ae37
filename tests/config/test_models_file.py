"""The file of `vista serve models=…`, and what is refused in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vista.config import ServeConfig
from vista.config.serve_config import ModelsFile, ServedModel
from vista.errors import ConfigError

MODELS = "models:\n  control: {model: runs/a/best, store: stores/a}\n  larger: {model: runs/b/best, store: stores/b}\n"


def read(folder: Path, text: str) -> ModelsFile:
    path = folder / "models.yaml"
    path.write_text(text)
    return ModelsFile.read(str(path))


def test_all_keys(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        """
models:
  control: {model: runs/a/best, store: stores/a}
  larger: {model: runs/b/best, store: stores/b, index: runs/b/index, task: click}
split: {control: 0.9, larger: 0.1}
experiment: spring
""",
    )
    assert list(file.models) == ["control", "larger"]
    assert file.models["control"] == ServedModel(model="runs/a/best", store="stores/a")
    assert file.models["larger"].task == "click" and file.models["larger"].index == "runs/b/index"
    plain = read(tmp_path, MODELS)
    assert plain.split == {}
    # Without a name, an experiment is called after its variants.
    assert read(tmp_path, MODELS + "split: {control: 1, larger: 0}").experiment == "control,larger"
    assert (file.split, file.experiment) == ({"control": 0.9, "larger": 0.1}, "spring")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {}", "must name 1 to 64 models"),
        (MODELS + "experiment: 7", "experiment: must be text"),
        (MODELS + "split: {control: 0.9, larger: 0.2}", "yaml: split: the shares must sum to 1, but sum to 1.1"),
        (MODELS + "split: {control: 0.9, other: 0.1}", "split: 'other' is not one of the models, control, larger"),
        (MODELS + "split: {control: 1.5, larger: -0.5}", r"split.control: must lie in \[0, 1\], got 1.5"),
        (MODELS + "splits: {control: 1}", "unknown key splits; the keys are models, split, experiment"),
        ("models: {a: {model: runs/a}}", "models.a: needs store"),
        ("models: {a: {model: 7, store: stores/a}}", "models.a.model: expected str, got 7"),
        ("models: {'a b': {model: runs/a, store: stores/a}}", "models.a b: a name has at most 64 letters"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models=.*nowhere.yaml: No such file"):
        ModelsFile.read(str(tmp_path / "nowhere.yaml"))


def test_keys_of_one_model_are_refused_with_a_file() -> None:
    with pytest.raises(ConfigError, match=r"store: only applies without models=models.yaml"):
        ServeConfig(models="models.yaml", store="stores/mine")
