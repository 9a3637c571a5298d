"""Recipes, and the runs that they describe."""
