"""How the quantize pass edits a graph."""
