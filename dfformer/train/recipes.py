"""The packaged recipes by name. They are files in the wheel, or in recipes/ of a checkout."""

import argparse
from pathlib import Path

from dfformer.utils.suggest import did_you_mean


def packaged_recipes() -> dict[str, Path]:
    """Every recipe of the package by name.

    Raises:
        FileNotFoundError: none is installed; the message names the folders.
    """
    package = Path(__file__).parents[1]
    places = (package / "recipes", package.parent / "recipes")
    for place in places:
        if found := sorted(place.glob("*.yaml")):
            return {path.stem: path for path in found}
    raise FileNotFoundError(f"the package's recipes are in none of {', '.join(map(str, places))}")


def find_recipe(name: str) -> Path:
    """A file, or the packaged recipe of that name: ``my/recipe.yaml``, ``digits``.

    Raises:
        ValueError: there is neither; suggests the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    recipes = packaged_recipes()
    if name in recipes:
        return recipes[name]
    raise ValueError(f"recipe: expected a file or a packaged recipe, got {name!r}{did_you_mean(path.stem, recipes)}")


def split_recipes(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The recipes' files in ``train``'s arguments, and all other arguments, which take precedence over recipes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", "--config", action="append", default=[])
    given, others = parser.parse_known_args(arguments)
    return [find_recipe(name) for name in given.recipe], others
