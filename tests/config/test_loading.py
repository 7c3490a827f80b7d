"""Recipes from before sections: what is read, and what is refused with the new place of a key."""

import pytest
import yaml

from fastmoco.config.loading import MOVED, in_sections, load_recipe, recipe_names, to_yaml, validate
from fastmoco.config.recipe import Recipe
from fastmoco.core.strict_yaml import models_in
from fastmoco.errors import UsageError

FLAT = {
    "name": "old",
    "data": ["set"],
    "out": "run",
    "arch": "resnet18",
    "stem": "small",
    "mean": None,
    "views": [{}, {"blur": 0.5}],
    "bn_group": 16,
    "queue": 512,
    "optimizer": {"lr": 0.1},
    "clip": 2.0,
    "schedule": {"epochs": 3},
    "monitor": {"bank": "a", "queries": "b"},
    "precision": "fp32",
    "checkpoint_every": 7,
    "keep": 3,
}


def test_an_older_recipe_is_sorted_into_sections() -> None:
    recipe = validate(in_sections(FLAT), "old")
    assert [str(path) for path in recipe.data.sets] == ["set"]
    assert (recipe.encoder.arch, recipe.encoder.stem, recipe.encoder.mean) == (
        "resnet18",
        "small",
        None,
    )
    assert (recipe.objective.queue, recipe.objective.bn_group) == (512, 16)
    assert (recipe.optimizer.lr, recipe.optimizer.clip) == (0.1, 2.0)
    assert (recipe.runtime.precision, recipe.views[1].blur) == ("fp32", 0.5)
    assert (recipe.checkpoints.every, recipe.checkpoints.keep) == (7, 3)


@pytest.mark.parametrize("name", recipe_names())
def test_sections_are_left_alone_and_survive_a_file(name: str) -> None:
    recipe = load_recipe(name)
    values = yaml.safe_load(to_yaml(recipe))
    assert in_sections(values) == values and validate(values, name) == recipe


@pytest.mark.parametrize("key", sorted(MOVED))
def test_an_old_key_is_refused_by_its_new_place(key: str) -> None:
    with pytest.raises(UsageError, match=rf"\b{key} is {MOVED[key]}\."):
        load_recipe("demo", [f"{key}=1"])
    section, _, name = MOVED[key].partition(".")
    kinds = models_in(Recipe.model_fields[section].annotation)
    assert any(name in kind.model_fields for kind in kinds)


def test_an_old_file_is_refused_with_all_its_keys(tmp_path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(FLAT))
    with pytest.raises(UsageError, match=r"keep is checkpoints\.keep.*queue is objective\.queue"):
        load_recipe(str(path))
