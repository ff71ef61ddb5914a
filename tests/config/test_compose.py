"""Groups, recipes and overrides put together: the order of strength, and everything that must fail."""

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from rlpost.config import Config, compose, locations
from rlpost.config.compose import GROUPS, list_recipes, load_config, to_yaml
from rlpost.errors import ConfigError

RECIPES = sorted(list_recipes())
OPTIONS = [(group, option) for group in GROUPS for option in compose._options(group)]


def fails(*overrides):
    """The one line that these overrides fail with."""
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def own(tmp_path):
    """Writes a user's own recipe file and returns its override."""

    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text)
        return f"recipe={tmp_path / name}"

    return write


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_composes_and_describes_itself(recipe):
    cfg = load_config([f"recipe={recipe}"])
    assert isinstance(cfg, Config)
    assert cfg.name == recipe.rpartition("/")[2]
    assert cfg.description and "\n" not in cfg.description
    assert cfg.model.path and cfg.reward.function and cfg.data.train != cfg.data.eval


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_line_of_a_recipe_is_explained(recipe):
    """A line that sets a value carries a comment, or its block begins with one."""
    lines = (locations.find_recipes() / f"{recipe}.yaml").read_text().splitlines()
    assert lines[0].startswith("#")
    commented = sum("#" in line for line in lines)
    values = sum(": " in line and not line.startswith(("#", "description")) for line in lines)
    assert commented >= 0.75 * values


def test_the_recipes_asked_for_are_there():
    assert {"math/arithmetic", "math/gsm8k", "math/dapo_17k_qwen3_4b"} <= set(RECIPES)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_group_option_has_known_keys_and_types(group, option):
    file = compose._read(locations.find_conf() / group / f"{option}.yaml")
    assert list(compose._unknown_keys({group: file})) == []
    OmegaConf.merge(OmegaConf.structured(Config), {group: file})


def test_the_papers_settings():
    cfg = load_config(["recipe=math/dapo_17k_qwen3_4b"])
    rollout, train, algo = cfg.rollout, cfg.train, cfg.algo
    assert (rollout.groups_per_step, rollout.samples_per_group, rollout.oversample) == (32, 8, 2.0)
    assert (rollout.max_response_tokens, rollout.temperature, train.optimizer_steps_per_rollout) == (16384, 0.8, 1)
    assert (train.lr, train.betas, train.weight_decay) == (1e-6, [0.9, 0.98], 0.1)
    assert (algo.clip_low, algo.clip_high, algo.kl_coef, algo.entropy_coef) == (0.2, 0.28, 0.0, 0.0)
    assert (cfg.eval.every, cfg.eval.samples_per_prompt, cfg.eval.top_p) == (10, 16, 0.7)


# -- strength ------------------------------------------------------------------------------------------------------


def test_recipe_beats_group_and_command_line_beats_recipe(own):
    recipe = own("defaults:\n  - override /rollout: sync\nrollout:\n  max_staleness: 3\nsteps: 7\n")
    assert load_config([recipe]).rollout.max_staleness == 3  # sync.yaml says 0
    cfg = load_config([recipe, "steps=9", "rollout.max_staleness=5"])
    assert (cfg.steps, cfg.rollout.max_staleness, cfg.rollout.oversample) == (9, 5, 1.0)


def test_a_group_on_the_command_line_beats_the_recipe(own):
    recipe = own("defaults:\n  - override /algo: dapo\nalgo:\n  clip_high: 0.9\n  kl_coef: 0.5\ntrain:\n  lr: 0.5\n")
    assert load_config([recipe]).algo.clip_high == 0.9
    cfg = load_config([recipe, "algo=gspo", "train=zero3"])
    assert (cfg.algo.name, cfg.algo.loss, cfg.algo.clip_low, cfg.algo.clip_high) == ("gspo", "gspo", 3e-4, 4e-4)
    assert cfg.algo.filter == "none"  # dapo's dynamic sampling is gone with it
    assert cfg.algo.kl_coef == 0.5  # no option of the group sets it: it stays the recipe's
    assert (cfg.train.zero_stage, cfg.train.lr) == (3, 0.5)
    assert load_config([recipe, "algo=grpo"]).algo.clip_high == 0.2  # the schema's, not the recipe's 0.9
    assert load_config([recipe, "algo.clip_high=0.3", "algo=gspo"]).algo.clip_high == 0.3  # single keys are strongest


def test_other_data_leaves_nothing_of_the_first_behind():
    cfg = load_config(["recipe=math/arithmetic", "data=gsm8k", "model=qwen3_4b"])
    assert cfg.data.train.generator is None and cfg.data.train.hub == "openai/gsm8k"
    assert cfg.model.shape["hidden_size"] == 2560 and cfg.model.dtype == "auto"


def test_another_function_does_not_inherit_arguments():
    cfg = load_config(["recipe=math/arithmetic", "data.train.generator={_target_: mine.rows, size: 3}"])
    assert cfg.data.train.generator == {"_target_": "mine.rows", "size": 3}
    kept = load_config(["recipe=math/arithmetic", "data.train.generator.count=5"]).data.train.generator
    assert kept["count"] == 5 and kept["split"] == "train"


