"""Recipes are strict, and say in words what does not fit."""

from pathlib import Path

import pytest

from fastmoco.config import load_recipe, recipe_names, to_yaml
from fastmoco.errors import UsageError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_opens_with_its_claim_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe


def test_the_recipes_of_the_issue_are_there():
    assert {"cifar10_r18", "demo", "moco_v1_imagenet_r50", "moco_v2_imagenet_r50"} <= set(
        recipe_names()
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("queu=1", "unknown key 'queu': did you mean 'queue'?"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr': did you mean 'lr'?"),
        ("monitor.labels=[a]", "monitor.labels: Input should be a valid string"),
        ("monitor.bankk=x", "unknown key 'monitor.bankk': did you mean 'bank'?"),
        ("views.0.jiter=1", "unknown key 'views.0.jiter': did you mean 'jitter'?"),
        ("schedule.epochs=many", "schedule.epochs: Input should be a valid integer"),
        ("batch=true", "batch must not be a boolean"),
        ("batch=500", "batch 500 is not a whole number of bn_group 64"),
        ("temperature=0", "temperature: Input should be greater than 0"),
        ("momentum=1.5", "momentum: Input should be less than or equal to 1"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number"),
        ("checkpoint_every=50", "name either checkpoint_every or checkpoint_minutes"),
        ("lr", "'lr' is not key=value"),
        ("name.deep=1", "name.deep does not name a key"),
        ("views=[{}]", "views: Tuple should have at least 2 items"),
        ("out=!!python/object/apply:os.system ['true']", "is not plain YAML"),
    ],
)
def test_a_fault_is_named_with_its_remedy(override, words):
    with pytest.raises(UsageError) as caught:
        load_recipe("cifar10_r18", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_reach_one_view_only_and_read_1e_4_as_a_number():
    recipe = load_recipe("cifar10_r18", ["views.0.blur=0.5", "optimizer.lr=1e-4"])
    assert [view.blur for view in recipe.views] == [0.5, 0.0]
    assert recipe.optimizer.lr == 1e-4


def test_an_unknown_recipe_suggests_the_near_one():
    with pytest.raises(UsageError, match="did you mean 'cifar10_r18'"):
        load_recipe("cifar_r18")
    with pytest.raises(UsageError, match="no recipe file"):
        load_recipe("nowhere.yaml")


def test_a_doubled_key_is_refused(tmp_path: Path):
    path = tmp_path / "twice.yaml"
    path.write_text("batch: 1\nname: x\nbatch: 2\n")
    with pytest.raises(UsageError, match=r"'batch' stands twice \(line 3\)"):
        load_recipe(str(path))


def test_the_cifar_recipe_is_the_published_run():
    recipe = load_recipe("cifar10_r18")
    assert (recipe.arch, recipe.stem, recipe.head, recipe.dim) == (
        "resnet18",
        "small",
        "linear",
        128,
    )
    assert (recipe.batch, recipe.bn_group, recipe.queue) == (512, 64, 4096)
    assert (recipe.momentum, recipe.temperature) == (0.99, 0.1)
    view = recipe.views[0]
    assert recipe.views[1] == view
    assert (view.scale, view.flip, view.jitter) == ((0.08, 1.0), 0.5, (0.4, 0.4, 0.4, 0.1))
    assert (view.jitter_p, view.grayscale, view.blur) == (0.8, 0.2, 0.0)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (0.06, 5e-4)
    assert (recipe.monitor.feature, recipe.monitor.k, recipe.monitor.t) == ("head", 200, 0.1)
