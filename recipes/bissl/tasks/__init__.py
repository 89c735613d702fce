"""The two task interfaces and the bundled tasks, one a file."""
