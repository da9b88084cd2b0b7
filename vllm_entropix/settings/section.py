"""What every group of settings shares: it is immutable, refuses unknown names, and each field has a unit and a range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from vllm_entropix.settings.errors import cut, quoted


def refuse_truth_value(value: Any) -> Any:
    """``value``, unless it is true or false, which Python takes for the numbers 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    return value


def setting(description: str, unit: str = "", **bounds: Any) -> Any:
    """A field with a unit; ``bounds`` are pydantic's default, ge, gt, le, lt (which NaN never satisfies)."""
    return Field(description=description, json_schema_extra={"unit": unit}, **bounds)


class Section(BaseModel):
    """A group of settings: immutable, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_truth_value(value) if cls.model_fields[str(info.field_name)].annotation in (int, float) else value


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def numbers_of(prefix: str, section: BaseModel) -> Iterator[tuple[str, float]]:
    """The numeric settings of a section and of those in it, as (dotted name, value), in their order."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from numbers_of(f"{prefix}.{name}", value)
        elif isinstance(value, (int, float)):
            yield f"{prefix}.{name}", float(value)


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error in one sentence: the setting, its value, and what is allowed."""
    # A misspelt name is missing, too, but that doesn't tell what to mend.
    first = min(error.errors(), key=lambda one: one["type"] == "missing")
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        fields = _section_at(model, first["loc"][:-1]).model_fields
        allowed = ", ".join(field.alias or field_name for field_name, field in fields.items())
        return f"unknown setting {quoted(name)}; here are {allowed}"
    # Parts with a bracket are pydantic's names of a union's members.
    name = ".".join(str(part) for part in first["loc"] if not isinstance(part, str) or "[" not in part)
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "missing":
        return f"{cut(name)} is missing"
    if not name:
        return message
    return f"{cut(name)} is {quoted(first['input'])}, but {message}"


def _section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    found: Any = model
    for part in location:
        # What isn't a section is a table or a list of sections.
        is_section = isinstance(found, type) and issubclass(found, BaseModel)
        found = found.model_fields[str(part)].annotation if is_section else get_args(found)[-1]
    assert isinstance(found, type)
    assert issubclass(found, BaseModel)
    return found
