"""Recipes: workflows of compression that are run, read and changed; with data and networks to try them on."""
