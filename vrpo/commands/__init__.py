"""The `vrpo` command: the only wing that prints."""
