"""The shipped recipes, and how a recipe is read with its overrides."""

import copy
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastmoco.config.recipe import Recipe
from fastmoco.core.strict_yaml import near, parse_yaml, validate_as
from fastmoco.errors import UsageError

RECIPES = resources.files("fastmoco.config") / "recipes"

_SECTIONS = {
    "data": ("subset", "repeat", "window", "max_bad_images"),
    "encoder": ("arch", "stem", "head", "dim", "image_size", "mean", "std"),
    "objective": (
        *("queue", "momentum", "temperature", "symmetric"),
        *("bn", "bn_group", "shuffle", "exchange"),
    ),
    "optimizer": ("clip",),
    "runtime": (
        *("precision", "compile", "deterministic", "accumulate", "device", "executor"),
        *("threads", "prefetch", "decode", "hw_decoder_load"),
        *("log_every", "trackers", "stall_s", "max_skipped"),
    ),
}
MOVED = {key: f"{section}.{key}" for section, keys in _SECTIONS.items() for key in keys} | {
    "data": "data.sets",
    "checkpoint_every": "checkpoints.every",
    "checkpoint_minutes": "checkpoints.minutes",
    "keep": "checkpoints.keep",
}
"""Where the keys of a recipe without sections, as of before version 0.2, have gone."""


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in RECIPES.iterdir() if p.name[-5:] == ".yaml")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by its name or path, with `key=value` overrides (dots reach into it).

    Raises:
        UsageError: no such recipe, an unknown key, a value that does not fit.
    """
    values = parse_yaml(_recipe_text(name_or_path), name_or_path)
    if not isinstance(values, dict):
        raise UsageError(f"{name_or_path} holds no `key: value` lines.")
    _refuse_moved(values, name_or_path)
    for override in overrides:
        _apply(values, override)
    return validate(values, name_or_path)


def in_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of an older run in the sections and words of today."""
    recipe = _sorted_in(values) if _moved(values) else dict(values)
    if recipe.get("runtime", {}).get("executor") == "torchvision":
        # It drew the same views, rounded after each operator.
        recipe["runtime"] = recipe["runtime"] | {"executor": "fused"}
    return recipe


def _sorted_in(values: Mapping[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = MOVED.get(key, key).partition(".")
        if name:
            recipe[section] = recipe.get(section, {}) | {name: value}
        elif isinstance(value, Mapping):  # the optimizer, which has gained a key
            recipe[section] = {**value, **recipe.get(section, {})}
        else:
            recipe[section] = value
    return recipe


def _moved(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that have gone into a section."""
    flat_data = "data" in values and not isinstance(values["data"], Mapping)
    return [key for key in values if key in MOVED and (key != "data" or flat_data)]


def _refuse_moved(values: Mapping[str, Any], origin: str) -> None:
    if moved := _moved(values):
        places = ", ".join(f"{key} is {MOVED[key]}" for key in moved)
        raise UsageError(f"{origin}: recipes have sections now: {places}.")


def _recipe_text(name_or_path: str) -> bytes:
    shipped, path = RECIPES / f"{name_or_path}.yaml", Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UsageError(f"There is no recipe file {path}.")
        return path.read_bytes()
    if not shipped.is_file():
        hint = near(name_or_path, recipe_names())
        raise UsageError(
            f"There is no recipe {name_or_path!r}{hint} Shipped: {', '.join(recipe_names())}; "
            "your own needs a path that ends in .yaml."
        )
    return shipped.read_bytes()


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r} is not key=value, such as optimizer.lr=0.03.")
    value = parse_yaml(text, dotted)
    _refuse_moved({dotted: value}, override)
    *parents, last = dotted.split(".")
    holder: Any = values
    for parent in parents:
        holder = _child(holder, parent, dotted)
    if isinstance(holder, list):
        holder[_place(holder, last, dotted)] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise _no_key(dotted)


def _child(holder: Any, key: str, dotted: str) -> Any:
    if isinstance(holder, list):
        place = _place(holder, key, dotted)
        # YAML anchors share one mapping between views: an override must change one of them only.
        holder[place] = copy.copy(holder[place])
        return holder[place]
    if isinstance(holder, dict):
        holder[key] = {} if holder.get(key) is None else copy.copy(holder[key])
        return holder[key]
    raise _no_key(dotted)


def _place(holder: list[Any], key: str, dotted: str) -> int:
    """Return the place in a list that a part of a key names."""
    if key not in map(str, range(len(holder))):
        raise _no_key(dotted)
    return int(key)


def _no_key(dotted: str) -> UsageError:
    return UsageError(f"{dotted} does not name a key of the recipe.")


def validate(values: Any, origin: str) -> Recipe:
    """Build a recipe from parsed YAML; see `strict_yaml.validate_as`."""
    return validate_as(Recipe, values, origin)


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return the dotted keys in which two nested values differ, with both values."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        return [
            found
            for key in keys
            for found in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{where}: {shorten_value(old)} -> {shorten_value(new)}"]


def shorten_value(value: Any) -> str:
    """Return a value as text of at most 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
