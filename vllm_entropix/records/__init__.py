"""What a record is: its fields, a sequence's records as values, and their JSON in responses and files."""

# Registers its fields, so that whoever reads records knows them.
from vllm_entropix.records import entropix as _entropix  # noqa: F401
