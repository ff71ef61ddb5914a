"""Text stays as it is written, in YAML and on the command line; what needs quotes says which."""

import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlpost.config import Config, walk_fields
from rlpost.config.compose import PATH_KEYS, expand_paths, load_config, to_yaml
from rlpost.config.spelling import TEXT, read_override, read_yaml
from rlpost.errors import ConfigError

TEXT_KEYS = [key.name for key in walk_fields() if key.type in TEXT and key.name != "recipe"]
BASE = "recipe=math/arithmetic"
# Words that YAML 1.1, OmegaConf or Hydra read as something else.
SPELLINGS = [
    *(
        "2026_11_30",
        "4e12345",
        "1_000",
        "0x10",
        "0o17",
        "0b101",
        "010",
        "1.10",
        "1e5",
        "12e4567",
        "+5",
        "-0",
        ".5",
        "5.",
    ),
    *(
        "on",
        "off",
        "yes",
        "no",
        "y",
        "True",
        "true",
        "FALSE",
        "nan",
        ".nan",
        "inf",
        "-.inf",
        "None",
        "none",
        "nil",
        "NaN",
    ),
    *("2026-11-30", "2026-11-30T10:00:00Z", "12:30", "1:2:3", "<<", "=", "!x", "*x", "&x", "%x", "@x", "`x`", "???"),
]


