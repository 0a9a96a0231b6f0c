"""The help: every option under a title, a method's own settings under those of train."""

from __future__ import annotations

from dataclasses import fields

import pytest
import typer
from cli_helpers import ok

from align_cli import registry
from align_cli.cli.help import ELSEWHERE, SECTIONS, section_of, settings_of
from align_cli.cli.main import app

COMMANDS = ("train", "sample", "edit", "encode", "eval")


def options_of(command: str) -> dict[str, str]:
    """Option -> its section."""
    params = typer.main.get_command(app).commands[command].params
    found = [param.opts for param in params if param.param_type_name == "option"]
    return {names[0]: section_of(command, names) for names in found}


def test_every_option_has_one_section_and_every_name_there_is_an_option():
    every = {name for command in COMMANDS for name in options_of(command)} | {"--help"}
    listed = [name for text in SECTIONS.values() for name in text.split()]
    assert sorted(listed) == sorted(every)
    for command, moved in ELSEWHERE.items():
        assert moved.keys() <= options_of(command).keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_each_option_once_under_its_title(command):
    _, before, said = ok(command, "--help").stdout.partition("\n\nInput:")
    said, titles = before + said, SECTIONS
    places = {title: said.find(f"\n\n{title}:\n") for title in titles if f"\n\n{title}:\n" in said}
    assert list(places.values()) == sorted(places.values())
    for name, title in options_of(command).items():
        assert said.count(f"\n  {name} ") == 1
        assert max((at, t) for t, at in places.items() if at < said.find(f"\n  {name} "))[1] == title
    assert set(options_of(command).values()) | {"Other"} == places.keys()


@pytest.mark.parametrize("method", registry.METHODS)
def test_the_help_of_a_method_shows_its_presets_and_settings(method):
    said = ok("train", "--steps", 3, method, "--help").stdout
    assert f"\nPresets of {method}:\n  " in said and "tiny-sd15" in said.partition("Presets of")[2]
    config = registry.load(registry.METHOD_CONFIGS, method)
    rows = settings_of(method)
    assert [key for key, _, _ in rows] == [field.name for field in fields(config)]
    for key, value, text in rows:
        assert f"\n  {key} = {value}" in said.partition("\nSettings of")[2]
        assert text and "Source:" not in text


def test_numbers_and_texts_as_in_a_preset():
    rows = {key: (value, text) for key, value, text in settings_of("softrepa")}
    assert rows["num_tokens"][0] == "4" and rows["stages"][0] == '"TFF"' and rows["use_t_table"][0] == "false"
    assert rows["logit_scale"] == ("4.0", "Similarity at zero error.")
    assert {key: value for key, value, _ in settings_of("comat")}["rewards"] == '{ "blip-caption" = 1.0 }'


@pytest.mark.parametrize("words", [[], ["trian"]])
def test_without_a_method_the_help_says_where_its_settings_are(words):
    said = ok("train", *words, "--help").stdout
    assert "'t2ialign train METHOD --help' shows a method's own settings, too." in said
    assert "Settings of" not in said
