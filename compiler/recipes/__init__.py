"""Built-in recipes, one YAML file each; the file name is the recipe's name."""
