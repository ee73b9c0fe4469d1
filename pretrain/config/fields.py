"""What fields of several sections have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

FREE: dict[str, Any] = {"on_resume": "free"}
"""`json_schema_extra` of fields that may change on resume."""

NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
