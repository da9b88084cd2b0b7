"""Programs for who develops this project; nothing of it is installed."""
