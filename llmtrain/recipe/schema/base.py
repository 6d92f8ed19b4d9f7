"""What every section of the recipe is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# The bound keeps products of such numbers within 64 bits, and is beyond what any run needs.
PositiveInt = Annotated[int, Field(gt=0, le=10**12)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A block of the recipe: unknown keys and mistyped values are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
