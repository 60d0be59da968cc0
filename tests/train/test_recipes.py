"""Recipes: found by name and by path, and the one for your own folder does what its page says."""

import math
from pathlib import Path

import pytest
import timm
from paths import ROOT
from train_runs import history, steps, write_images

from dfformer.cli.main import main
from dfformer.models.checkpoint import load_model, save_checkpoint
from dfformer.train.config import parse
from dfformer.train.recipes import find_recipe, packaged_recipes, split_recipes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = Path("own.yaml")
    own.write_text("seed: 7")
    assert packaged_recipes() == {path.stem: path for path in (ROOT / "recipes").glob("*.yaml")}
    assert parse(["--recipe", "digits"]) == parse(["--recipe", str(ROOT / "recipes" / "digits.yaml")])
    assert parse(["--config=digits"]) == parse(["--recipe=digits"])
    Path("digits").mkdir()  # such as one of results
    assert parse(["--recipe", "digits"]).data.dataset == "digits"
    assert parse(["--recipe", "own.yaml"]).seed == 7
    Path("digits").rmdir()
    Path("digits").write_text("seed: 8")  # a file goes before a packaged name
    assert parse(["--recipe", "digits"]).seed == 8


def test_other_arguments_stay_as_they_are() -> None:
    arguments = ["--output", "digits", "--model.name=digits", "--seed", "-1", "--model.args", "{}"]
    assert split_recipes(arguments) == ([], arguments)
    with pytest.raises(ValueError, match=r"--recipe.*: expected one argument"):
        parse(["--seed", "1", "--recipe"])


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "digitz": "recipe: expected a file or a packaged recipe, got 'digitz'; did you mean digits?",
        "recipes/dfformer_s81.yaml": "did you mean dfformer_s18",
        "xyzzy": "recipe: expected a file or a packaged recipe, got 'xyzzy'",
        "": "recipe: expected a file or a packaged recipe, got ''",
        ".": "recipe: expected a file or a packaged recipe, got '.'",
    }.items(),
)
def test_unknown_recipes(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--recipe", name], [f"--recipe={name}"]):
        assert main(["train", *flags]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="recipe: expected"):
        find_recipe(name)


def test_transfer_to_a_folder(tmp_path: Path) -> None:
    """The recipe for your own folder, with a small model: weights come over, the classifier is new, it learns."""
    for split, count in (("train", 12), ("val", 6)):
        write_images(tmp_path / "data" / split, {"dark": count, "light": count})
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "num_classes": 5}
    start = timm.create_model("cdfformer_s18", **arguments)
    save_checkpoint(start, tmp_path / "start.safetensors", "cdfformer_s18", arguments)
    small = ["--model.args.depths=[1,1,1,1]", "--model.args.dims=[8,8,16,16]", "--data.img_size=32"]
    run = ["--data.workers=0", "--optim.global_batch=8", "--optim.lr=3e-3", "--output", str(tmp_path / "run")]
    weights = ["--model.checkpoint", str(tmp_path / "start.safetensors"), "--data.root", str(tmp_path / "data")]
    assert main(["train", "--recipe", "transfer", *weights, *small, *run]) == 0
    rows = history(tmp_path / "run")
    assert len(rows) == 10
    assert float(rows[-1]["top1"]) == 1
    assert math.isclose(steps(tmp_path / "run")[0]["loss"], math.log(2), rel_tol=0.2)  # of a new classifier
    assert load_model(tmp_path / "run" / "last.safetensors")[1] == ["dark", "light"]
