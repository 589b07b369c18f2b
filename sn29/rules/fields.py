"""What stands in a competition file: kinds of values, sections of fields, and what is said when one is wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from sn29.errors import Reason, Rejected
from sn29.rules.yaml_text import shown


def broken(got: object, rule: str) -> PydanticCustomError:
    """What a check of a value raises: `validate` makes a Rejected of it, with both sides."""
    return PydanticCustomError("rule", "{rule}", {"got": got, "rule": rule})


def number(value: object) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise broken(value, "a number")
    if not math.isfinite(value):
        raise broken(value, "a finite number")
    return value


def whole_number(value: object) -> int:
    found = number(value)
    if found != int(found):
        raise broken(value, "a whole number")
    return int(found)


def matching(pattern: str, rule: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise broken(value, rule)
        return value

    return AfterValidator(check)


Number = Annotated[float, BeforeValidator(number)]
WholeNumber = Annotated[int, BeforeValidator(whole_number)]
HubId = Annotated[str, matching(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", "a Hub id: owner/name")]
Revision = Annotated[str, matching("[0-9a-f]{40}", "a commit sha of 40 hex digits in lower case, in quotes")]
Fingerprint = Annotated[str, matching("[0-9a-f]{64}", "a sha256 of 64 hex digits in lower case, in quotes")]
Hotkey = Annotated[str, matching("[1-9A-HJ-NP-Za-km-z]{47,48}", "a hotkey: an ss58 address")]
Glob = Annotated[str, matching(r"(?!/)(?!.*\.\.)[^\\\s]+", "a file pattern inside the data set, such as data/*.parquet")]
Words = Annotated[str, Field(min_length=1)]
Weight = Annotated[Number, Field(gt=0)]


class Section(BaseModel):
    """Frozen; a field that is not known is an error, and one that is missing too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    also: ClassVar[tuple[str, ...]] = ()
    """Fields that a file may have and the record has not."""

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        fields = [info.alias or field for field, info in cls.model_fields.items()]
        known = ", ".join([*(field for field in fields if field != "name"), *cls.also])
        if not isinstance(data, Mapping):
            raise broken(data, f"a mapping with the fields {known}")
        unknown = [str(key) for key in data if key not in (*fields, *cls.also)]
        if unknown:
            raise broken(f"the field {unknown[0]}", f"one of {known}")
        return data


Record = TypeVar("Record", bound=Section)


def validate(record: type[Record], where: str, data: object) -> Record:
    """The record of a section. Raises Rejected(COMPETITION_FILE) for the first thing that is wrong with it."""
    try:
        return record.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    # The parts in angle brackets name our choice between two kinds of section, not a field of the file.
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
    if isinstance(data, Mapping) and "dataset" in data:  # as the file spells it
        field = re.sub(r"^datasets\.0(?=\.|$)", "dataset", field)
    rule = first["msg"].removeprefix("Input should be ").removeprefix("Input should have ")
    got = first.get("ctx", {}).get("got", "nothing" if first["type"] == "missing" else first["input"])
    if first["type"] == "missing":
        rule = "a value"
    raise Rejected(Reason.COMPETITION_FILE, shown(got), rule, f"{where}: {field}" if field else where)
