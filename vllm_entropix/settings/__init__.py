"""Settings of server and request: sections, units and ranges, files. Imports nothing of the package."""
