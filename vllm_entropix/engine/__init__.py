"""The plugin's side of vLLM: the only folder that imports it."""
