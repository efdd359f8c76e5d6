"""The overrides of launch/train.py that all cells of a comparison have in common."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from experiment.training.saved_settings import flatten

NO_WORDS = ("true", "false", "null", "nan", "inf")  # in Hydra's grammar, without quotes
GROUPS = ("data", "model", "task", "trainer", "logger")  # of launch/train.py; their settings go to every cell


def shared_overrides(
    config: DictConfig, choices: Mapping[str, str], overrides: Sequence[str], folders: Sequence[str] = ()
) -> list[str]:
    """Find what makes launch/train.py use the groups of a comparison: its choices, command line and settings file.

    Args:
        config: Of the comparison.
        choices: Hydra's choice for each of its groups.
        overrides: Of the command line.
        folders: More folders with configurations, such as the user's own arms.
    """
    search = [f"hydra.searchpath=[{','.join(map(quoted, folders))}]"] if folders else []
    default = compose("train", search, return_hydra_config=True).hydra.runtime.choices
    chosen = [f"{group}={choices[group]}" for group in GROUPS if choices[group] != default[group]]
    typed = [o for o in overrides if _group(o) in GROUPS and not re.match(r"\w+=", o)]
    train = compose("train", [*search, *chosen, *typed])
    return [*search, *chosen, *typed, *_differences(config, train)]


def quoted(text: str) -> str:
    """Quote a string for Hydra's grammar, where a backslash counts only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text) + "'"


def value_text(value: Any) -> str:
    """Write a value for Hydra's grammar."""
    if isinstance(value, str):
        is_word = re.fullmatch(r"[A-Za-z_][\w.]*", value, re.ASCII) and value.lower() not in NO_WORDS
        return value if is_word else quoted(value)
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{value_text(item)}' for key, item in value.items())}}}"
    return json.dumps(value)


def _group(override: str) -> str:
    return re.split("[=.@]", override.lstrip("+~"), maxsplit=1)[0]


def _differences(config: DictConfig, train: DictConfig) -> Iterator[str]:
    """Write what a settings file of the comparison sets within the groups."""
    for group in GROUPS:
        ours, theirs = (flatten(OmegaConf.to_container(c[group])) for c in (config, train))
        for key, value in ours.items():
            if key not in theirs or theirs[key] != value:
                yield f"{'' if key in theirs else '+'}{group}.{key}={value_text(value)}"
