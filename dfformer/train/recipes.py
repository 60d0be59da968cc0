"""The recipes that come with the package, by name: they are files of the wheel, and of recipes/ in a checkout."""

from pathlib import Path

import dfformer
from dfformer.utils.suggest import did_you_mean

_FLAGS = ("--recipe", "--config")


def packaged_recipes() -> dict[str, Path]:
    """Every recipe of the package by name.

    Raises:
        FileNotFoundError: none is installed; names the places.
    """
    package = Path(dfformer.__file__).parent
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
    if path.exists():
        if not path.is_file():
            raise ValueError(f"recipe: got {name}, which is a folder, accepted are a file and a packaged recipe's name")
        return path
    recipes = packaged_recipes()
    if name in recipes:
        return recipes[name]
    raise ValueError(
        f"recipe: got {name!r}, which is neither a file nor a packaged recipe{did_you_mean(path.stem, recipes)}"
    )


def with_recipe_files(arguments: list[str]) -> list[str]:
    """``train``'s arguments with the file of each recipe in place of its name."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        flag, assigned, value = argument.partition("=")
        if flag not in _FLAGS:
            continue
        if assigned:
            found[i] = f"{flag}={find_recipe(value)}"
        elif i + 1 < len(arguments):
            found[i + 1] = str(find_recipe(arguments[i + 1]))
    return found
