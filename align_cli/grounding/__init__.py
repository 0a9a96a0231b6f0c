"""Phrases and their places in pictures."""
