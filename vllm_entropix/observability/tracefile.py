"""Traces on disk: JSON lines, one per finished sequence, that can be read without the model and without its tokenizer.

A line holds what was generated and why. Of the prompt it holds a hash and a length, never the text.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_entropix.config import EntropixConfig, Thresholds
from vllm_entropix.observability.schema import TokenEntry
from vllm_entropix.observability.tokens import token_texts
from vllm_entropix.observability.trace import TokenTrace

VERSION = 1
logger = logging.getLogger(__name__)


class TraceFileError(ValueError):
    """A file that isn't a file of traces; the message is one sentence that names the file and the line."""


class TraceLine(BaseModel):
    """The trace of one finished sequence. A request with n > 1 gives n lines."""

    model_config = ConfigDict(extra="ignore")

    version: int = Field(VERSION, description="Version of this format.")
    request_id: str = Field(description="The request's id in the engine.")
    index: int = Field(0, ge=0, description="Number of the sequence among the request's n.")
    model: str | None = Field(None, description="Name of the model.")
    created: str = Field(description="When the sequence was finished, ISO 8601, UTC.")
    preset: str = Field(description="Preset of the sequence's constants.")
    fidelity: str = Field(description="corrected or original.")
    prompt_hash: str = Field(description="SHA-256 of the prompt's token ids as little-endian int64, in hexadecimal.")
    prompt_tokens: int = Field(ge=0, description="Tokens of the prompt.")
    token_ids: list[int] = Field(description="The generated tokens.")
    texts: list[str] = Field(
        description="Text of each token; of a character that is split over tokens, all of it stands with the last."
    )
    finish_reason: str | None = Field(None, description="Why generation ended.")
    not_kept: int = Field(0, ge=0, description="Tokens after the server's cap, which have no record.")
    thresholds: Thresholds = Field(description="Borders of the regimes that were used.")
    records: list[TokenEntry] = Field(description="One entry per token, in order; the last not_kept tokens have none.")
    alternative_texts: dict[int, str] = Field(default_factory=dict, description="Text of each token among the alternatives.")

    @classmethod
    def of(
        cls,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        completion: Any,
        trace: TokenTrace,
        config: EntropixConfig,
        tokenizer: Any,
        model: str | None = None,
    ) -> Self:
        """The line of a finished sequence.

        Args:
            request_id: of the request.
            prompt_token_ids: of which the hash is kept.
            completion: vLLM's CompletionOutput with all of the sequence's tokens.
            trace: its records.
            config: the settings the sequence ran with, its own preset included.
            tokenizer: gives tokens their texts.
            model: name of the model.
        """
        token_ids = list(completion.token_ids)
        records = [TokenEntry.of(token, record) for token, record in zip(token_ids, trace, strict=False)]
        alternatives = {token for entry in records for token, _ in entry.alternatives}
        return cls(
            request_id=request_id,
            index=completion.index,
            model=model,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            preset=config.preset_name,
            fidelity=config.fidelity,
            prompt_hash=prompt_hash(prompt_token_ids),
            prompt_tokens=len(prompt_token_ids),
            token_ids=token_ids,
            texts=token_texts(tokenizer, token_ids),
            finish_reason=completion.finish_reason,
            not_kept=len(token_ids) - len(records),
            thresholds=config.thresholds,
            records=records,
            alternative_texts={token: tokenizer.decode([token]) for token in sorted(alternatives)},
        )


def prompt_hash(token_ids: Sequence[int]) -> str:
    """What stands for a prompt in a trace: the same for the same tokens, and no way back to them but guessing."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).hexdigest()


def write_traces(file: TextIO, lines: Iterable[TraceLine]) -> None:
    """Append lines to an open text file."""
    for line in lines:
        file.write(line.model_dump_json() + "\n")


def read_traces(path: str | Path, progress: Callable[[int], object] | None = None) -> Iterator[TraceLine]:
    """The lines of a file of traces, one after the other.

    A last line that is cut short, as when a server is writing it at this moment, is left out with a warning.

    Args:
        path: of the file.
        progress: told how many bytes have been read, after each line.

    Raises:
        TraceFileError: the file can't be read, or a line isn't a trace of a version that this release knows.
    """
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    line = TraceLine.model_validate_json(raw)
                except ValidationError as error:
                    first = error.errors()[0]
                    if first["type"] == "json_invalid" and not raw.endswith(b"\n") and number > 1:
                        logger.warning("%s: line %d is cut short and left out", path, number)
                        return
                    place = ".".join(map(str, first["loc"]))
                    problem = f"{place}: {first['msg']}" if place else first["msg"]
                    raise TraceFileError(f"{path}, line {number}: not a trace: {problem}") from None
                if line.version != VERSION:
                    known = f"this release reads version {VERSION}"
                    raise TraceFileError(f"{path}, line {number}: version {line.version} of the trace format; {known}")
                yield line
                if progress is not None:
                    progress(file.tell())
    except OSError as error:
        raise TraceFileError(f"can't read {path}: {error.strerror or error}") from None
