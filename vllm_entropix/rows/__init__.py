"""A step's rows on the device: whose they are, their settings, what is remembered of them, what is forced."""
