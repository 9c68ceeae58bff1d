"""The JSON Schema of recipes, for editors. ``python -m compile_sparse.compiler.recipes.schema FILE`` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compile_sparse.compiler.recipes.recipe import Recipe

__all__ = ["schema_text"]


def schema_text() -> str:
    """JSON Schema (draft 2020-12) of a recipe file. Options of a pass are open: installed packages define them."""
    schema = Recipe.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(schema_text(), encoding="utf-8")
