"""Which pictures a run reads, by name, size and content: so that it can tell when others take their place."""
