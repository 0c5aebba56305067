"""Recordings: made, stored, read, and turned into features."""
