"""The axis algebra: what may be removed together, found in the graph."""
