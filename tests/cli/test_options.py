"""The options of all commands: one name has one type, default and meaning; help is readable and needs nothing heavy."""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import tyro

from reverie_jax import cli
from reverie_jax.train.recipe import Recipe

HEAVY = (
    *("jax", "flax", "torch", "transformers", "tensorflow_datasets", "matplotlib", "pandas", "pydantic", "rich"),
    *("starlette", "uvicorn", "prometheus_client", "gradio", "fastapi", "huggingface_hub", "pyarrow"),
    *("wandb", "mlflow", "trackio", "apache_beam"),
)
# Options that differ between commands in type, default or first sentence, and why.
DIFFERENT = {
    "out": "an output folder, or one file; `demo` has a default, `score` writes none by default",
    "data": "records, or a benchmark's files; `report` does without them",
    "model": "`demo` has a default, `data check` does without one",
    "benchmark": "`eval` takes several",
    "recipe": "`data check` does without one",
    "judge": "`annotate` has the writer for a judge by default",
    "count": "of what the command shows or draws",
    "confusing": "people's questions come with more wrong options than a model is asked for",
    "mesh": "`plan` uses all chips by default",
    "seeds": "`demo` draws data by seed too, and once by default",
    "topology": "`compare` plans for the devices that are here by default",
    "dtype": "`convert` keeps what is stored by default",
    "eval_images": "`data contamination` reads those of several benchmarks",
    "image": "`ask` does not do without one",
    "port": "`chat`, `data review` and `serve` may run at the same time",
    "export": "`score` writes the file of a benchmark's server, `data review` a page",
}
# --no-repeat-ngram negates nothing.
OPTION = r"^\W+--(?:no-(?!repeat))?([a-z][a-z-]+)(?: (\S.*?))?(?:  +|\W*\n\W+)(\S.*?)\W*$"
SCRIPT = """
import contextlib, io, json, sys
from reverie_jax import cli
texts, heavy = {}, json.loads(sys.argv[1])
for command in json.loads(sys.argv[2]):
    sys.argv = ["reverie", *command.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        cli.main()
    texts[command] = [out.getvalue(), sorted(set(heavy) & sys.modules.keys())]
print(json.dumps(texts))
"""


# They need recipes, but no JAX. They come last, as what they import stays.
OF_RECIPES = (
    "recipes",
    "recipes scenes-responses",
    "recipes no-such-recipe",
    "train no-such-recipe --model x --data . --out x",
)


class Option(NamedTuple):
    """An option of a command; all but the command is compared. Positional ones have no metavar and sentence here."""

    command: str
    name: str
    kind: Any
    default: Any
    metavar: str
    sentence: str


def commands(union: Any = cli.Command, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield every command that runs something, with its class."""
    for member in get_args(union):
        cls, subcommand = get_args(member)
        hints = get_type_hints(cls, include_extras=True)
        if "action" in hints:
            yield from commands(get_args(hints["action"])[0], f"{prefix}{subcommand.name} ")
        else:
            yield f"{prefix}{subcommand.name}", cls


def fields(cls: type) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, type and default of every option of a command, nested ones too."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields(hints[field.name])
        else:
            yield field.name, hints[field.name], field.default


def arguments(cls: type) -> list[Any]:
    """Return the arguments of a command's parser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return tyro.extras.get_parser(cls)._actions


COMMANDS = dict(commands())


@pytest.fixture(scope="module")
def outputs() -> dict[str, tuple[str, list[str]]]:
    """What commands print on a wide terminal, and the heavy modules that are imported by then."""
    names = ["", "data", "scenes", *sorted(COMMANDS, key=lambda name: name == "train")]
    commands = [*(f"{name} --help".strip() for name in names), *OF_RECIPES]
    words = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY), json.dumps(commands)]
    result = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "1000"})
    assert result.returncode == 0
    assert [("no-such-recipe" in line, "error" in line) for line in result.stderr.splitlines()] == [(True, True)] * 2
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def help_texts(outputs) -> dict[str, str]:
    """`--help` of every command."""
    return {name.removesuffix("--help").strip(): text for name, (text, _) in outputs.items() if name.endswith("--help")}


@pytest.fixture(scope="module")
def options(help_texts) -> list[Option]:
    options = []
    for command, cls in COMMANDS.items():
        rows = {name: rest for name, *rest in re.findall(OPTION, help_texts[command], re.MULTILINE)}
        for name, kind, default in fields(cls):
            metavar, text = rows.pop(name.replace("_", "-"), ("", ""))
            options.append(Option(command, name, kind, default, metavar, re.split(r"[.:;](?: |$)", text)[0]))
        assert not rows, command
    return options


def test_help_is_readable(help_texts, options):
    for command, text in help_texts.items():
        assert text.startswith(f"usage: reverie {command}".rstrip()), command
        assert not re.search(r"\b(None|STR|INT|FLOAT)\b", text.partition("recipe fields")[0]), command
    assert all(name.split()[0] in help_texts[""] for name in COMMANDS)
    assert all(option.sentence[:1].isupper() for option in options if option.metavar)


def test_help_imports_nothing_heavy_and_recipes_no_jax(outputs):
    heavy = {command: found for command, (_, found) in outputs.items() if found}
    assert heavy == {command: ["pydantic"] for command in ("train --help", *OF_RECIPES)}


def test_help_of_train_lists_the_fields_of_a_recipe(help_texts):
    lines = [line.split() for line in help_texts["train"].partition("recipe fields")[2].splitlines()[1:]]
    rows = {name: (default, " ".join(kind)) for name, default, *kind in lines}
    assert {name.partition(".")[0] for name in rows} == {field.name for field in dataclasses.fields(Recipe)}
    assert rows["steps"] == ("required", "int")
    assert rows["remat"] == ("full", "full | offload | dots | none")
    assert rows["quantization"] == ("none", "int8 | nf4 | none")
    assert rows["supervision.answers"] == ("once", "once | as-published")
    assert rows["prefix_sharing"] == ("true", "bool")


def test_no_value_of_a_repeated_option_is_dropped():
    """argparse takes the last of repeated options, without a word."""
    repeated = 0
    for command, cls in COMMANDS.items():
        known = arguments(cls)
        needed = [word for one in known if one.required for word in (*one.option_strings[:1], "1")]
        for option in known:
            if not option.option_strings or not (option.nargs in ("*", "+") or "Append" in type(option).__name__):
                continue
            flag, name = option.option_strings[0], option.dest.replace("-", "_")
            words = [*needed, flag, "7", flag, "8"]
            values = operator.attrgetter(name)(tyro.cli(cls, args=words))
            assert re.findall(r"\b[78]\b", str(values)) == ["7", "8"], (command, flag)
            repeated += 1
    assert repeated > 10


def test_an_option_means_the_same_in_every_command(options):
    pairs = [(a, b) for a, b in itertools.combinations(options, 2) if a.name == b.name and a[2:] != b[2:]]
    assert [pair for pair in pairs if pair[0].name not in DIFFERENT] == []
    assert {first.name for first, _ in pairs} == DIFFERENT.keys()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_all_commands(shell):
    words = [sys.executable, "-m", "reverie_jax.cli", "completion", shell]
    script = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    missing = [word for name in COMMANDS for word in name.split() if not re.search(rf"\b{word}\b", script)]
    assert missing == []
    assert all(option in script for option in ("--marks", "--benchmark-data", "--reviewer"))
    if found := shutil.which(shell):
        assert subprocess.run([found, "-n"], input=script, text=True).returncode == 0
