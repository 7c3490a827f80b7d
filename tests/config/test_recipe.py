"""Recipes are strict, and say in words what does not fit."""

from importlib import resources
from operator import attrgetter
from pathlib import Path

import pytest

from fastmoco.config.loading import load_recipe, recipe_names, to_yaml
from fastmoco.errors import UsageError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_opens_with_its_claim_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    path = tmp_path / "copy.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(str(path)) == recipe


def test_the_recipes_of_the_issue_are_there():
    assert recipe_names() == [
        *("cifar10_r18", "cifar10_r18_fast", "demo", "moco_v1_imagenet_r50"),
        *("moco_v2_imagenet_r50", "moco_v2_r18_small"),
        *("simclr_cifar10_r18", "ssl96_r50", "ssl96_r50_k2048", "stl10_r18"),
    ]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("queu=1", "unknown key 'queu': did you mean 'objective.queue'?"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr': did you mean 'lr'?"),
        ("monitor.labels=[a]", "monitor.labels: Input should be a valid string"),
        ("monitor.bankk=x", "unknown key 'monitor.bankk': did you mean 'bank'?"),
        ("views.0.jiter=1", "unknown key 'views.0.jiter': did you mean 'jitter'?"),
        ("schedule.epochs=many", "schedule.epochs: Input should be a valid integer"),
        ("batch=true", "batch: Input should be a valid integer"),
        ("batch=500", "batch 500 is not a whole number of objective.bn_group 64"),
        ("objective.temperature=0", "temperature: Input should be greater than 0"),
        ("objective.momentum=1.5", "momentum: Input should be less than or equal to 1"),
        ("optimizer.lr=nan", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a valid number"),
        ("checkpoints.every=50", "checkpoints: name either every or minutes"),
        ("lr", "'lr' is not key=value"),
        ("name.deep=1", "name.deep does not name a key"),
        ("views=[{}]", "views: moco draws 2 of each image, not 1: add one"),
        ("out=!!python/object/apply:os.system ['true']", "is not plain YAML"),
        ("seed=!!int x", "is not plain YAML"),
        ("out=!!timestamp x", "is not plain YAML"),
        ("data.sets=" + "[" * 2000, "is not plain YAML: it is nested too deeply"),
        ("seed=" + "9" * 5000, "seed: Unable to parse input string as an integer"),
        ("seed=1:30", "seed: Input should be a valid integer"),
        ("monitor={[a]: b}", "is not plain YAML"),
        ("monitor={{a: 1}: b}", "is not plain YAML"),
        ("views.0.flip.x=1", "views.0.flip.x does not name a key"),
        ("views.².blur=0.5", "views.².blur does not name a key"),
        ("views.9.blur=0.5", "views.9.blur does not name a key"),
        ("views.0.scale.0.a=1", "views.0.scale.0.a does not name a key"),
        ("views.0.blur_sigma=[0.1,-1]", "views.0: blur_sigma [0.1, -1] needs 0 < low <= high"),
        ("views.0.ratio=[0,1]", "views.0.ratio.0: Input should be greater than or equal to 0.01"),
        ("views.0.ratio=[4,3]", "views.0: ratio [4, 3] needs 0 < low <= high"),
        ("views.0.blur_sigma=[1,1e9]", "views.0.blur_sigma.1: Input should be less than or equal"),
        ("views.1.scale=[0,0]", "views.1: scale [0, 0] needs 0 < low"),
        ("views.1.scale=[1,0.2]", "views.1: scale [1, 0.2] needs 0 < low <= high"),
        ("encoder.std=[-1,1,1]", "std.0: Input should be greater than 0"),
        ("schedule={name: step, epochs: 9, milestones: [6, 3]}", "the milestones must ascend"),
    ],
)
def test_a_fault_is_named_with_its_remedy(override, words):
    with pytest.raises(UsageError) as caught:
        load_recipe("cifar10_r18", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("{name: simclr, queue: 64}", "objective.queue: simclr has no queue, leave it out"),
        ("{name: simclr, symmetric: true}", "objective.symmetric: simclr has no symmetric, leave"),
        ("{name: end_to_end, momentum: 0.9}", "objective.momentum: end_to_end has no momentum"),
        ("{name: simclr, temperatur: 1}", "'objective.temperatur': did you mean 'temperature'"),
        ("{name: simclr, temperature: 0}", "objective.temperature: Input should be greater than 0"),
        ("{name: memory_bank, symmetric: true}", "memory_bank has no symmetric, leave it out"),
        ("{name: memory_bank}", "views: memory_bank draws 1 of each image, not 2: leave one out"),
        ("{name: sinclr}", "'sinclr' is none of moco, end_to_end, simclr, memory_bank"),
        ("{name: sinclr}", "did you mean 'simclr'?"),
    ],
)
def test_a_key_of_another_objective_is_refused(section, words):
    with pytest.raises(UsageError) as caught:
        load_recipe("cifar10_r18", [f"objective={section}"])
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["end_to_end", "simclr"])
def test_what_compares_the_batch_goes_in_one_part(name):
    with pytest.raises(UsageError, match=r"cannot go in parts: set runtime\.accumulate=1"):
        load_recipe("cifar10_r18", [f"objective={{name: {name}}}", "runtime.accumulate=2"])


