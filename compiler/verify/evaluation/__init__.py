"""Quality on the user's data for models that do not generate: what a file holds, what both models answer, how that is scored."""
