"""What all samplers share: statistics of rows, the plan, filters and how they are written."""