@pytest.mark.parametrize(
    ("section", "candidates"),
    [
        ("{name: moco, queue: 40}", 41),
        ("{name: end_to_end}", 512),
        ("{name: simclr}", 1023),
        ("{name: memory_bank, queue: 64}", 65),
    ],
)
def test_among_how_many_a_query_finds_its_key(section, candidates):
    views = "[{}]" if "bank" in section else "[{}, {}]"
    recipe = load_recipe("cifar10_r18", [f"objective={section}", f"views={views}"])
    assert recipe.candidates == candidates


def test_the_simclr_recipe_is_the_published_run():
    recipe, moco = load_recipe("simclr_cifar10_r18"), load_recipe("cifar10_r18")
    assert recipe.views == moco.views and recipe.encoder.stem == "small"
    assert recipe.objective.model_dump(include={"name", "temperature", "bn"}) == {
        "name": "simclr",
        "temperature": 0.5,
        "bn": "whole",
    }
    assert (recipe.batch, recipe.lr, recipe.optimizer.name) == (512, 2.0, "lars")
    assert (recipe.optimizer.weight_decay, recipe.schedule.epochs) == (1e-6, 1000)


def test_overrides_reach_one_view_only_and_read_1e_4_as_a_number():
    recipe = load_recipe("cifar10_r18", ["views.0.blur=0.5", "optimizer.lr=1e-4"])
    assert [view.blur for view in recipe.views] == [0.5, 0.0]
    assert recipe.optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=010", "seed", 10),  # not 8
        ("seed=1_000", "seed", 1000),
        ("objective.queue=1e4", "objective.queue", 10_000),
        ("out=2026-11-22", "out", Path("2026-11-22")),  # no date
        ("out=001", "out", Path("001")),
        ("name=1e3", "name", "1e3"),
        ("name=off", "name", "off"),
        ("data.sets=[2024, 1.50]", "data.sets", (Path("2024"), Path("1.50"))),
        ("data.sets='my set, v2'", "data.sets", (Path("my set, v2"),)),
        ("objective.symmetric=True", "objective.symmetric", True),
        ("optimizer.clip=~", "optimizer.clip", None),
    ],
)
def test_a_text_is_what_its_key_asks_for(override, key, value):
    assert attrgetter(key)(load_recipe("demo", [override])) == value


def test_a_view_may_be_another_one_with_one_key_changed(tmp_path):
    text = (resources.files("fastmoco") / "config/recipes/cifar10_r18.yaml").read_text()
    path = tmp_path / "merged.yaml"
    assert text.count("- *view") == 1
    path.write_text(text.replace("- *view", "- {<<: *view, blur: 0.5}"))
    one, two = load_recipe(str(path)).views
    assert (one.blur, two.blur) == (0, 0.5) and two.model_copy(update={"blur": 0.0}) == one


@pytest.mark.parametrize(
    ("encoding", "sound"), [("utf-8-sig", True), ("utf-16", True), ("latin-1", False)]
)
def test_recipes_as_other_systems_save_them(tmp_path, encoding, sound):
    text = (resources.files("fastmoco") / "config/recipes/demo.yaml").read_text()
    path = tmp_path / "other.yaml"
    path.write_bytes(f"# é\n{text}".replace("\n", "\r\n").encode(encoding))
    if encoding != "latin-1":
        assert load_recipe(str(path)) == load_recipe("demo")
        return
    with pytest.raises(UsageError, match="is not plain YAML"):
        load_recipe(str(path))


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
    assert (recipe.encoder.arch, recipe.encoder.stem, recipe.encoder.head, recipe.encoder.dim) == (
        "resnet18",
        "small",
        "linear",
        128,
    )
    assert (recipe.batch, recipe.objective.bn_group, recipe.objective.queue) == (512, 64, 4096)
    assert (recipe.objective.momentum, recipe.objective.temperature) == (0.99, 0.1)
    view = recipe.views[0]
    assert recipe.views[1] == view
    assert (view.scale, view.flip, view.jitter) == ((0.08, 1.0), 0.5, (0.4, 0.4, 0.4, 0.1))
    assert (view.jitter_p, view.grayscale, view.blur) == (0.8, 0.2, 0.0)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (0.06, 5e-4)
    assert (recipe.monitor.feature, recipe.monitor.k, recipe.monitor.t) == ("head", 200, 0.1)
