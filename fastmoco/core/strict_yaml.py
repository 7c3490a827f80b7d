"""Strict YAML: an unknown key, a wrong type or a doubled key is an error with a suggestion."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from fastmoco.errors import UsageError

Model = TypeVar("Model", bound="Strict")

Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Side = Annotated[int, Field(ge=8)]  # of an image, pixels


class Strict(BaseModel):
    """A schema for YAML: unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _read_exponents(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Read `1e4` where a whole number is asked for, which pydantic takes for no text of one."""
        try:
            return validate(value)
        except ValidationError as error:
            if all(fault["type"] != "int_parsing" for fault in error.errors()):
                raise
        return validate(_without_exponents(value))


def _without_exponents(value: Any) -> Any:
    """Return a text as the whole number that it spells, if it does; of a list, each item."""
    if isinstance(value, list):
        return [_without_exponents(item) for item in value]
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if number.is_integer() else value


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves it to the schema what a text is, and refuses a key given twice.

    YAML 1.1 would take `010` for 8, `1:30` for 90, `off` for false and a date for no text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # what it brings in may be given anew
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(
                    f"a key that is no text in line {key_node.start_mark.line + 1}"
                )
            if key in seen:
                line = key_node.start_mark.line + 1
                raise UsageError(f"The key {key!r} stands twice (line {line}): keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag in (_MERGE, "tag:yaml.org,2002:null")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq", "map")
}


def parse_yaml(text: str | bytes, origin: str) -> Any:
    """Parse YAML strictly: mappings, lists, null, and texts, of which a schema makes numbers.

    Raises:
        UsageError: it is not YAML, holds a tag, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader subclass: builds no objects
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{origin} is not plain YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{origin} is not plain YAML: it is nested too deeply") from error


def validate_as(model: type[Model], values: Any, origin: str) -> Model:
    """Build a schema from parsed YAML; every fault becomes one plain line.

    Raises:
        UsageError: listing each fault with its key and, for an unknown key, the nearest known.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        within = {fault["loc"][:cut] for fault in faults for cut in range(len(fault["loc"]))}
        # A list whose items are wrong is not too short as well.
        lines = [
            _fault(dict(fault), model) for fault in faults if fault["loc"] not in within - {()}
        ]
        raise UsageError(f"{origin}: " + "; ".join(lines)) from error


def _fault(fault: dict[str, Any], model: type[Strict]) -> str:
    where, tag, choices = _without_tag(fault["loc"], model)
    dotted = ".".join(where)
    if fault["type"] == "extra_forbidden":
        if any(where[-1] in other.model_fields for other in choices):
            return f"{dotted}: {tag} has no {where[-1]}, leave it out"
        return f"unknown key {dotted!r}{near(where[-1], _keys_below(where[:-1], model))}"
    if fault["type"] == "union_tag_invalid":
        known = fault["ctx"]["expected_tags"].replace("'", "").split(", ")
        given = fault["ctx"]["tag"]
        return f"{dotted}.name: {given!r} is none of {', '.join(known)}{near(given, known)}"
    if fault["type"] == "missing":
        return f"the key {dotted!r} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def _without_tag(
    loc: Sequence[int | str], model: type[BaseModel]
) -> tuple[list[str], str, list[type[BaseModel]]]:
    """Return the keys on the way to a fault, without the tag that pydantic puts between them.

    That is the name by which a section was chosen among several; it comes second, and they last.
    """
    where = [str(part) for part in loc]
    field = model.model_fields.get(where[0]) if len(where) > 1 else None
    choices = models_in(field.annotation) if field else []
    if len(choices) < 2:
        return where, "", []
    return [where[0], *where[2:]], where[1], choices


def _keys_below(where: Sequence[str], model: type[BaseModel]) -> dict[str, str]:
    """Return the keys at a place and in its sections, with the dotted name of each."""
    models = [model]
    for part in where:
        # The number of a list's item and the key of a mapping are no fields: they lead nowhere.
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        models = [inner for field in fields for inner in models_in(field.annotation)] or models
    below = {
        key: f"{section}.{key}"
        for one in models
        for section, field in one.model_fields.items()
        for inner in models_in(field.annotation)
        for key in inner.model_fields
    }
    return below | {key: key for one in models for key in one.model_fields}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the schemas that an annotation names: several of a union."""
    if get_origin(annotation) is None:
        is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        return [annotation] if is_model else []
    return [model for part in get_args(annotation) for model in models_in(part)]


def near(word: str, known: Iterable[str]) -> str:
    """Return the suggestion that ends a sentence about an unknown word.

    Args:
        word: that is not known.
        known: words; of a mapping, the keys are compared and the values are named.
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    if not close:
        return "."
    named = known[close[0]] if isinstance(known, Mapping) else close[0]
    return f": did you mean {named!r}?"