def value(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def quote(spelling):
    """Where YAML needs it."""
    return f"'{spelling}'" if spelling[0] in "?=!*&%@`" else spelling


def set_value(cfg, key, new):
    section, _, name = key.rpartition(".")
    setattr(value(cfg, section) if section else cfg, name, new)


def fails(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def typed_in_a_shell(message):
    """The override that a message says to type, as a shell passes it on."""
    (word,) = [part for part in shlex.split(message.partition("type ")[2]) if "=" in part]
    return word


@pytest.fixture
def own(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"recipe={tmp_path / name}"

    return write


def test_the_text_keys_are_found():
    assert {"name", "model.path", "model.revision", "data.system_prompt", "data.template"} < set(TEXT_KEYS)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_on_the_command_line(spelling):
    for key in ("name", "model.revision", "data.system_prompt", "+logging.project"):
        assert read_override(f"{key}={spelling}").value == spelling
    tags = f"[{spelling}, b]" if spelling[0] in "!*&%@`" else f"['a, b', {spelling}]"  # signs of YAML's need quotes
    assert spelling in read_override(f"logging.tags={tags}").value
    assert read_override(f"logging.tags=[{spelling}]").value == [spelling]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_in_yaml(spelling):
    written = quote(spelling)
    read = read_yaml(f"name: {written}\nmodel:\n  revision: {written}\nlogging:\n  tags: [{written}, b]\n")
    assert read == {"name": spelling, "model": {"revision": spelling}, "logging": {"tags": [spelling, "b"]}}


def test_in_a_run(own):
    """All of them through the whole composition, and what a run writes is read back as it was."""
    spellings = [spelling for spelling in SPELLINGS if spelling != "???"]
    tags = ", ".join(map(quote, spellings))
    for index in range(0, len(spellings), 8):
        one = spellings[index]
        cfg = load_config([own(f"name: {quote(one)}\nlogging:\n  tags: [{tags}]\n"), f"model.revision={one}"])
        assert (cfg.name, cfg.model.revision, cfg.logging.tags) == (one, one, spellings)
        assert load_config([own(to_yaml(cfg), "again.yaml")]) == cfg


def test_every_key_typed_as_text(own):
    values = {key: f"1_{number}" for number, key in enumerate(TEXT_KEYS)}
    cfg = load_config([BASE, *(f"{key}={text}" for key, text in values.items())])
    assert {key: value(cfg, key) for key in values} == values
    nested = {}
    for key, text in values.items():
        *sections, last = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = text
    cfg = load_config([own(yaml.safe_dump(nested).replace("'", ""))])  # plain: a YAML reader would see numbers
    assert {key: value(cfg, key) for key in values} == values


def test_only_null_is_none(own):
    for word in ("null", "Null", "NULL"):
        assert load_config([BASE, f"data.system_prompt={word}"]).data.system_prompt is None
    for word in ("null", "~", ""):
        assert load_config([own(f"model:\n  revision: {word}\n")]).model.revision is None
    assert load_config([BASE, "data.system_prompt='null'"]).data.system_prompt == "null"
    assert load_config([own("model:\n  revision: 'null'\n")]).model.revision == "null"
    assert load_config([BASE, "data.system_prompt="]).data.system_prompt == ""
    assert "logging.project" in fails(BASE, "logging.project=null")  # has a default, may not be None


def test_a_value_that_must_be_given(own):
    """OmegaConf's sign for it would be left out in silence, so that the default stood."""
    recipe = own("model:\n  path: ???\n")
    assert fails(recipe) == (
        "model.path: got '???'; expected a value: ??? says that one must be given; set model.path=VALUE"
    )
    assert load_config([recipe, "model.path=m"]).model.path == "m"
    assert "data.system_prompt" in fails(BASE, "data.system_prompt=???") and "name" in fails(own("name: ???\n"))


def test_numbers_and_switches_are_still_read(own):
    cfg = load_config([BASE, "seed=1_000", "logging.tensorboard=on", "train.lr=1e-3", "user.a=1_000"])
    assert (cfg.seed, cfg.logging.tensorboard, cfg.train.lr, cfg.user) == (1000, True, 1e-3, {"a": 1000})
    cfg = load_config([own("seed: 1_000\nlogging:\n  tensorboard: yes\ntrain:\n  lr: 1e-3\nuser:\n  a: 0x10\n")])
    assert (cfg.seed, cfg.logging.tensorboard, cfg.train.lr, cfg.user) == (1000, True, 1e-3, {"a": 16})


def test_anchors_and_merges(own):
    cfg = load_config([own("seed: &n 1_000\nname: *n\nuser: &m {revision: 1e5}\nmodel:\n  <<: *m\n")])
    assert (cfg.seed, cfg.name, cfg.model.revision, cfg.user) == (1000, "1_000", "1e5", {"revision": 1e5})


def test_mappings_on_the_command_line():
    cfg = load_config([BASE, "model={revision: 1e5, path: 2026_11_30}", "data={train: {split: 0x10}, shuffle: off}"])
    assert (cfg.model.revision, cfg.model.path, cfg.data.train.split) == ("1e5", "2026_11_30", "0x10")
    assert cfg.data.shuffle is False


@pytest.mark.parametrize(
    "text",
    [
        *("Réponds, vite.", "a=b", "Answer (briefly) # now", "Think first, then answer.", "1,2", "choice(a,b)"),
        *(
            "{prompt}",
            "<q>{prompt}</q>",
            "{prompt} \\boxed{{}}",
            "\\(x\\)",
            "a\\,b",
            "[INST] {prompt} [/INST]",
            "~",
            "it's",
        ),
        *("日本語", "a\nb", "$x$", "x;y|z&w", "100 %", "{prompt}, please", "a: b", "-", "\\\\server", "tab\there"),
    ],
)
def test_text_needs_no_quotes_beyond_the_shells(text):
    assert read_override(f"data.system_prompt={text}").value == text


@pytest.mark.parametrize("text", ["[a, b]", "{a: 1}", "'a' or 'b'", '"quoted" at first', "'", "[1]"])
def test_where_text_needs_quotes_the_line_shows_them(text):
    with pytest.raises(ConfigError, match=r"^data\.system_prompt: got ") as caught:
        read_override(f"data.system_prompt={text}")
    assert read_override(typed_in_a_shell(str(caught.value))).value == text


def test_quoted_text_is_what_the_run_gets():
    message = fails(BASE, "data.system_prompt=[a, b]")
    assert load_config([BASE, typed_in_a_shell(message)]).data.system_prompt == "[a, b]"
    assert load_config([BASE, "data.system_prompt=$x$, (é) #"]).data.system_prompt == "$x$, (é) #"


@pytest.mark.parametrize("text", ["a, b", "f(x", "#1", "a=(b)", "{x", "it's"])
def test_free_form_values_show_their_quotes_too(text):
    with pytest.raises(ConfigError) as caught:
        read_override(f"reward.args.pattern={text}")
    assert read_override(typed_in_a_shell(str(caught.value))).value == text


def test_letters_and_tildes_in_values_that_may_be_anything():
    cfg = load_config([BASE, "user.note=Réponds: vite!", "reward.args.file=~/x"])
    assert (cfg.user["note"], cfg.reward.args["file"]) == ("Réponds: vite!", "~/x")
    assert "could not be converted to Integer" in fails(BASE, "steps=é")
    assert "one of" in fails(BASE, "model=é")


def test_letters_and_tildes_in_mappings():
    cfg = load_config([BASE, "data.train={path: ~/x, split: 1e5, unique: true}", "user={a: é, b: 1}"])
    assert cfg.data.train.path == str(Path.home() / "x") and cfg.data.train.split == "1e5" and cfg.data.train.unique
    assert cfg.user == {"a": "é", "b": 1}


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"steps={'9' * 5000}",
            f"user.a={'9' * 5000}",
            f"user.a={'[' * 3000}",
            f"logging.tags={'[' * 300}{']' * 300}",
        ),
        *(
            "data.system_prompt=${",
            "user.a=${x:}",
            "=3",
            "+=",
            "~",
            "+",
            "model={path: [1]}",
            "logging.tags={a: 1}",
            "algo=[x]",
        ),
    ],
)
def test_odd_overrides_are_one_line(override):
    fails(BASE, override)


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20))
@example('"\x1f')
@example("[a\nb, 'c")
@settings(max_examples=200, deadline=None)
def test_any_text_is_taken_or_named(text):
    """No traceback, and a value that is taken is the one that was typed."""
    try:
        read = read_override(f"data.system_prompt={text}").value
    except ConfigError as error:
        assert str(error).isprintable()
        if not text.strip(" \t").isprintable():
            assert "recipe file" in str(error)
            return
        read = read_override(typed_in_a_shell(str(error))).value
        assert read == text.strip(" \t")
        return
    stripped = text.strip(" \t")
    quoted = len(stripped) >= 2 and stripped[0] in "'\"" and stripped[-1] == stripped[0]
    assert read == (None if stripped.lower() == "null" else stripped) or quoted


