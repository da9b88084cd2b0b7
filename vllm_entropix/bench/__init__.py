"""A fair test of samplers: tasks with checkable answers, random configurations, and statistics that a reader can check."""