def test_free_form_keys_interpolation_and_units(own):
    recipe = own("user:\n  peak: 1e-4\ntrain:\n  lr: ${user.peak}\nreward:\n  args:\n    tolerance: 0.1\n")
    cfg = load_config([recipe, "user.note=hello", "+reward.args.strict=true", "model.path=/a b/c"])
    assert cfg.train.lr == 1e-4 and cfg.user == {"peak": 1e-4, "note": "hello"}
    assert cfg.reward.args == {"tolerance": 0.1, "strict": True} and cfg.model.path == "/a b/c"


def test_a_users_recipe_by_path_may_build_on_a_shipped_one(own):
    recipe = own("defaults:\n  - /recipe/math/arithmetic\n  - _self_\nsteps: 3\n", "short.yaml")
    cfg = load_config([recipe])
    assert (cfg.name, cfg.steps, cfg.rollout.max_response_tokens) == ("short", 3, 192)
    assert cfg.model.path == "rlpost://arithmetic"


def test_the_resolved_configuration_is_a_recipe(own):
    cfg = load_config(["recipe=math/dapo_17k_qwen3_4b", "algo=gspo", "name=mine", "user.a=1"])
    assert load_config([own(to_yaml(cfg))]) == cfg


# -- what must fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["+", "++", "~"])
def test_a_recipe_is_never_silently_ignored(sign):
    assert "recipe=GROUP/NAME" in fails(f"{sign}recipe=math/arithmetic")
    assert "recipe=GROUP/NAME" in fails("recipe=math/gsm8k", f"{sign}recipe=math/arithmetic")


def test_no_recipe_two_recipes_and_unknown_recipes():
    assert all(name in fails("steps=3") for name in RECIPES)
    assert "one recipe" in fails("recipe=math/gsm8k", "recipe=math/arithmetic")
    assert "did you mean math/arithmetic?" in fails("recipe=math/arithmetik")
    assert "expected a file that is there" in fails("recipe=nowhere/mine.yaml")
    assert "recipe=GROUP/NAME" in fails("recipe=")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rollout.oversampel=2", "rollout.oversample"),
        ("stepz=3", "steps"),
        ("lr=1e-3", "train.lr"),
        ("train.learning_rate=1", "train."),
        ("rollout.oversample.x=1", "rollout.oversample"),
        ("data.train.pth=x", "data.train.path"),
        ("+rollout.oversampel=2", "rollout.oversample"),
        ("algo={clip_hih: 3}", "algo.clip_high"),
    ],
)
def test_misspelt_keys_on_the_command_line(override, nearest):
    message = fails("recipe=math/arithmetic", override)
    assert nearest in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rollout:\n  oversampel: 2\n", "did you mean rollout.oversample?"),
        ("stepz: 2\n", "did you mean steps?"),
        ("data:\n  train:\n    pth: x\n", "did you mean data.train.path?"),
        ("steps: abc\n", "could not be converted to Integer"),
        ("train:\n  betas: [0.9, x]\n", "could not be converted to Float"),
        ("rollout: 3\n", "RolloutConfig"),
        ("- a\n- b\n", "expected a mapping"),
        ("steps: [1\n", "cannot be read as YAML"),
    ],
)
def test_mistakes_inside_a_recipe_file_name_the_file(own, text, expected):
    message = fails(own(text))
    assert "mine.yaml" in message and expected in message


def test_mistakes_in_a_recipes_defaults_name_the_file(own):
    message = fails(own("defaults:\n  - override /algo: nosuch\n"))
    assert "mine.yaml" in message and "nosuch" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=abc", "steps: Value 'abc'"),
        ("steps=1.5", "steps: Value '1.5'"),
        ("seed=null", "seed"),
        ("train.betas=0.9", "train.betas"),
        ("model.path={a: 1}", "model.path"),
        ("algo=gspoo", "did you mean gspo?"),
        ("+algo=gspo", "without a sign"),
        ("rollout=3", "one of april, sync"),
        ("steps", "key=value"),
        ("steps=1,2", "one value"),
        ("~steps", "key=value"),
        ("user.a=${nosuch}", "nosuch"),
        ("steps=[1", "key=value"),
    ],
)
def test_wrong_values_on_the_command_line(override, expected):
    assert expected in fails("recipe=math/arithmetic", override)


def test_composition_leaves_no_state_behind():
    first = load_config(["recipe=math/arithmetic", "algo=dapo"])
    load_config(["recipe=math/gsm8k"])
    assert load_config(["recipe=math/arithmetic", "algo=dapo"]) == first
    from hydra.core.global_hydra import GlobalHydra

    assert not GlobalHydra.instance().is_initialized()


def test_locations(tmp_path):
    assert (locations.find_conf() / "config.yaml").is_file()
    assert locations.resolve_path("rlpost://arithmetic") == str(locations.find_data() / "arithmetic")
    assert locations.resolve_path("org/model") == "org/model"
    assert locations.resolve_path("~/x") == str(Path.home() / "x")


def test_an_installed_package_finds_its_own_folders(tmp_path, monkeypatch):
    (tmp_path / "rlpost" / "conf").mkdir(parents=True)
    monkeypatch.setattr(locations, "PACKAGE", tmp_path / "rlpost")
    assert locations.find_conf() == tmp_path / "rlpost" / "conf"  # inside the package, as in a wheel
    assert locations.find_recipes() == tmp_path / "recipes"  # beside it, as in a checkout


def test_recipes_are_plain_yaml_as_well():
    for path in locations.find_recipes().rglob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
