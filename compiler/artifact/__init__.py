"""The artifact folder: staged, published, read."""
