"""The tests, in rooms like those of what they test."""