@pytest.mark.parametrize("text", ["a: &a [*a]", "steps: " + "9" * 5000, "{a: b", "a: b: c", "\x00", "? [a]\n: b"])
def test_files_that_cannot_be_read_are_one_line(own, text):
    message = fails(own(text))
    assert "mine.yaml" in message


# -- recipe files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(
            "my_recipe (1).yaml",
            "récette.yaml",
            "a'b.yaml",
            'a"b.yaml',
            "my,recipe.yaml",
            "~x.yaml",
            "a=b.yaml",
            "日本.yml",
        ),
        *(
            "${x}.yaml",
            "#1.yaml",
            "[a].yaml",
            "{a}.yaml",
            "1e5.yaml",
            "null.yaml",
            "a.b.yaml",
            "recipe",
            "x.YAML",
            "@a.yaml",
        ),
    ],
)
def test_any_existing_recipe_file_loads(own, tmp_path, monkeypatch, name):
    own("steps: 3\ndescription: d${steps}\n", name)
    cfg = load_config([f"recipe={tmp_path / name}"])
    assert (cfg.steps, cfg.name, cfg.recipe, cfg.description) == (3, Path(name).stem, str(tmp_path / name), "d3")
    monkeypatch.chdir(tmp_path)
    assert load_config([f"recipe={name}"]).name == Path(name).stem
    assert load_config([f"recipe=./{name}"]).steps == 3


def test_two_files_of_one_name_are_two_recipes(own, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = own("steps: 3\n"), own("steps: 4\n", "other/mine.yaml")
    assert [load_config([recipe]).steps for recipe in (first, second, first)] == [3, 4, 3]


# -- home folders --------------------------------------------------------------------------------------------------


def test_every_key_that_names_a_file_or_folder_is_a_path():
    """By the words of its documentation, so that a new one is not forgotten."""
    words = ("older", "JSONL or", "Jinja file")
    named = [k.name for k in walk_fields() if k.type in TEXT and any(w in k.doc for w in words)]
    assert set(named) - {"name"} == set(PATH_KEYS)  # the run's name is no path


def test_home_is_expanded_on_the_command_line_and_in_recipes(own, monkeypatch):
    monkeypatch.setenv("HOME", "/home/some one")
    cfg = load_config([BASE, *(f"{key}=~/a b" for key in PATH_KEYS)])
    assert {value(cfg, key) for key in PATH_KEYS} == {"/home/some one/a b"}
    nested = Config()
    for key in PATH_KEYS:
        set_value(nested, key, "~/x")
    cfg = load_config([own(to_yaml(nested))])
    assert {value(cfg, key) for key in PATH_KEYS} == {"/home/some one/x"}


@pytest.mark.parametrize("key", PATH_KEYS)
def test_what_is_no_home(key, tmp_path, monkeypatch):
    cfg = Config()
    set_value(cfg, key, "a/~/b")
    expand_paths(cfg)
    assert value(cfg, key) == "a/~/b"  # at the beginning only
    set_value(cfg, key, "~nosuchuser/x")
    with pytest.raises(ConfigError) as caught:
        expand_paths(cfg)
    assert str(caught.value) == (
        f"{key}: got '~nosuchuser/x'; expected ~ or ~USER with a user of this machine; "
        "write ./~nosuchuser/x for a folder or file of that name"
    )
    (tmp_path / "~nosuchuser").mkdir()
    (tmp_path / "~nosuchuser" / "x").touch()
    monkeypatch.chdir(tmp_path)
    expand_paths(cfg)
    assert value(cfg, key) == "~nosuchuser/x"  # it is there under this very name


def test_a_template_in_a_key_is_no_path():
    cfg = Config()
    cfg.data.chat_template = "~{{ messages[0].content }}~"
    expand_paths(cfg)
    assert cfg.data.chat_template == "~{{ messages[0].content }}~"


def test_the_defaults_name_no_home():
    assert not any(str(value(Config(), key)).startswith("~") for key in PATH_KEYS)


def test_an_empty_file_is_an_empty_recipe():
    assert read_yaml("") == {} == read_yaml("# nothing\n")
