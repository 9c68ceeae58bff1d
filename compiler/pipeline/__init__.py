"""The jobs: compile, and measure an artifact again."""
