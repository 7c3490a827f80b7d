"""Writes docs/keys.md from the schema of the recipe: `python tests/support/keys_table.py`."""

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastmoco.config.data import Subset, Weights
from fastmoco.config.recipe import Recipe, Schedule, View
from fastmoco.core.strict_yaml import models_in

PAGE = Path(__file__).parents[2] / "docs" / "keys.md"
HEAD = """# All keys of a recipe

Made from the schema by `python tests/support/keys_table.py`; a test compares. A key is given in a
`.yaml` file, or on the command line as `objective.queue=4096`.
"""


def described(model: type[BaseModel]) -> dict[str, str]:
    """Return the text of each attribute in a class's docstring."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        _, _, attributes = (inspect.cleandoc(kind.__doc__ or "")).partition("Attributes:\n")
        for entry in re.split(r"\n    (?=\w)", f"\n{attributes}"):
            names, _, text = " ".join(entry.split()).partition(": ")
            found |= {name: text for name in names.split(", ")}
    return found


def shown(value: Any) -> str:
    """Return a default as YAML has it."""
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value, default=str)}`"


def table(title: str, model: type[BaseModel]) -> str:
    """Return the section of a model."""
    texts = described(model)
    rows = []
    for key, field in model.model_fields.items():
        text = texts.get(key, "").replace("|", "/").replace("None", "null")
        if get_origin(field.annotation) is Literal:
            text = f"{', '.join(f'`{value}`' for value in get_args(field.annotation))}. {text}"
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            text = text or "A section, see below."
        rows.append(f"| `{key}` | {shown(field.get_default())} | {text} |")
    return "\n".join([f"\n## {title}\n", "| key | default | |", "|---|---|---|", *rows]) + "\n"


def page() -> str:
    """Return the whole page."""
    sections = {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)
    }
    from fastmoco.config.monitor import Monitor

    kinds = models_in(Recipe.model_fields["objective"].annotation)
    objectives = {f"objective {kind.model_fields['name'].default}": kind for kind in kinds}
    extra = {"monitor": Monitor, "views (each)": View, "data.subset": Subset}
    extra["data.weights"] = Weights
    parts = [table("At the top", Recipe)]
    parts += [table(name, model) for name, model in (sections | objectives | extra).items()]
    assert Schedule in sections.values()
    return HEAD + "".join(parts)


if __name__ == "__main__":
    sys.exit(PAGE.write_text(page()) and 0)
