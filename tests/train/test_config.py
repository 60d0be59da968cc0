"""Recipes and settings are not trusted: what no run can have is an error that names it."""

from pathlib import Path

import pytest

from dfformer.train.config import _SETTINGS, parse
from dfformer.train.strict_yaml import load

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)
DIGITS = "9" * 400
RECIPES: dict[str, tuple[str, str]] = {
    "alias-bomb": (BOMB, r"the alias \*a"),
    "one-alias": ("data: {train_split: &x a, val_split: *x}", r"the alias \*x"),
    "python-object": ("output: !!python/object/apply:os.system ['touch sprung']", "has the tag"),
    "python-name": ("model: {name: !!python/name:os.system }", "has the tag"),
    "other-tag": ("seed: !!binary MQ==", "has the tag"),
    "deep": ("model: {args: " + "[" * 5000 + "]" * 5000 + "}", "nested deeper"),
    "twice": ("seed: 1\nseed: 2", "^recipe.yaml: YAML: the key 'seed' is repeated, in line 1 and line 2$"),
    "twice-inside": ("optim: {lr: 1, lr: 2}", "the key 'lr' is repeated, in line 1 and line 1$"),
    "twice-a-list": ("model:\n  args: {? [a] : 1,\n    ? [a] : 2}", "^recipe.yaml: .* found unhashable key .* line 2"),
    "400-digits": (f"seed: {DIGITS}", "number"),
    "400-digits-of-lr": (f"optim: {{lr: {DIGITS}}}", "number"),
    "400-digits-of-args": (f"model: {{args: {{num_classes: {DIGITS}}}}}", "number"),
    "5000-digits": (f"seed: {'9' * 5000}", "number"),
    "infinity": ("optim: {lr: .inf}", "optim.lr: expected a number .*, got inf"),
    "nan": ("optim: {min_lr: .nan}", "optim.min_lr: expected a number .*, got nan"),
    "nan-in-list": ("data: {mean: [.nan, 0, 0]}", r"data.mean: expected .*, got \[nan, 0.0, 0.0\]"),
    "long": ("# " + "x" * 2**21, "characters"),
    "null": ("restore: {noise: null}", "restore.noise: expected a number from 0 to 255, got null"),
    "null-of-two": ("augment: {scale: null}", "augment.scale: expected two numbers .*, got null"),
    "null-name": ("data: {dataset: null}", "data.dataset: expected .*, got null"),
    "null-word": ("optim: {opt: null}", "optim.opt: expected another value, got null"),
    "another-recipe": ("config: /etc/hostname", "config: a recipe cannot name another"),
    "packaged-recipe": ("recipe: digits", "recipe: a recipe cannot name another"),
    "section-list": ("augment: [1]", "augment: expected its settings by name, got "),
    "section-null": ("model:\noptim: {lr: 1}", "model: expected its settings by name, got 'None'"),
    "section-file": ("optim: recipe.yaml", "optim: expected its settings by name, got 'recipe.yaml'"),
    "section-number": ("optim: 3", "optim: expected its settings by name, got '3'"),
    "list": ("[1, 2]", r"^recipe.yaml: expected settings by name, got '\[1, 2\]'"),
    "not-yaml": ("a: [", "^recipe.yaml: while parsing"),
    "binary": ("\x00\x01", "^recipe.yaml: .*character"),
}


@pytest.mark.parametrize(("text", "message"), RECIPES.values(), ids=RECIPES.keys())
def test_recipes_that_are_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        parse(["--recipe", "recipe.yaml"])
    assert len(str(raised.value)) < 3000
    assert "Node(" not in str(raised.value)
    assert not Path("sprung").exists()


