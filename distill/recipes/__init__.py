"""Recipes: how every public few-step model, and a OneStep file, must be called; data with its sources, read once."""
