"""Programs that use vrpo for something real, each started with `python -m examples.<name>`."""
