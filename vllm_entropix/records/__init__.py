"""What a record is: its fields, a sequence's records as values, and their JSON in responses and files."""
