"""Recipes of tests, which name a key without its section."""

from typing import Any

from fastmoco.config.loading import MOVED, in_sections, validate
from fastmoco.config.recipe import Recipe


def recipe_from(values: dict[str, Any]) -> Recipe:
    return validate(in_sections(values), "test")


def overrides(**options: Any) -> list[str]:
    return [f"{MOVED.get(key, key)}={value}" for key, value in options.items()]
