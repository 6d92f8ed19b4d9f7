"""Recipes: the schema, reading and checking them, and what is derived from them. Imports no torch."""