SETTINGS: dict[str, tuple[list[str], str]] = {
    **{
        name: ([f"--model.args.{name}", value], rf"model\.args\.{name}: (unknown name|expected)")
        for name, value in {
            "checkpoint_path": "evil.pth",
            "pretrained_cfg": "{file: evil.pth}",
            "pretrained_cfg_overlay": "{url: 'http://127.0.0.1/evil.pth'}",
            "cache_dir": "/",
            "token_mixers": "os.system",
            "pretrained": "evil.pth",
            "depths": "[1000000]",
            "in_chans": "0",
            "drop_rate": "2",
        }.items()
    },
    "hub": (["--model.name", "hf-hub:timm/resnet18"], r"model\.name: timm knows no model 'hf-hub"),
    "local": (["--model.name", "local-dir:."], r"model\.name"),
    "tag-with-a-path": (["--model.name", "dfformer_s18./evil"], r"model\.name"),
    "near": (["--model.name", "dffromer_s18"], "did you mean dfformer_s18"),
    "near-argument": (["--model.args.drop_path_rat", "0"], "did you mean drop_path_rate"),
    "foreign-argument": (["--model.name", "resnet18", "--model.args.block", "x"], r"model\.args\.block"),
    "decoder": (["--segment.decoder.encoder_weights", "imagenet"], r"segment\.decoder\.encoder_weights"),
    "grey-mean": (["--model.args.in_chans", "1"], r"data\.mean: expected .*in_chans.*, got the model's default"),
    "grey-std": (
        ["--model.args.in_chans", "1", "--data.mean", "[0.5]"],
        r"data\.std: expected .*, got the model's default",
    ),
    "four-channels": (["--model.args.in_chans", "4", "--data.mean", "[1,1,1]"], r"data\.mean: expected .*, got"),
    "empty-mean": (["--data.mean", "[]"], r"data\.mean: expected .*, got"),
    "nan-std": (["--data.std", "[.nan, 1, 1]"], r"data\.std"),
    "inf-lr": (["--optim.lr", ".inf"], "finite|number"),
    "inf-as-text": (["--optim.lr", "inf"], "finite|number|float"),
    "nan-warmup": (["--optim.warmup_lr", "nan"], "finite|number|float"),
    "1e400": (["--optim.lr", "1e400"], "finite|number"),
    "400-digits": (["--optim.epochs", DIGITS], "number"),
    "400-digits-of-size": (["--data.img_size", DIGITS], "number"),
    "billion-epochs": (["--optim.epochs", "1000000000"], r"optim\.epochs"),
    "huge-size": (["--data.img_size", "4097"], r"data\.img_size: expected a whole number from 1 to 4096 .*, got 4097"),
    "second-order": (["--optim.opt", "adahessian"], r"optim\.opt: expected .* without second .*, got 'adahessian'"),
    "needs-a-library": (["--optim.opt", "fusedadam"], r"optim\.opt: expected .*, got 'fusedadam'"),
    "no-checkpoint": (["--optim.opt", "adafactorbv"], r"optim\.opt: expected .* 'adafactorbv': Val"),
    "milestones-far": (["--optim.milestones", "[1, 1000001]"], r"optim\.milestones: expected epochs from 1 to 1000000"),
    "milestones-order": (
        ["--optim.milestones", "[3, 1]"],
        r"optim\.milestones: expected .* in ascending order, got .3, 1.",
    ),
    "malformed-policy": (["--augment.auto_augment", "rand-mx"], r"augment\.auto_augment: expected.* got 'rand-mx'"),
    "endless-policy": (["--augment.auto_augment", "rand-m9-n99999999"], r"augment\.auto_augment"),
    "empty-output": (["--output="], r"output: expected a path, got ''"),
    "empty-root": (["--data.root", ""], r"data\.root: expected a path, got ''"),
    "empty-train-split": (["--data.train_split="], r"data\.train_split: expected a name, got ''"),
    "empty-val-split": (["--data.val_split", ""], r"data\.val_split: expected a name, got ''"),
    "empty-checkpoint": (["--model.checkpoint="], r"model\.checkpoint: expected a path, got ''"),
    "shell": (["--data.dataset", "wds/x", "--data.root", "pipe:touch sprung"], r"data\.dataset"),
}


@pytest.mark.parametrize(("arguments", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_settings_that_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments)


def test_the_command_line_overrules_the_recipe_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("optim: {lr: 0.5}\nseed: 3")
    recipe = ["--recipe", str(tmp_path / "own.yaml")]
    for arguments in (["--seed", "4", *recipe], [*recipe, "--seed", "4"], ["--seed=4", "--config=" + recipe[1]]):
        config = parse(arguments)
        assert (config.seed, config.optim.lr) == (4, 0.5)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("optm: {lr: 1}", r"optm\.lr: is not a setting; did you mean optim\.lr"),
        ("optim: {lrr: 1}", r"optim\.lrr: is not a setting; did you mean optim\.lr"),
        ("lr: 1", r"lr: is not a setting; did you mean optim\.lr\?$"),
    ],
)
def test_unknown_names_in_a_recipe_suggest_the_nearest(recipe: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=rf"own\.yaml: {message}"):
        parse(["--recipe", str(tmp_path / "own.yaml")])


def test_what_recipes_have() -> None:
    config = parse(["--model.args", "{in_chans: 1, depths: [1, 2]}", "--data.mean=[0.5]", "--data.std=[.25]",
                    "--model.args.pretrained", "true", "--optim.lr", "1e-4", "--output", "runs/2024_01"])  # fmt: skip
    assert config.model.args == {"in_chans": 1, "depths": [1, 2], "pretrained": True}
    assert (config.data.std, config.optim.lr, config.output) == ([0.25], 1e-4, "runs/2024_01")
    assert load("a: 1.5") == {"a": 1.5}


NUMBERS = [name for name, value in _SETTINGS.items() if type(value) in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_limits(name: str) -> None:
    for value in ("-1", "1e300"):
        with pytest.raises(ValueError, match=name):
            parse([f"--{name}", value])
